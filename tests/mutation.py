"""Seeded damage to files of every kind that is read: to bytes, and to JSON, YAML, safetensors, GGUF by their form."""

from __future__ import annotations

import hashlib
import json
import random
import re
import struct
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from compress.json_file import CHECKSUM, checksum_of

Mutator = Callable[[bytes, random.Random], bytes]

# Stand in a JSON value for text that `json.dumps` would never write.
RAW = "\x00raw:"
LITERALS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-0",
    "9" * 5000,
    "[" * 200 + "]" * 200,
    "[" * 3000 + "]" * 3000,
    '{"a":' * 300 + "1" + "}" * 300,
    '"\\ud800"',
    '"\\u0000"',
)
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**53 + 1, 2**63, 10**18, 0.5, -0.5, 1e-300, 1e308,
    "", "x", "../../etc", "/", "[/red]", "\u202e", "a" * 5000, "0", "true", [], [[]], {}, {"a": 1}, [None], [True],
    *(RAW + text for text in LITERALS),
)  # fmt: skip


def flip(data: bytes, rng: random.Random) -> bytes:
    """One to eight bits."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 8)) if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(data: bytes, rng: random.Random) -> bytes:
    """The end is missing; sometimes all of it."""
    return data[: rng.choice((0, 1, rng.randrange(len(data) + 1), max(0, len(data) - 1)))]


def insert(data: bytes, rng: random.Random) -> bytes:
    """Bytes that were not there."""
    place = rng.randrange(len(data) + 1)
    what = rng.choice((b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b'"', b"{", b"]", b"9" * 30, rng.randbytes(16)))
    return data[:place] + what + data[place:]


def duplicate(data: bytes, rng: random.Random) -> bytes:
    """A span stands there twice."""
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.randrange(1, 200))
    return data[:end] + data[start:end] + data[end:]


def remove(data: bytes, rng: random.Random) -> bytes:
    """A span in the middle is missing."""
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.randrange(1, 64) :]


def zero(data: bytes, rng: random.Random) -> bytes:
    """A block that was never written to the disk."""
    start = rng.randrange(len(data) + 1)
    size = min(len(data) - start, rng.choice((1, 16, 512)))
    return data[:start] + bytes(size) + data[start + size :]


def other(data: bytes, rng: random.Random) -> bytes:
    """Something else altogether."""
    return rng.choice(
        (b"", b"null", b"true", b"[]", b"{}", b"3", b"PK\x03\x04", b"\x00" * 64, b"[" * 5000, b"9" * 6000)
    )


BYTES: tuple[Mutator, ...] = (flip, flip, truncate, insert, duplicate, remove, zero, other)


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) below a value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        found.append((value, key))
        _places(value[key], found)
    return found


def _dump(value: Any) -> str:
    text = json.dumps(value)
    for literal in LITERALS:
        text = text.replace(json.dumps(RAW + literal), literal)
    return text


def change(value: Any, rng: random.Random) -> Any:
    """Change one place of a JSON value: its type, size, name, neighbours, or whether it is there."""
    places = _places(value, [])
    if not places:
        return rng.choice(HOSTILE)
    # Short ways first: a place near the root is as likely as one of a thousand numbers.
    container, key = rng.choice(places if rng.random() < 0.5 else places[: max(8, len(places) // 8)])
    kind = rng.randrange(8)
    if kind <= 2:
        container[key] = rng.choice(HOSTILE)
    elif kind == 3:
        del container[key]
    elif kind == 4 and isinstance(container, dict):
        container[rng.choice((key + "s", key.upper(), "", "_" + key, "0"))] = container.pop(key)
    elif kind == 5:
        held = container[key]
        if isinstance(held, dict):
            container[key] = list(held.values())
        elif isinstance(held, list):
            container[key] = {str(number): part for number, part in enumerate(held)}
        else:
            container[key] = [held] if rng.random() < 0.5 else {"a": held}
    elif kind == 6:
        source, name = rng.choice(places)
        container[key] = json.loads(json.dumps(source.get(name) if isinstance(source, dict) else _at(source, name)))
    else:
        held = container[key]
        if isinstance(held, bool) or held is None:
            container[key] = not held
        elif isinstance(held, int | float):
            container[key] = rng.choice((-held, held + 1, held - 1, held * 1000, held / 3, str(held), held * 10**12))
        elif isinstance(held, str):
            container[key] = rng.choice((held + "x", held[:-1], held.upper(), held * 50, f" {held}", f"../{held}"))
        elif isinstance(held, list):
            container[key] = rng.choice((held * 2, held[:-1], held[::-1], [held], held[:1] * 1000))
    return value


def _at(items: Any, number: int) -> Any:
    return items[number] if number < len(items) else None


def change_json(data: bytes, rng: random.Random) -> bytes:
    """One or two changed places, or a key twice."""
    text = data.decode()
    if rng.random() < 0.1:
        keys = list(re.finditer(r'"[a-z_]+":', text))
        if keys:
            place = rng.choice(keys).start()
            return (text[:place] + rng.choice(keys).group() + " 1, " + text[place:]).encode()
    value = json.loads(text)
    for _ in range(rng.choice((1, 1, 2))):
        value = change(value, rng)
    return _dump(value).encode("utf-8", "surrogatepass")


def resealed_json(data: bytes, rng: random.Random) -> bytes:
    """Changed content with a checksum that fits, or without one: what a person's edit looks like."""
    value = json.loads(data)
    checksum = value.pop(CHECKSUM, None)
    value = change(value, rng)
    if isinstance(value, dict) and checksum is not None and rng.random() < 0.5:
        try:
            plain = json.loads(_dump(value))
            seal = checksum_of(plain) if str(checksum).startswith("sha256:") else _profile_seal(plain)
            return json.dumps({**plain, CHECKSUM: seal}).encode("utf-8", "surrogatepass")
        except (ValueError, RecursionError):
            pass
    return _dump(value).encode("utf-8", "surrogatepass")


