"""Makes a `Recipe` of located YAML: every problem in the project's words, at its place in the file. Imports torch."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from compress.errors import Problem, UserError, nearest, placed
from compress.recipe.checks import cross_checks
from compress.recipe.defaults import Situation, filled, needs_model
from compress.recipe.load import in_order, outline_problems
from compress.recipe.located_yaml import KeyPath, LocatedYaml, key_path, shown, unknown_key
from compress.recipe.schema import Recipe
from compress.registry import Registry, is_echo, typed
from compress.words import counted


def parse_located(located: LocatedYaml, text: str, path: Path, words: str) -> Recipe:
    """A recipe from what `read_located` gave for its text.

    Args:
        words: how a command names the recipe, settings included.

    Raises:
        UserError: everything that is wrong with it, in the order of the file.
    """
    if not isinstance(located.data, dict):
        raise UserError([*located.problems, *outline_problems(located)])
    recipe = _parsed(located, Situation.here("auto"), text, path, words)
    if needs_model(located.data):
        with placed(located.where(("model",))):
            situation = Situation.of(recipe.model, recipe.device)
        recipe = _parsed(located, situation, text, path, words)
    return recipe


def _parsed(located: LocatedYaml, situation: Situation, text: str, path: Path, words: str) -> Recipe:
    """A recipe with the defaults of a situation. Raises UserError."""
    # An empty section is one with its defaults only.
    sections = {name for name, field in Recipe.model_fields.items() if not field.is_required()}
    given = {key: value for key, value in located.data.items() if value is not None or key not in sections}
    data, chosen = filled(given, situation)
    recipe = None
    try:
        recipe = Recipe.model_validate(typed(data), strict=True)
    except ValidationError as error:
        items = error.errors(include_url=False)
        items = [part for item in items if not is_echo(item) for part in _apart(item)]
        problems = _merged(_problem(item, located, data) for item in items)
    else:
        recipe._text, recipe._source, recipe._words, recipe._chosen = text, path, words, chosen
        problems = []
        for keys, problem in cross_checks(recipe):
            problem.where = located.where(keys)
            problems.append(problem)
    if problems or located.problems or recipe is None:
        # Where the text itself is wrong, what was put in its place is nothing to complain of, too.
        places = {problem.where for problem in located.problems}
        others = [problem for problem in problems if problem.where not in places]
        raise UserError(in_order([*located.problems, *others]))
    return recipe


def _merged(problems: Iterator[Problem]) -> list[Problem]:
    """Problems with those of the branches of one union, which are at one place, as one."""
    merged: dict[tuple[str, str | None], Problem] = {}
    for problem in problems:
        first = merged.setdefault((problem.what, problem.where), problem)
        if first is not problem and problem.expected:
            first.expected = f"{first.expected}, or {problem.expected}"
    return list(merged.values())


def _problem(item: Any, located: LocatedYaml, data: Any) -> Problem:
    """One of pydantic's errors in the project's words, at its place in the file."""
    path = _place_in_file(data, item)
    kind, context = item["type"], item.get("ctx", {})
    where, wrong = located.where(path), f"wrong value for `{key_path(path)}`"
    if kind == "extra_forbidden":
        owner, registry = _schema_at(data, path[:-1])
        return unknown_key(path, [*_keys(owner), *([registry.key] if registry else [])], located)
    if kind == "missing":
        owner, _ = _schema_at(data, path[:-1])
        field = _fields(owner).get(str(path[-1]))
        where = located.where(path[:-1], key=True)
        return Problem(f"missing key `{key_path(path)}`", where, field.description if field else None)
    if kind == "no_name":
        here = key_path((*path, context["key"]))
        return Problem(f"missing key `{here}`", where, expected=f"one of {context['known']}")
    if kind == "unknown_name":
        place: KeyPath = (*path, context["key"])
        hint = context["hint"].removeprefix("; ") or None
        what, known = f"unknown {context['kind']} `{context['name']}`", f"one of {context['known']}"
        return Problem(what, located.where(place), known, shown(item["input"][context["key"]]), hint)
    actual, fix = shown(item["input"]), None
    expected: str | None
    if kind == "no_method":
        expected = f"`{context['key']}: ...` and its parameters"
        fix = f"write `{{{context['key']}: {item['input']}}}`" if isinstance(item["input"], str) else None
    elif kind == "model_type":
        expected = f"a mapping with the keys {', '.join(_keys(_schema_at(data, path)[0]))}"
    elif kind == "tuple_type":
        registry = _schema_at(data, path)[1]
        expected = f"a list, each entry `- {registry.key}: ...`" if registry else "a list"
    elif kind == "too_short":
        expected = "at least one entry"
    elif kind in ("string_too_short", "string_too_long"):
        least, most = context.get("min_length"), context.get("max_length")
        expected = f"at least {counted(least, 'character')}" if least else f"at most {counted(most, 'character')}"
    elif kind == "dict_type":
        expected = "a mapping"
    elif kind == "string_pattern_mismatch":
        field = _fields(_schema_at(data, path[:-1])[0]).get(str(path[-1]))
        expected = field.description if field and field.description else item["msg"]
    elif (told := _TOLD.fullmatch(item["msg"])) is not None:
        expected, actual, fix = told["expected"], told["got"], told["hint"]
        if told["key"] is not None:
            inner = (*path, *(int(part) if part.isdecimal() else part for part in told["key"].split(".")))
            return Problem(f"wrong value for `{key_path(inner)}`", located.where(inner), expected, actual, fix)
    elif kind == "value_error" and "expected" not in item["msg"]:  # it says what is wrong, not what would be right
        wrong, expected = f"{wrong}: {item['msg'].removeprefix('Value error, ')}", None
    else:
        expected = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ").removeprefix("expected ")
        if kind == "literal_error":
            options = [option.strip(" '") for option in context["expected"].replace(" or ", ", ").split(",")]
            fix = nearest(str(item["input"]), options)
    whole = kind == "value_error" and isinstance(item["input"], Mapping | tuple)  # the message says which part of it
    return Problem(wrong, where, expected, None if whole else actual, fix)


# A message of a check of this project that says all: of which key, what was expected (`errors.one_of`), what was found.
_TOLD = re.compile(
    r"Value error, (?:(?P<key>[\w.]+): )?"
    r"expected (?P<expected>[^;]+?)(?:; (?P<hint>did you mean `[^`]+`\?))?, got (?P<got>[^;]+)"
)


_NEXT = re.compile(r"; (?=[\w.]+: expected )")


def _apart(item: Any) -> list[Any]:
    """What a check of this project tells of several keys at once, as an error for each."""
    first, *others = _NEXT.split(item["msg"])
    return [{**item, "msg": first}, *({**item, "msg": f"Value error, {other}"} for other in others)]


def _place_in_file(data: Any, item: Any) -> KeyPath:
    """Where an error is in the file: pydantic names branches of unions, too (`kv.float`)."""
    place: list[str | int] = []
    for number, part in enumerate(item["loc"]):
        missing = item["type"] == "missing" and number == len(item["loc"]) - 1
        inner = _step(data, part)
        if missing or inner is not _NOTHING:
            place.append(part)
            data = inner
    return tuple(place)


_NOTHING = object()


def _step(data: Any, part: str | int) -> Any:
    """The part of a mapping or list, `_NOTHING` where there is none. Numbers as keys are given as text."""
    if isinstance(data, dict):
        return next((value for key, value in data.items() if str(key) == str(part)), _NOTHING)
    if isinstance(data, list) and isinstance(part, int) and part < len(data):
        return data[part]
    return _NOTHING


def _schema_at(data: Any, path: KeyPath) -> tuple[type[BaseModel] | None, Registry[Any] | None]:
    """The class that checks the mapping at `path` of a recipe's data, and the registry that it was chosen from."""
    owner: type[BaseModel] | None = Recipe
    registry: Registry[Any] | None = None
    for part in path:
        data = _step(data, part)
        if isinstance(part, str):
            field = _fields(owner).get(part)
            registry = None if field is None else _registry_in(field.annotation, field.metadata)
            owner = next(_models_in(field.annotation), None) if field else None
        if registry is not None and isinstance(data, dict) and data.get(registry.key) in registry:
            owner = registry[data[registry.key]]
    return owner, registry


def _fields(owner: type[BaseModel] | None) -> dict[str, FieldInfo]:
    return {field.alias or name: field for name, field in owner.model_fields.items()} if owner else {}


def _keys(owner: type[BaseModel] | None) -> list[str]:
    return list(_fields(owner))


def _registry_in(annotation: Any, metadata: list[Any]) -> Registry[Any] | None:
    """The registry of an annotation, through unions, tuples and Annotated."""
    marks = [*metadata, *getattr(annotation, "__metadata__", ())]
    registry = next((mark for mark in marks if isinstance(mark, Registry)), None)
    inner = (_registry_in(argument, []) for argument in typing.get_args(annotation))
    return registry or next((table for table in inner if table), None)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Model classes in an annotation, through unions, tuples and Annotated."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)
