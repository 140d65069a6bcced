"""Log-likelihoods in packed batches are those of each continuation alone; their files come back or are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import UserError
from compress.evaluate.likelihood import answer, score
from compress.evaluate.requests import AnswerFile, Request, RequestFile, read_answers, read_requests
from tests.tiny import FAMILIES, random_ids, tiny_model

# Tokens of context and continuation; two share an input, and all but the last two share their beginning.
LENGTHS = [(20, 3), (1, 1), (60, 1), (60, 1), (7, 30), (20, 4), (90, 11), (33, 2)]


def made(model: Any) -> list[Request]:
    """Random requests, every other one with the greedy continuation."""
    found = []
    for number, (context, continuation) in enumerate(LENGTHS):
        ids = random_ids(1, context + continuation, seed=max(1, number - 5))[0].tolist()
        behind = ids[context:]
        if number % 2:
            behind = []
            for _ in range(continuation):
                row = torch.tensor([ids[:context] + behind])
                behind.append(int(model(row).logits[0, -1].argmax()))
        found.append(Request("t", number, 0, f"c{number}", "d", tuple(ids[:context]), tuple(behind)))
    return found


def alone(model: Any, request: Request) -> tuple[float, bool]:
    """The definition: one forward pass over context and continuation, a softmax at each position."""
    ids = [*request.context_ids, *request.continuation_ids]
    logits = model(torch.tensor([ids])).logits[0].float().log_softmax(dim=-1)
    rows = logits[len(request.context_ids) - 1 : -1]
    wanted = torch.tensor(request.continuation_ids)
    return float(rows.gather(1, wanted[:, None]).sum()), bool((rows.argmax(dim=1) == wanted).all())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_tokens", [1, 130, 8192])
@torch.inference_mode()
def test_as_each_alone(family: str, batch_tokens: int) -> None:
    model = tiny_model(family)
    requests = made(model)
    expected = [alone(model, request) for request in requests]
    found = score(model, requests, batch_tokens=batch_tokens)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert {greedy for _, greedy in expected} == {True, False}


@torch.inference_mode()
def test_what_a_model_does_to_its_logits_counts() -> None:
    model = tiny_model("gemma3")
    plain = score(model, made(model))
    model.config.final_logit_softcapping = 2.0
    capped = score(model, made(model))
    assert capped[0][0] != pytest.approx(plain[0][0], rel=0.01)
    assert capped[0][0] == pytest.approx(alone(model, made(model)[0])[0], rel=1e-4)


def test_logits_are_made_only_where_they_are_read() -> None:
    model = tiny_model("llama-gqa")
    requests = made(model)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, logits: rows.append(logits.shape[:-1].numel()))
    score(model, requests)
    assert sum(rows) == sum(continuation for _, continuation in LENGTHS)
    assert not model.lm_head._forward_pre_hooks


def test_files_come_back_the_same(tmp_path: Path) -> None:
    model = tiny_model("llama-gqa")
    asked = RequestFile("tiny", ("t",), 8, tuple(made(model)))
    asked.write(tmp_path / "requests.json.gz")
    assert read_requests(tmp_path / "requests.json.gz") == asked
    answered = answer(model, asked, "dense")
    assert (answered.name, answered.dtype, answered.device) == ("dense", "float32", "cpu")
    answered.write(tmp_path / "answers.json")
    assert read_answers(tmp_path / "answers.json", asked) == answered


def test_other_files_are_refused(tmp_path: Path) -> None:
    asked = RequestFile("tiny", ("t",), None, tuple(made(tiny_model("llama-gqa"))))
    path = tmp_path / "file"
    for content in (b"", b"{}", b"\x1f\x8b\x08"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="requests cannot be read"):
            read_requests(path)
        with pytest.raises(UserError, match="answers cannot be read"):
            read_answers(path, asked)
    answers = ((-1.0, False),) * len(LENGTHS)
    other = replace(asked, requests=(*asked.requests[:-1], replace(asked.requests[-1], continuation_ids=(5, 5))))
    AnswerFile("dense", "float32", "cpu", other.key, answers).write(path)
    with pytest.raises(UserError, match="belong to other requests"):
        read_answers(path, asked)
    AnswerFile("dense", "float32", "cpu", asked.key, answers[1:]).write(path)
    with pytest.raises(UserError, match="number of answers differs"):
        read_answers(path, asked)