def _profile_seal(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def change_line(data: bytes, rng: random.Random) -> bytes:
    """One changed line of JSONL."""
    lines = data.split(b"\n")
    full = [number for number, line in enumerate(lines) if line]
    if full:
        number = rng.choice(full)
        lines[number] = rng.choice((change_json, flip, truncate, insert))(lines[number], rng)
    return b"\n".join(lines)


YAML_VALUES = (
    "", "null", "true", "-1", "0", "0.5", "1e308", ".nan", ".inf", "9" * 5000, "99999999999999", "[]", "{}", "[[[]]]",
    "{a: 1}", "[" * 300 + "]" * 300, "!!python/object/apply:os.getcwd []", "!!binary AAAA", "2020-01-01", "&x [*x]",
    "*nowhere", "'", '"\\ud800"', "\"a\\0b\"", "on", "0x10", "1_000", "/", "../..", "[/red]", "a: b: c", "\t",
    "x" * 5000,
)  # fmt: skip


def change_yaml(data: bytes, rng: random.Random) -> bytes:
    """One changed line of YAML: its value, name, place, or whether it is there; or a bomb of aliases."""
    lines = data.decode().split("\n")
    number = rng.randrange(len(lines))
    line = lines[number]
    kind = rng.randrange(9)
    if kind <= 2 and ":" in line:
        place = rng.choice([found.end() for found in re.finditer(":", line)])
        end = re.search(r"[,}]|$", line[place:])
        lines[number] = f"{line[:place]} {rng.choice(YAML_VALUES)}{line[place + (end.start() if end else 0) :]}"
    elif kind == 3:
        del lines[number]
    elif kind == 4:
        lines.insert(number, line)
    elif kind == 5:
        lines[number] = rng.choice(("  ", "\t", "- ", "x")) + line
    elif kind == 6:
        lines[number] = re.sub(r"\d+", lambda _: rng.choice(("0", "-3", "1", "9" * 15, "1.5", "true")), line, count=1)
    elif kind == 7:
        words = re.findall(r"[a-z_]+", line)
        if words:
            word = rng.choice(words)
            lines[number] = line.replace(word, rng.choice((word[:-1], word + "s", word.upper(), "model")), 1)
    else:
        names = "abcdefghij"
        bomb = ["a: &a [x, x, x, x, x, x, x, x]"]
        bomb += [f"{b}: &{b} [{', '.join(['*' + a] * 8)}]" for a, b in pairwise(names)]
        lines[number:number] = bomb
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _header_of(data: bytes) -> tuple[bytes, bytes]:
    (size,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + size], data[8 + size :]


def change_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header's JSON, its length, or a number among the tensors."""
    header, rest = _header_of(data)
    kind = rng.randrange(4)
    if kind == 0:
        size = rng.choice((0, 1, len(header) - 1, len(header) + 1, 2**63, 2**64 - 1, len(data), 100_000_000))
        return struct.pack("<Q", size) + data[8:]
    if kind == 1 and rest:
        place = rng.randrange(len(rest))
        what = rng.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\xff\xff", b"\x01"))
        rest = rest[:place] + what + rest[place + len(what) :]
        return data[: 8 + len(header)] + rest[: len(data) - 8 - len(header)]
    header = change_json(header, rng)
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + rest


def change_partial(data: bytes, rng: random.Random) -> bytes:
    """A checksum and safetensors, as an interrupted stage leaves them."""
    return data[:32] + change_safetensors(data[32:], rng)


def resealed_partial(data: bytes, rng: random.Random) -> bytes:
    """The same with a checksum that fits."""
    changed = change_safetensors(data[32:], rng)
    return hashlib.sha256(changed).digest() + changed


def change_gguf(data: bytes, rng: random.Random) -> bytes:
    """Counts, types, lengths and names in the head of a GGUF file."""
    head = min(len(data), 2048)
    kind = rng.randrange(4)
    if kind == 0:  # magic, version, number of tensors, number of entries
        place, form = rng.choice(((4, "<I"), (8, "<Q"), (16, "<Q")))
        what = struct.pack(form, rng.choice((0, 1, 2, 5, 255, 2**31, 2**32 - 1)))
        return data[:place] + what + data[place + len(what) :]
    place = rng.randrange(24, head)
    if kind == 1:
        what = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1)))
    elif kind == 2:
        what = struct.pack("<I", rng.choice((0, 1, 8, 9, 12, 255, 2**31)))
    else:
        what = rng.randbytes(4)
    return data[:place] + what + data[place + len(what) :]


FORMS: dict[str, tuple[Mutator, ...]] = {
    "json": (change_json,),
    "sealed": (change_json, resealed_json),
    "jsonl": (change_line,),
    "yaml": (change_yaml,),
    "safetensors": (change_safetensors,),
    "partial": (change_partial, resealed_partial),
    "gguf": (change_gguf,),
    "text": (),
}


def damages(data: bytes, form: str, seed: int) -> Iterator[tuple[str, bytes]]:
    """Endless damaged forms of a file, each with the name of what was done; the same for the same seed."""
    rng = random.Random(seed)
    special = FORMS[form]
    while True:
        mutator = rng.choice(special) if special and rng.random() < 0.65 else rng.choice(BYTES)
        changed = mutator(data, rng)
        if changed != data:
            yield mutator.__name__, changed
