"""Reads a recipe file as far as that needs no method, and hands it on to `read`, which imports torch."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.encodings import decode, wrong_byte
from compress.errors import Problem, UserError, nearest
from compress.recipe.located_yaml import (
    MOST_CHARACTERS,
    KeyPath,
    LocatedYaml,
    read_located,
    shown,
    unknown_key,
)
from compress.recipe.outline import REPLACED, REQUIRED, SECTIONS, Outline

if TYPE_CHECKING:
    from compress.recipe.schema import Recipe

MOST_BYTES = 4 * MOST_CHARACTERS


def load_recipe(path: Path | str, settings: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe file.

    Args:
        settings: `KEY=VALUE` each, as `search.budget.kv=0.25`, which take the place of what the file has there.

    Raises:
        UserError: no such file, or everything that is wrong with it: each problem with file, line, column, key,
            what was expected and found, and the nearest valid name. Wrong keys of the top level are reported first,
            and all others after the methods, and torch with them, are imported.
    """
    path = Path(path)
    text, located = _located(path, settings)
    from compress.recipe.read import parse_located

    if settings:
        command = " ".join(f"--set {shlex.quote(setting)}" for setting in settings)
        text = f"{text.rstrip()}\n# with {command}\n"
        return parse_located(located, text, path, f"{path} {command}")
    return parse_located(located, text, path, str(path))


def read_keys(path: Path | str, settings: Sequence[str] = ()) -> dict[str, Any]:
    """The keys of a recipe file as plain data, with those of `settings`; only the top level is checked.

    Raises:
        UserError: no such file, or what is wrong with its outline or with a setting.
    """
    return dict(_located(Path(path), settings)[1].data)


def _located(path: Path, settings: Sequence[str]) -> tuple[str, LocatedYaml]:
    """A recipe's text, and its data with the settings put in. Raises UserError."""
    text = _text(path)
    located = read_located(text, str(path))
    problems = [*located.problems, *outline_problems(located, missing=not settings)]
    if not problems:
        problems = [problem for setting in settings for problem in put(located, setting)]
        problems = problems or outline_problems(located)
    if problems:
        raise UserError(in_order(problems))
    return text, located


def put(located: LocatedYaml, setting: str, option: str | None = None) -> list[Problem]:
    """Put one `KEY=VALUE` into the data of a recipe; what is wrong with it.

    Args:
        option: what gave it on the command line, by which problems call it; `--set KEY` otherwise.
    """
    key, sign, value = setting.partition("=")
    parts = re.findall(r"([^.\[\]=]+)|\[(\d{1,9})\]", key)
    whole = re.fullmatch(r"[^.\[\]=]+(\.[^.\[\]=]+|\[\d{1,9}\])*", key.strip())
    if not sign or not whole:
        return [
            Problem("not a setting", "--set", "KEY=VALUE, as search.budget.kv=0.25", shown(setting), "quote the whole")
        ]
    path: KeyPath = tuple(int(number) if number else name.strip() for name, number in parts)
    origin = option or f"--set {key.strip()}"
    read = read_located(value, origin)
    if read.problems:
        return read.problems
    try:
        located.put(path, read.data, origin)
    except LookupError as error:
        return [Problem("this key cannot be set", origin, found=str(error.args[0]))]
    return []


def read_settings(settings: Sequence[str], options: Mapping[str, str]) -> Recipe:
    """A recipe of nothing but settings, `KEY=VALUE` each. Raises UserError.

    Args:
        options: what gave a setting on the command line, where that was not `--set`.
    """
    located = LocatedYaml("the recipe", {})
    problems = [problem for setting in settings for problem in put(located, setting, options.get(setting))]
    problems = problems or outline_problems(located)
    if problems:
        raise UserError(problems)
    from compress.recipe.read import parse_located

    return parse_located(located, "", Path("recipe.yaml"), "")


def outline_problems(located: LocatedYaml, *, missing: bool = True) -> list[Problem]:
    """What is wrong with the keys of the top level.

    Args:
        missing: whether keys have to be there.
    """
    if not isinstance(located.data, dict):
        if located.problems:
            return []
        return [
            Problem("a recipe is a mapping of keys", located.where(()), "model:, output:, ...", shown(located.data))
        ]
    values = {field.alias or name: field for name, field in Outline.model_fields.items()}
    known = [*values, *SECTIONS]
    descriptions = SECTIONS | {name: field.description for name, field in values.items()}
    required = [name for name, field in values.items() if field.is_required()]
    upcycled = located.data.get("upcycle") is not None
    required += [] if upcycled else list(REQUIRED)
    unknown = [unknown_key((key,), known, located) for key in located.data if key not in known]
    absent = [
        Problem(f"missing key `{name}`", located.where(()), expected=descriptions[name])
        for name in required
        if missing and name not in located.data
    ]
    replaced = [
        Problem(
            f"an upcycled model has no `{name}`: its plan is that all experts stay",
            located.where((name,), key=True),
            fix=f"remove `{name}`, or `upcycle`; to compress what comes of it, take another recipe",
        )
        for name in REPLACED
        if upcycled and located.data.get(name) is not None
    ]
    return unknown + absent + replaced


def in_order(problems: list[Problem]) -> list[Problem]:
    """Problems in the order of the file."""

    def place(problem: Problem) -> tuple[int, int]:
        parts = (problem.where or "").rsplit(":", 2)
        return (int(parts[1]), int(parts[2])) if len(parts) == 3 and all(map(str.isdigit, parts[1:])) else (0, 0)

    return sorted(problems, key=place)


def _text(path: Path) -> str:
    """The file's text. Raises UserError where it cannot be read, or is none."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise UserError("no such recipe file", where=str(path), fix=_similar_file(path)) from None
    except IsADirectoryError:
        inside = path / "recipe.yaml"
        raise UserError(
            "the recipe cannot be read: it is a folder",
            where=str(path),
            expected="a .yaml file",
            fix=f"did you mean `{inside}`?" if inside.is_file() else None,
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError("the recipe cannot be read", where=str(path), found=reason) from None
    if len(data) > MOST_BYTES:
        raise UserError("the file is too large for a recipe", where=str(path), expected=f"at most {MOST_BYTES:,} bytes")
    try:
        return decode(data)
    except UnicodeDecodeError:
        raise UserError(
            "the recipe is not UTF-8 text", where=str(path), found=wrong_byte(io.BytesIO(data)), fix="save it as UTF-8"
        ) from None


def _similar_file(path: Path) -> str | None:
    """The file of a similar name, beside the missing one or among the recipes in `recipes/`."""
    for folder in (path.parent, Path("recipes")):
        if folder.is_dir():
            names = {candidate.stem: candidate for candidate in folder.glob("*.y*ml")}  # all have the same ending
            hint = nearest(path.stem, names)
            if hint:
                name = hint.split("`")[1]
                return f"did you mean `{names[name]}`?"
    return "`compress recipes` lists the recipes that come with the project"
