"""Text sources, the split into parts, and what is refused."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from compress.data.text import (
    DatasetText,
    EmbeddedText,
    FileText,
    Part,
    TextSource,
    _sections,
    leading_tokens,
    split_text,
    tokenise,
)
from compress.errors import UserError
from tests.data.language import byte_tokenizer, story

PARTS = get_args(Part)


def test_embedded_text_is_there_and_always_the_same() -> None:
    text = EmbeddedText().load()
    assert len(text) > 300_000
    assert text == EmbeddedText().load()


def test_sources_are_chosen_by_their_key() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(TextSource)
    assert adapter.validate_python({"source": "embedded"}) == EmbeddedText()
    assert adapter.validate_python({"source": "file", "path": "a.txt"}) == FileText(path="a.txt")
    assert adapter.validate_python({"source": "dataset", "id": "a/b"}) == DatasetText(id="a/b")
    with pytest.raises(ValidationError):
        adapter.validate_python({"source": "embedded", "path": "a.txt"})


def test_files(tmp_path: Path) -> None:
    plain = tmp_path / "a.txt"
    plain.write_text("one\ntwo\n", encoding="utf-8")
    assert FileText(path=str(plain)).load() == "one\ntwo\n"
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "one\\u2028x", "body": "1"}\n\n{"text": "two", "body": "2"}\n', encoding="utf-8")
    assert FileText(path=str(lines)).load() == "one\u2028x\n\ntwo\n"
    assert FileText(path=str(lines), column="body").load() == "1\n\n2\n"


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "text", ":2: the line is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n[1]\n', "text", ":3: the line is not a JSON object"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "x"}\n', "text", ":2: there is no column `text`"),
        ("a.jsonl", b'{"text": "x", "bodies": ""}\n', "body", "did you mean `bodies`"),
        ("a.jsonl", b'{"text": 3}\n', "text", ":1: `text` is not text"),
        ("a.jsonl", b"\n", "text", "holds no text"),
        ("a.txt", b" \n", "text", "holds no text"),
        ("a.txt", b"ab\xff", "text", "not UTF-8"),
        ("a.csv", b"text\nx\n", "text", "*.txt or *.jsonl"),
        ("a.txt", None, "text", "cannot be read"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, content: bytes | None, column: str, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        FileText(path=str(path), column=column).load()
    assert message in str(error.value)
    assert name in str(error.value)


def _install(monkeypatch: pytest.MonkeyPatch, **attributes: Any) -> None:
    module: Any = types.ModuleType("datasets")
    for name, value in attributes.items():
        setattr(module, name, value)
    monkeypatch.setitem(sys.modules, "datasets", module)


class _Rows(list[dict[str, Any]]):
    column_names = ("text",)


def test_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*args: Any, **kwargs: Any) -> _Rows:
        calls.append((args, kwargs))
        return _Rows([{"text": "one"}, {"text": "two"}])

    _install(monkeypatch, __version__="5.2.0", load_dataset=load_dataset)
    assert DatasetText(id="a/b", config="c", split="test").load() == "one\n\ntwo\n"
    assert calls == [(("a/b", "c"), {"split": "test"})]
    with pytest.raises(UserError, match="no column `texts`"):
        DatasetText(id="a/b", column="texts").load()


def test_dataset_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no network")

    _install(monkeypatch, __version__="5.2.0", load_dataset=offline)
    with pytest.raises(UserError, match="no network"):
        DatasetText(id="a/b").load()
    _install(monkeypatch, __version__="3.6.0", load_dataset=offline)
    with pytest.raises(UserError, match="may run code"):
        DatasetText(id="a/b").load()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install"):
        DatasetText(id="a/b").load()


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab \n", max_size=3000), st.integers(1, 40))
def test_sections_are_the_text_and_every_section_is_in_one_part(text: str, repeats: int) -> None:
    text = text * repeats
    sections = _sections(text)
    assert "".join(sections) == text
    assert sum(len(split_text(text, part)) for part in PARTS) == len(text)


def test_parts_never_share_a_paragraph_and_have_their_share() -> None:
    text = "\n\n".join(f"Paragraph {number} says what only it says." for number in range(20_000))
    shares = {part: split_text(text, part) for part in PARTS}
    paragraphs = {part: set(share.split("\n\n")) - {""} for part, share in shares.items()}
    assert not paragraphs["calibration"] & paragraphs["held_out"]
    assert not paragraphs["calibration"] & paragraphs["evaluation"]
    assert not paragraphs["held_out"] & paragraphs["evaluation"]
    assert sum(map(len, paragraphs.values())) == 20_000
    assert len(shares["calibration"]) / len(text) == pytest.approx(0.5, abs=0.05)
    assert len(shares["evaluation"]) / len(text) == pytest.approx(0.25, abs=0.05)


def test_special_tokens_come_from_the_tokenizer_alone() -> None:
    assert leading_tokens(byte_tokenizer()) == []
    assert leading_tokens(byte_tokenizer(begin=True)) == [1]
    assert byte_tokenizer().decode(tokenise(byte_tokenizer(begin=True), story(10))) == story(10)
