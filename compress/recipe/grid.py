"""A grid of recipes: one recipe with some keys set to each of several values."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from compress.errors import UserError
from compress.recipe.load import read_keys

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


def axes_of(given: Sequence[str]) -> dict[str, list[str]]:
    """Values by key, as they were written.

    Args:
        given: `key=value,value...` each; values are YAML, and commas inside brackets, braces and quotes belong to them.

    Raises:
        UserError: not of this form, or a key twice.
    """
    axes: dict[str, list[str]] = {}
    for text in given:
        key, equals, values = text.partition("=")
        if not equals or not key or not values:
            raise UserError("a key without values", where=f"--set {text}", expected="key=value or key=value,value,...")
        if key in axes:
            raise UserError("a key is set twice", where=f"--set {text}", fix="give all of its values at once")
        axes[key] = split(values)
    return axes


def grid(path: Path, axes: Mapping[str, Sequence[str]], output: str | None) -> tuple[Path, list[Point]]:
    """Every combination of the values.

    Args:
        path: the recipe.
        axes: values by key.
        output: the folder below which every point gets a run folder; None stands for the recipe's output and `-sweep`.

    Returns:
        That folder, and the points.

    Raises:
        UserError: a value twice, too many combinations, or a recipe, key or value that is wrong.
    """
    points: dict[str, Point] = {}
    folder = Path(output or f"{read_keys(path)['output']}-sweep").expanduser()
    for values in itertools.islice(itertools.product(*axes.values()), MOST + 1):
        settings = [f"{key}={value}" for key, value in zip(axes, values, strict=True)]
        data = read_keys(path, settings)
        parsed = {key: yaml.safe_load(value) for key, value in zip(axes, values, strict=True)}
        name = _name(parsed)
        if name in points:
            raise UserError("the same value twice", where=" ".join(settings))
        data["output"] = str(folder / name)
        points[name] = Point(name, parsed, yaml.safe_dump(data, sort_keys=False, allow_unicode=True))
    if len(points) > MOST:
        raise UserError("too many recipes", where="--set", expected=f"at most {MOST:,} combinations")
    return folder, list(points.values())


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


def _name(settings: Mapping[str, Any]) -> str:
    """Keys and values as the name of a folder: `solver-moa_kv-0.5`."""
    lasts = [re.split(r"[.\[]", key)[-1].rstrip("]") for key in settings]
    parts = [
        f"{short(key) if lasts.count(last) > 1 else last}-{short(value)}"
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
