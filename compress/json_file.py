"""JSON as this project reads it: bounded in size and depth, no key twice, every fault named with its place."""

from __future__ import annotations

import contextlib
import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import TypeAdapter, ValidationError

from compress.errors import Problem, UserError
from compress.files import append_line, digest_of

MOST_BYTES = 64 << 20  # a plan of a 70B model is 8 MB; 64 MiB of nothing but brackets is a gigabyte in memory
MOST_DEPTH = 64
MOST_DIGITS = 20  # of a whole number; none that is written has more than 64 bits
MOST_PROBLEMS = 20  # that are told of one file
CHECKSUM = "checksum"

AGAIN = "run the command that wrote it again"

Content = TypeVar("Content")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JsonError(ValueError):
    """A text that is not JSON as this project reads it; the message says what is wrong, and where."""


def parse_json(data: bytes | str, *, finite: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        data: text, or bytes in UTF-8 with or without a byte order mark.
        finite: whether NaN and Infinity, which Python writes and JSON has not, are refused.

    Raises:
        JsonError: not UTF-8, not JSON, a key twice, a number out of range, half a character, or nested too deeply.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JsonError(f"not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_whole,
            parse_float=_finite if finite else float,
            parse_constant=_constant if finite else float,
        )
    except json.JSONDecodeError as error:
        raise JsonError(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise _too_deep() from None
    _check_depth(value)
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise JsonError("half of a surrogate pair: \\ud800 to \\udfff stand in pairs only") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        twice, count = Counter(key for key, _ in pairs).most_common(1)[0]
        raise JsonError(f"the key {_short(twice)} is given {'twice' if count == 2 else f'{count} times'}")
    return members


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise JsonError(f"a whole number of {len(digits):,} digits, expected at most {MOST_DIGITS}")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise JsonError(f"the number {_short(digits)} is too large")
    return value


def _constant(name: str) -> NoReturn:
    raise JsonError(f"{name} is not a number")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> JsonError:
    return JsonError(f"nested too deeply, expected at most {MOST_DEPTH} levels")


def _short(value: Any) -> str:
    """A value in a few characters, however large it is."""
    return reprlib.repr(value)


def read_bytes(path: Path, what: str, *, fix: str | None = None, most: int = MOST_BYTES) -> bytes:
    """The bytes of a file.

    Args:
        what: what the file is, with its article, for the message.
        most: size in bytes beyond which it is refused.

    Raises:
        UserError: there is no such file, it cannot be read, or it is too large.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        raise UserError(f"{what} is missing", where=str(path), fix=fix) from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{what} cannot be read", where=str(path), found=reason, fix=fix) from None
    if len(data) > most:
        raise UserError(
            f"{what} is too large",
            where=str(path),
            expected=f"at most {most:,} bytes",
            found=f"{path.stat().st_size:,} bytes",
            fix=fix,
        )
    return data


def read_object(
    path: Path, what: str, *, fix: str | None = None, most: int = MOST_BYTES, finite: bool = True
) -> dict[str, Any]:
    """The JSON object in a file; arguments as of `read_bytes` and `parse_json`.

    Raises:
        UserError: the file is missing, cannot be read, is too large, is not JSON, or holds something else.
    """
    try:
        value = parse_json(read_bytes(path, what, fix=fix, most=most), finite=finite)
    except JsonError as error:
        raise UserError(f"{what} is damaged", where=str(path), expected="JSON", found=str(error), fix=fix) from None
    if not isinstance(value, dict):
        raise UserError(f"{what} is damaged", where=str(path), expected="a JSON object", found=_short(value), fix=fix)
    return value


def validated(kind: type[Content], value: Any, what: str, where: str, *, fix: str | None = None) -> Content:
    """A parsed JSON value as a model or a dataclass, by JSON's own types: "4" and true are no numbers.

    Args:
        what, where: what it is, with its article, and its file, for the messages.

    Raises:
        UserError: all that does not fit, each with its place.
    """
    try:
        return TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise UserError(_problems(error, what, where, fix)) from None


def read_model(
    kind: type[Content],
    path: Path,
    what: str,
    *,
    fix: str | None = None,
    most: int = MOST_BYTES,
    finite: bool = True,
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = lambda value: value,
) -> Content:
    """`read_object`, then `validated`; where the object has a checksum (`sealed`), that is checked as well.

    Args:
        prepare: brings an object of an earlier form into the present one; raises ValueError where it is of none.

    Raises:
        UserError: as they do, or the content does not match its checksum.
    """
    value = read_object(path, what, fix=fix, most=most, finite=finite)
    try:
        content = unsealed(value) if CHECKSUM in value else value
    except JsonError as error:
        by_hand = f"if you edited it by hand, remove its `{CHECKSUM}` line"
        raise UserError(
            f"{what} is damaged: {error}", where=str(path), fix=f"{fix}; {by_hand}" if fix else by_hand
        ) from None
    try:
        content = prepare(content)
    except ValueError as error:
        raise UserError(f"{what} is damaged", where=str(path), found=str(error), fix=fix) from None
    return validated(kind, content, what, str(path), fix=fix)


def _problems(error: ValidationError, what: str, where: str, fix: str | None) -> list[Problem]:
    errors = error.errors(include_url=False)
    problems = [
        Problem(
            f"{what}: {_message(item)}",
            f"{where}: {'.'.join(str(part) for part in item['loc'])}" if item["loc"] else where,
            found=_short(item["input"]),
        )
        for item in errors[:MOST_PROBLEMS]
    ]
    if len(errors) > MOST_PROBLEMS:
        problems.append(Problem(f"{what}: {len(errors) - MOST_PROBLEMS:,} more problems", where))
    problems[-1].fix = fix
    return problems


def _message(item: Any) -> str:
    """One of pydantic's errors in words."""
    return "unknown key" if item["type"] == "extra_forbidden" else item["msg"].removeprefix("Value error, ")


def checksum_of(content: dict[str, Any]) -> str:
    """`sha256:...` of a JSON object in canonical form, so that a changed digit is noticed."""
    return f"sha256:{digest_of(content)}"


def sealed(content: dict[str, Any]) -> str:
    """Indented JSON that ends with a checksum of everything before it."""
    plain = json.loads(json.dumps(content))  # keys are text in the file, and sorted as text
    return json.dumps({**plain, CHECKSUM: checksum_of(plain)}, indent=1) + "\n"


def unsealed(value: Any) -> dict[str, Any]:
    """What `sealed` was given, from the parsed text.

    Raises:
        JsonError: not an object, no checksum, or one of other content.
    """
    if not isinstance(value, dict) or CHECKSUM not in value:
        raise JsonError("no object with a checksum")
    content = {key: part for key, part in value.items() if key != CHECKSUM}
    if value[CHECKSUM] != checksum_of(content):
        raise JsonError("its content does not match its checksum")
    return content


def read_sealed(path: Path) -> dict[str, Any] | None:
    """What a `sealed` file holds; None where there is none, or a damaged one, which is as good as none."""
    try:
        return unsealed(parse_json(path.read_bytes(), finite=False))
    except (OSError, JsonError):
        return None


def parse_lines(lines: Iterable[str], *, finite: bool = True) -> Iterator[dict[str, Any]]:
    """The objects of JSONL text, without lines that are none (an interrupt leaves such); `finite`: `parse_json`."""
    for line in lines:
        try:
            value = parse_json(line, finite=finite)
        except JsonError:
            continue
        if isinstance(value, dict):
            yield value


def append_entry(path: Path, entry: Mapping[str, Any], *, checked: bool = False) -> None:
    """Add an object to a JSONL file; it is in the file when this returns.

    Args:
        checked: add a checksum, so that a reader notices a changed digit.

    Raises:
        UserError: see `files.append_line`.
    """
    plain = dict(entry)
    append_line(path, json.dumps({**plain, CHECKSUM: checksum_of(plain)} if checked else plain))


def read_entries(path: Path, *, checked: bool = False, finite: bool = True) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, none where there is no file; damaged lines are skipped.

    Args:
        checked: take only lines whose checksum is right, without it.
        finite: skip lines with NaN or Infinity.
    """
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for entry in parse_lines(lines, finite=finite):
        if not checked:
            yield entry
            continue
        with contextlib.suppress(JsonError):
            yield unsealed(entry)
