"""What is registered, kind by kind, with fields, defaults and sources: made from the registries and their classes."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

import compress
from compress import registry
from compress.errors import UserError, nearest
from compress.registry import Method, Registry

# Where the work that a method is taken from is named in a docstring.
_SOURCE = re.compile(r"arXiv:?\s?\d{4}\.\d{4,5}")
_REGISTERED = re.compile(r'^@(?:registry\.)?(\w+)\.register\("(\w+)"\)', re.MULTILINE)


@dataclass(frozen=True)
class Parameter:
    """One key of a method.

    Attributes:
        kind: what may stand there, in words.
        default: as in YAML; `required` where there is none.
    """

    name: str
    kind: str
    default: str
    description: str


@dataclass(frozen=True)
class Entry:
    """One method.

    Attributes:
        line: what it is, in a sentence.
        text: all that its class and its file say of it.
        sources: the papers that are named there.
    """

    name: str
    line: str
    text: str
    sources: tuple[str, ...] = ()
    parameters: tuple[Parameter, ...] = ()


def tables() -> dict[str, Registry[Any]]:
    """All registries, by the plural that they are called by."""
    return {name: table for name, table in vars(registry).items() if isinstance(table, Registry)}


@functools.cache
def names() -> dict[str, tuple[str, ...]]:
    """The names of all entries by kind, in the order of `entries`.

    Methods are read off the decorators in the package's files: to import the methods takes torch, and seconds, which
    an answer to a slip of the pen has no need of.
    """
    found: dict[str, list[str]] = {kind: [] for kind in tables()}
    for file in sorted(Path(compress.__file__).parent.rglob("*.py")):
        for kind, name in _REGISTERED.findall(file.read_text(encoding="utf-8")):
            found[kind].append(name)
    known = {kind: tuple(sorted(listed)) for kind, listed in found.items()}
    return known | {"suites": tuple(_suites()), "families": tuple(sorted(_families()))}


def place_of(word: str, name: str | None = None) -> tuple[str, str | None]:
    """The kind, and the entry, that one or two words call: a kind, a kind and a name, or a name that one kind has.

    Raises:
        UserError: there is no such kind or name, or several kinds have the name.
    """
    called = {kind: kind for kind in names()} | {kind.removesuffix("s"): kind for kind in names()}
    called |= {"family": "families", "budget": "budget_kinds", "budgets": "budget_kinds"}
    kind = called.get(word)
    if kind is None:
        homes = [home for home, known in names().items() if word in known] if name is None else []
        if len(homes) == 1:
            return homes[0], word
        if homes:
            raise UserError(
                "several kinds have a method of this name",
                where=word,
                expected="a kind and a name",
                fix=" or ".join(f"compress methods {home} {word}" for home in homes),
            )
        methods = [] if name is not None else [method for known in names().values() for method in known]
        raise UserError(
            "unknown kind of method",
            where=word,
            expected=f"one of {', '.join(names())}" + ("" if name is not None else ", or the name of a method"),
            fix=nearest(word, [*called, *methods]),
        )
    if name is not None and name not in names()[kind]:
        raise UserError(
            "unknown method",
            where=f"{word} {name}",
            expected=f"one of {', '.join(names()[kind])}",
            fix=nearest(name, names()[kind]),
        )
    return kind, name


def entries(kind: str) -> list[Entry]:
    """The entries of one kind, as `names` calls it."""
    if kind == "families":
        return [_family(row) for _, row in sorted(_families().items())]
    if kind == "suites":
        return [
            Entry(name, *_texts(suite.make), sources=tuple(filter(None, [suite.source])))
            for name, suite in _suites().items()
        ]
    return [_entry(name, method) for name, method in tables()[kind].items()]


def _suites() -> Mapping[str, Any]:
    from compress.evaluate.suites import SUITES

    return SUITES


def _families() -> Mapping[str, Any]:
    from compress.runtime.families import FAMILIES

    return FAMILIES


def _entry(name: str, method: type[Method]) -> Entry:
    text = "\n\n".join(part for part in (_doc(method), _doc(sys.modules[method.__module__])) if part)
    # The field that only names the class, as `target: window` in a plan, is nothing to choose.
    parameters = tuple(
        parameter(key, field) for key, field in method.model_fields.items() if field.get_default() != method.registered
    )
    return Entry(name, _line(_doc(method)), text, _sources(text), parameters)


def _family(row: Any) -> Entry:
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    lines = [f"{name}: {value}" for name, value in values.items() if value not in (None, "", (), {}) and name != "name"]
    pruned = "windows, and heads and neurons removed" if row.whole is None else f"windows; {row.whole}"
    return Entry(row.model_type, f"{row.name}: {pruned}", "\n".join(lines))


def _texts(function: Any) -> tuple[str, str]:
    text = _doc(function) or _doc(sys.modules[function.__module__])
    return _line(text), text


def _line(text: str) -> str:
    """The first paragraph on one line."""
    return " ".join(text.split("\n\n")[0].split())


def _doc(thing: Any) -> str:
    return inspect.cleandoc(vars(thing).get("__doc__") or "")


def _sources(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(" ".join(found.split()) for found in _SOURCE.findall(text)))


def parameter(name: str, field: FieldInfo) -> Parameter:
    """A field of a class, in words."""
    default = "required" if field.is_required() else as_yaml(field.get_default(call_default_factory=True))
    return Parameter(field.alias or name, words_of(field.annotation), default, field.description or "")


def as_yaml(value: Any) -> str:
    """A value as a recipe would have it, in one line."""
    if isinstance(value, Method) and value.registered:
        return f"{{name: {value.registered}}}"
    if isinstance(value, BaseModel):
        return as_yaml({key: getattr(value, key) for key in type(value).model_fields})
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {as_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(as_yaml, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def words_of(annotation: Any) -> str:
    """A type as people say it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        table = next((mark for mark in arguments[1:] if isinstance(mark, Registry)), None)
        return f"a {table.kind}" if table else words_of(arguments[0])
    if origin is Literal:
        return " | ".join(as_yaml(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(map(words_of, arguments)))
    if origin in (tuple, list):
        return f"list of {words_of(arguments[0])}"
    if origin is dict:
        return f"mapping of {words_of(arguments[0])} to {words_of(arguments[1])}"
    names = {int: "whole number", float: "number", str: "text", bool: "true | false", type(None): "null"}
    if annotation in names:
        return names[annotation]
    return "mapping" if isinstance(annotation, type) and issubclass(annotation, BaseModel) else str(annotation)
