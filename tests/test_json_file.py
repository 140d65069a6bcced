"""JSON texts that are refused, each with its reason and place; files with a checksum."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress.errors import UserError
from compress.json_file import MOST_DEPTH, JsonError, parse_json, read_object, read_sealed, sealed


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'{"a": 1,\n "b": }', "line 2, column 7"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 5_000, "nested too deeply"),
        (b"[" * (MOST_DEPTH + 2) + b"]" * (MOST_DEPTH + 2), "nested too deeply"),
        (b"9" * 6_000, "a whole number of 6,000 digits"),
        (b"-" + b"9" * 4_301, "a whole number of"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": -Infinity}', "-Infinity is not a number"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is given twice"),
        (b'{"a": "\xff"}', "byte 7 is 0xff"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (rb'{"a": "\ud800"}', "half of a surrogate pair"),
        (rb'{"\udc00": 1}', "half of a surrogate pair"),
        (b"", "line 1, column 1"),
    ],
)
def test_what_is_refused(text: bytes, says: str) -> None:
    with pytest.raises(JsonError, match=says) as caught:
        parse_json(text)
    assert len(str(caught.value)) < 200


def test_what_is_read() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": [1, 2.5, null, true, "\\ud83d\\ude00"]}') == {"a": [1, 2.5, None, True, "😀"]}
    assert parse_json(b"[" * MOST_DEPTH + b"]" * MOST_DEPTH) and parse_json(str(2**64 - 1)) == 2**64 - 1
    assert parse_json("[Infinity]", finite=False) == [float("inf")]


@pytest.mark.parametrize("content", [b"true", b"[]", b'"a"', b"3", b"null"])
def test_an_object_is_expected(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match="a JSON object"):
        read_object(tmp_path / "a.json", "the file")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "large.json").write_text("[" + "0," * 50 + "0]")
    for path, says in (
        (tmp_path / "none.json", "the file is missing"),
        (tmp_path, "the file cannot be read"),
        (tmp_path / "a\0b", "the file cannot be read"),
        (tmp_path / "large.json", "at most 100 bytes"),
    ):
        with pytest.raises(UserError, match=says):
            read_object(path, "the file", most=100)


def test_a_seal_holds_for_every_byte(tmp_path: Path) -> None:
    content = {"key": "a", "sizes": {2: 1, 10: 2}, "loss": 0.1 + 0.2, "worst": float("inf"), "names": ("x",)}
    path = tmp_path / "sealed.json"
    path.write_text(sealed(content))
    whole = json.loads(json.dumps(content))
    assert read_sealed(path) == whole and read_sealed(tmp_path / "none") is None
    data = path.read_bytes()
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert read_sealed(path) in (None, whole)  # white space may change
    path.write_text(json.dumps(content))
    assert read_sealed(path) is None
