"""A grid of recipes: one recipe with some keys set to each of several values."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from compress.errors import UserError

LONGEST = 120  # characters of a point's name
MOST = 1000  # points of a grid
OPENING, CLOSING = "[{", "]}"


@dataclass(frozen=True)
class Point:
    """One recipe of the grid.

    Attributes:
        name: keys and values in short, as the name of a folder.
        settings: value by dotted key.
        text: the recipe with these values, as YAML.
    """

    name: str
    settings: Mapping[str, Any]
    text: str


def axes_of(given: Sequence[str]) -> dict[str, list[Any]]:
    """Values by dotted key.

    Args:
        given: `key=value,value...` each; values are YAML, and commas inside brackets, braces and quotes belong to them.

    Raises:
        UserError: not of this form, or a key twice.
    """
    axes: dict[str, list[Any]] = {}
    for text in given:
        key, equals, values = text.partition("=")
        if not equals or not key or not values:
            raise UserError("a key without values", where=f"--set {text}", expected="key=value or key=value,value,...")
        if key in axes:
            raise UserError(
                "a key is set twice", where=f"--set {text}", fix="give all of its values at once, by commas"
            )
        axes[key] = [_value(value, text) for value in split(values)]
    return axes


def grid(data: Mapping[str, Any], axes: Mapping[str, Sequence[Any]], output: str) -> list[Point]:
    """Every combination of the values.

    Args:
        data: the recipe's keys.
        axes: values by dotted key.
        output: the folder below which every point gets a run folder of its own.

    Raises:
        UserError: a value twice, too many combinations, or a key whose parent is no mapping or list.
    """
    points: dict[str, Point] = {}
    for values_of in itertools.islice(itertools.product(*axes.values()), MOST + 1):
        settings = dict(zip(axes, values_of, strict=True))
        name = _name(settings)
        changed = copy.deepcopy(dict(data))
        for key, value in settings.items():
            put(changed, key, copy.deepcopy(value))
        changed["output"] = f"{output}/{name}"
        if name in points:
            raise UserError("the same value twice", where=", ".join(f"{k}={v}" for k, v in settings.items()))
        points[name] = Point(name, settings, yaml.safe_dump(changed, sort_keys=False, allow_unicode=True))
    if len(points) > MOST:
        raise UserError("too many recipes", where="--set", expected=f"at most {MOST:,} combinations")
    return list(points.values())


def split(values: str) -> list[str]:
    """Values separated by the commas that stand in no bracket, brace or quotes."""
    parts, depth, quote = [""], 0, ""
    for character in values:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in OPENING:
            depth += 1
        elif character in CLOSING:
            depth -= 1
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _value(text: str, given: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError("a value is not YAML", where=f"--set {given}", found=str(error).splitlines()[0]) from None


def put(data: Any, key: str, value: Any) -> None:
    """Set a dotted key; mappings on the way are made, entries of a list are named by their number.

    Raises:
        UserError: what is on the way is neither a mapping nor a list that has such an entry.
    """
    *parents, last = key.split(".")
    for number, part in enumerate(parents):
        here = ".".join(parents[: number + 1])
        if isinstance(data, dict):
            if data.get(part) is None:
                data[part] = {}
            data = data[part]
        else:
            data = _entry(data, part, here)
    if isinstance(data, dict):
        data[last] = value
    elif isinstance(data, list) and last.isdecimal() and int(last) < len(data):
        data[int(last)] = value
    else:
        raise _no_place(key)


def _entry(data: Any, part: str, here: str) -> Any:
    if isinstance(data, list) and part.isdecimal() and int(part) < len(data):
        return data[int(part)]
    raise _no_place(here)


def _no_place(key: str) -> UserError:
    return UserError(
        "there is no such key in the recipe", where=f"--set {key}", expected="keys by dots, entries of a list by number"
    )


def _name(settings: Mapping[str, Any]) -> str:
    """Keys and values as the name of a folder: `solver-moa_kv-0.5`."""
    lasts = [key.rpartition(".")[2] for key in settings]
    parts = [
        f"{key if lasts.count(last) > 1 else last}-{short(value)}"
        for (key, value), last in zip(settings.items(), lasts, strict=True)
    ]
    return "_".join(parts)[:LONGEST] or "recipe"


def short(value: Any) -> str:
    """A value in a few letters that a folder's name can have."""
    if isinstance(value, Mapping):
        named = [key for key in ("name", "task", "source") if key in value]
        head = [str(value[key]) for key in named]
        return "-".join([*head, *(f"{key}-{short(item)}" for key, item in value.items() if key not in named)])
    if isinstance(value, list):
        return "+".join(map(short, value))
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", "null" if value is None else str(value)).strip("-")
