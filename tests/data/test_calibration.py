"""Calibration documents carry the dense model's own answers and are made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import compress.data.calibration as calibration
from compress.data.answers import answer
from compress.data.calibration import calibration_documents
from compress.data.continuation import Continuation
from compress.data.key_value import KeyValue
from compress.data.passkey import PassKey
from compress.data.text import FileText, split_text, tokenise
from compress.errors import UserError
from tests.data.language import byte_loaded, byte_model, byte_tokenizer, story, story_in

REQUESTS = [
    PassKey(length=160, count=2),
    KeyValue(length=200, count=1, lines=1),
    Continuation(length=160, count=2, answer_tokens=12),
]


@pytest.fixture
def source(tmp_path: Path) -> FileText:
    return story_in(tmp_path)


def test_greedy_answer_is_that_of_generate() -> None:
    model: Any = byte_model()
    prompt = tokenise(byte_tokenizer(), story(10))[:90]
    tokens = torch.tensor([prompt])
    expected = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=20)
    written = expected[0, 90:].tolist()
    assert list(answer(model, prompt, 20))[: len(written)] == written
    assert len(written) >= 3


def test_prefill_asks_for_one_row_of_logits_and_decoding_goes_through_the_cache() -> None:
    model: Any = byte_model()
    calls: list[tuple[int, int]] = []
    forward = model.forward

    def spy(**kwargs: Any) -> Any:
        output = forward(**kwargs)
        calls.append((kwargs["input_ids"].shape[1], output.logits.shape[1]))
        return output

    model.forward = spy
    answer(model, range(4, 54), 4)
    assert calls == [(50, 1), (1, 1), (1, 1), (1, 1)]


def test_sampling_follows_its_seed() -> None:
    model = byte_model()
    draws = [answer(model, range(4, 40), 16, decoding="sample", temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert answer(model, range(4, 40), 16, decoding="sample", temperature=1e-4) == answer(model, range(4, 40), 16)


def test_logits_that_are_not_finite_are_an_error() -> None:
    model: Any = byte_model()
    model.lm_head.weight.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        answer(model, [5, 6], 2)


def test_documents_by_length_with_the_models_answers(tmp_path: Path, source: FileText) -> None:
    loaded = byte_loaded()
    reports: list[tuple[int, int, str]] = []
    documents = calibration_documents(
        loaded, REQUESTS, source, "calibration", 0, tmp_path / "kept", lambda *report: reports.append(report)
    )
    assert {length: [d.task for d in made] for length, made in documents.items()} == {
        160: ["passkey", "passkey", "continuation", "continuation"],
        200: ["key_value"],
    }
    for length, made in documents.items():
        for document in made:
            assert document.length == length == document.answer[1]
    first = documents[160][0]
    start, end = first.answer
    assert first.tokens[start:] == answer(loaded.model, first.tokens[:start], end - start)
    assert reports[-1][:2] == (5, 5)
    assert [report[0] for report in reports] == sorted(report[0] for report in reports)


def test_nothing_is_answered_twice(tmp_path: Path, source: FileText, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: Any, **kwargs: Any) -> tuple[int, ...]:
        calls.append(args)
        return answer(*args, **kwargs)

    monkeypatch.setattr(calibration, "answer", counted)
    kept = tmp_path / "kept"

    def make(seed: int = 0, part: Any = "calibration", model: int = 0, requests: Any = REQUESTS) -> int:
        before = len(calls)
        calibration_documents(byte_loaded(model), requests, source, part, seed, kept)
        return len(calls) - before

    first = calibration_documents(byte_loaded(), REQUESTS, source, "calibration", 0, kept)
    assert len(calls) == 5
    assert calibration_documents(byte_loaded(), REQUESTS, source, "calibration", 0, kept) == first
    assert make() == 0
    assert make(seed=1) == 5
    assert make(part="held_out") == 5
    assert make(model=1) == 5
    assert make(requests=[*REQUESTS, PassKey(length=180, count=1)]) == 1
    source_path = Path(source.path)
    source_path.write_text(story() + story(), encoding="utf-8")
    assert make() == 5


@pytest.mark.parametrize("damage", ["", "{", '{"tokens": [1]}\n', "cut"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, source: FileText, damage: str) -> None:
    kept = tmp_path / "kept"
    first = calibration_documents(byte_loaded(), REQUESTS[:1], source, "calibration", 0, kept)
    (path,) = kept.iterdir()
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole[: len(whole) // 2] if damage == "cut" else damage, encoding="utf-8")
    assert calibration_documents(byte_loaded(), REQUESTS[:1], source, "calibration", 0, kept) == first
    assert path.read_text(encoding="utf-8") == whole


def test_answer_text_is_the_right_answer(tmp_path: Path, source: FileText) -> None:
    requests = [PassKey(length=160, count=2, answer="text"), Continuation(length=160, count=1, answer="text")]
    documents = calibration_documents(byte_loaded(), requests, source, "calibration", 0, tmp_path / "kept")[160]
    for document in documents[:2]:
        assert byte_tokenizer().decode(document.tokens[document.answer[0] :]).strip() == document.expected
    part = tokenise(byte_tokenizer(), split_text(source.load(), "calibration"))
    window = list(documents[2].tokens)
    assert any(part[i : i + 160] == window for i in range(len(part)))


def test_too_long_for_the_model_is_known_before_any_answer(tmp_path: Path, source: FileText) -> None:
    requests = [*REQUESTS, PassKey(length=300, count=1)]
    with pytest.raises(UserError, match="longer than the model's context"):
        calibration_documents(byte_loaded(context=256), requests, source, "calibration", 0, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
