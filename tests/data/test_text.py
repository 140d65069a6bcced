"""Text sources, the split into parts, and what is refused."""

from __future__ import annotations

import codecs
import json
import random
import sys
import types
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from compress.data.text import (
    LIMIT,
    MOST,
    DatasetText,
    EmbeddedText,
    Excerpt,
    FileText,
    Part,
    TextSource,
    UndividedText,
    _in_pieces,
    _sections,
    characters_for,
    leading_tokens,
    split_text,
    tokenise,
)
from compress.errors import UserError
from tests.data.language import byte_tokenizer, story
from tests.tiny import tiny_tokenizer

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
        ("a.jsonl", b'{"text": null}\n', "text", ":1: `text` is not text"),
        ("a.jsonl", b'{"text": ["x"]}\n', "text", ":1: `text` is not text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "a\\ud800b"}\n', "text", ":2: half of a surrogate pair"),
        ("a.jsonl", b'{"text": "\\udc00\\ud800"}\n', "text", "\\udc00 at character 0"),
        ("a.jsonl", b'{"text": "x"}\n' + b"[" * 100_000 + b"\n", "text", ":2: the line is nested too deeply"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", "text", ":1: the line is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "a\x00b"}\n', "text", ":2: a NUL character"),
        ("a.jsonl", b'{"\\ud800": "x"}\n', "text", ":1: there is no column `text`"),
        ("a.jsonl", '{"text": "x"}\n'.encode("utf-16-le"), "text", "a NUL character"),
        ("a.jsonl", b'{"text": "x"}\r\n{"text": "\xe4"}\r\n', "text", "not UTF-8 in line 2, byte 25 of the file"),
        ("a.txt", b"ab\xff", "text", "not UTF-8 in line 1, byte 2 of the file"),
        ("a.txt", b"a\r\nb\rc\n" * 200_000 + b"d\xffe", "text", "not UTF-8 in line 600001, byte 1,400,001 of"),
        ("a.txt", b"\xef\xbb\xbfa\n\xff", "text", "not UTF-8 in line 2, byte 5 of the file"),
        ("a.txt", codecs.BOM_UTF16_LE + b"a\0\n\0\0\xd8", "text", "not UTF-16-LE in line 2, byte 6 of the file"),
        ("a.txt", "one\ntwo\n".encode("utf-16-be"), "text", ":1: a NUL character"),
        ("a.txt", b"one\ntwo\0\n", "text", ":2: a NUL character"),
        ("a.txt", codecs.BOM_UTF8, "text", "holds no text"),
        ("a\0.txt", None, "text", "cannot be read"),
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
    str(error.value).encode()


ENCODINGS = [
    (b"", "utf-8"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
]


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(("mark", "encoding"), ENCODINGS)
def test_marks_and_line_ends_are_no_part_of_the_text(tmp_path: Path, mark: bytes, encoding: str, ends: str) -> None:
    text = "öne 🦉\n\ntwo\n"
    plain = tmp_path / "a.txt"
    plain.write_bytes(mark + text.replace("\n", ends).encode(encoding))
    assert FileText(path=str(plain)).load() == text
    rows = '{"text": "öne 🦉\\u0000"}\n\n{"text": ""}\n{"text": "\\ufefftwo"}\n'
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(mark + rows.replace("\n", ends).encode(encoding))
    assert FileText(path=str(lines)).load() == "öne 🦉\0\n\n\n\n\ufefftwo\n"


def long_text(paragraphs: int) -> str:
    return (
        "\n\n".join(f"Paragraph {number} says what only it says, and no other." for number in range(paragraphs)) + "\n"
    )


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_of_a_long_file_the_beginning_is_read_in_sections_of_the_whole(tmp_path: Path, kind: str) -> None:
    text = long_text(10_000)
    path = tmp_path / f"a.{kind}"
    path.write_text(text if kind == "txt" else "".join(f"{json.dumps({'text': t})}\n" for t in text.split("\n\n")))
    source = FileText(path=str(path))
    assert source.excerpt() == Excerpt(text)
    for most in (150_000, 300_000, 333_333):
        excerpt = source.excerpt(most)
        assert most - 30_000 < len(excerpt.text) <= most
        assert excerpt.used is not None and f"the first {len(excerpt.text):,} characters, about " in excerpt.used
        for part in PARTS:
            assert split_text(text, part).startswith(split_text(excerpt.text, part))
        assert sum(len(split_text(excerpt.text, part)) for part in PARTS) == len(excerpt.text)


def test_what_lies_behind_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = json.dumps({"text": "word " * 2000}) + "\n"
    with path.open("w") as file:
        file.write(row * 30)
        file.seek(2**33)  # 8 GiB that take no room on the disk
        file.write("x")
    assert len(FileText(path=str(path)).load(200_000)) <= 200_000
    with pytest.raises(UserError, match="the line is too long"):
        FileText(path=str(path)).load()


def test_a_dataset_is_read_as_far_as_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Long(_Rows):
        def __iter__(self) -> Any:
            yield from ({"text": "word " * 2000} for _ in range(30))
            raise AssertionError("too much was read")

        def __len__(self) -> int:
            return 10**9

    _install(monkeypatch, __version__="5.2.0", load_dataset=lambda *args, **options: Long())
    excerpt = DatasetText(id="a/b").excerpt(200_000)
    assert excerpt.used is not None and "of 1,000,000,000 rows" in excerpt.used
    monkeypatch.setattr(Long, "__iter__", lambda self: iter([{"text": "x"}, {"text": "\ud800"}]))
    with pytest.raises(UserError, match="a/b: row 1: half of a surrogate pair"):
        DatasetText(id="a/b").load()


def test_requests_say_how_much_they_need() -> None:
    assert characters_for(100_000, "calibration") == MOST
    assert characters_for(10_000_000, "calibration") == 160_000_000
    assert characters_for(10_000_000, "evaluation") == 320_000_000
    assert characters_for(10**15, "held_out") == LIMIT


def spaced_tokenizer() -> Any:
    """BPE over a text that nothing cuts into words, with a mark for spaces and before the text (as Llama 2 has it)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    sentences = sorted(set(story(300).replace("\n", " ").split(". ")))
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize(
    "tokenizer", [byte_tokenizer(), tiny_tokenizer(), spaced_tokenizer()], ids=["bytes", "words", "no words"]
)
def test_a_text_in_pieces_has_the_tokens_of_the_whole(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = random.Random(0)
    text = story(700) + "".join(words.choice("w12 é\n🦉 3 ,w") for _ in range(30_000)) + "\n\n" * 500 + story(200)
    whole = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    monkeypatch.setattr("compress.data.text.OVERLAP", 1024)
    for size in (4096, 10_001):
        monkeypatch.setattr("compress.data.text.PIECE", size)
        assert _in_pieces(tokenizer, text[:40_000]) is not None
        assert tokenise(tokenizer, text) == whole


def test_where_no_pieces_fit_together_the_whole_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.data.text.PIECE", 1001)
    monkeypatch.setattr("compress.data.text.OVERLAP", 64)
    text = "stone" * 2000
    assert tokenise(tiny_tokenizer(), text) == [3]


def test_a_tokenizer_that_fails_is_named() -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise TypeError("'>' not supported between instances of 'int' and 'dict'\nmore")

    with pytest.raises(UserError, match=r"cannot read a text[\s\S]*'int' and 'dict'\n"):
        tokenise(broken, "x")  # type: ignore[arg-type]


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
    with pytest.raises(UserError, match="can run code"):
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


def test_every_part_of_an_undivided_text_is_the_whole(tmp_path: Path) -> None:
    path = tmp_path / "test.txt"
    path.write_text("one two\n\nthree four\n\n" * 40)
    source = TypeAdapter(TextSource).validate_python({"source": "undivided", "path": str(path)})
    assert isinstance(source, UndividedText)
    whole = FileText(path=str(path)).load()
    assert {source.part(source.load(), part) for part in PARTS} == {whole}
    assert len({FileText(path=str(path)).part(whole, part) for part in PARTS}) == 3
