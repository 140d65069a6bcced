"""A recipe as a file that explains itself: every key with its value, and above it what it means."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Collection, Iterator
from typing import Any

import yaml
from pydantic import BaseModel

from compress.recipe.catalogue import parameter, tables
from compress.recipe.outline import REPLACED
from compress.recipe.schema import Recipe
from compress.registry import Method, Registry

WIDTH = 110


def explained(recipe: Recipe, command: str) -> str:
    """The recipe as YAML with a comment for every key, made from the descriptions of the fields.

    Args:
        command: what it was made by.
    """
    head = [f"# Made by: {command}", *(f"# by default {line}" for line in recipe.chosen)]
    return "\n".join([*head, *_mapping(recipe, 0, () if recipe.upcycle is None else REPLACED)]) + "\n"


def _mapping(model: BaseModel, level: int, left_out: Collection[str] = ()) -> Iterator[str]:
    """The keys of a section or a method, one a line, each below its comment."""
    indent = "  " * level
    for name, field in type(model).model_fields.items():
        if name in left_out:
            continue
        key, value = field.alias or name, getattr(model, name)
        if level == 0 and isinstance(value, BaseModel):
            yield ""
        about = parameter(name, field)
        choices = f" ({about.kind})" if "|" in about.kind and "mapping" not in about.kind else ""
        yield from _comment(about.description + choices, indent)
        if isinstance(value, BaseModel):
            yield f"{indent}{key}:"
            table = next((mark for mark in field.metadata if isinstance(mark, Registry)), None)
            if table is not None and isinstance(value, Method) and table.key not in type(value).model_fields:
                yield f"{indent}  {table.key}: {value.registered}"
            yield from _mapping(value, level + 1)
        elif isinstance(value, tuple) and any(isinstance(item, BaseModel) for item in value):
            entries = _plain(model, name)
            if isinstance(value[0], Method) and value[0].registered:
                kind = next(kind for kind, table in tables().items() if type(value[0]) in dict(table.items()).values())
                yield f"{indent}# `compress methods {kind} NAME` explains the keys of an entry"
            yield f"{indent}{key}:"
            yield from (f"{indent}  - {_flow(item)}" for item in entries)
        else:
            yield f"{indent}{key}: {_flow(_plain(model, name))}"


def _plain(model: BaseModel, name: str) -> Any:
    """A field's value as plain data, methods with their names; also where it is only written when it is given."""
    written, value = json.loads(model.model_dump_json()), getattr(model, name)
    return written[name] if name in written else list(value) if isinstance(value, tuple) else value


def _flow(value: Any) -> str:
    """A value in one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def _comment(text: str, indent: str) -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(text, WIDTH - len(indent))]
