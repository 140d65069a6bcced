"""Checks of what is written on the command line, all of them before torch is imported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from compress.errors import UserError, nearest
from compress.files import refusal
from compress.limits import ENTRIES, LONGEST

DTYPES = ("float32", "bfloat16", "float16")
IMPLS = ("auto", "reference", "triton", "fla", "flash")
DEVICE = re.compile(r"auto|balanced|cpu|mps|cuda(:\d{1,3})?")
RECIPES = (".yaml", ".yml")
# A recipe's text and a run folder's files, where a model belongs.
RUN_FILES = ("stages.json", "model.json", "recipe.resolved.yaml")


def given_path(text: str, where: str) -> Path:
    """A path of the command line, with `~` in place of the home folder.

    Raises:
        UserError: no system takes such a path.
    """
    if not text.strip() or "\0" in text:
        raise UserError("not a path", where=where, found=repr(text), fix="name a file or a folder")
    try:
        path = Path(text).expanduser()
        path.exists()
    except RuntimeError as error:
        raise UserError("not a path", where=where, found=text, fix="write the home folder out") from error
    except OSError as error:
        raise refusal("this path cannot be used", text if len(text) < 100 else f"{text[:97]}...", error) from error
    return path


def out_folder(text: str, where: str = "--out") -> Path:
    """A folder that results are written to.

    Raises:
        UserError: it is a file.
    """
    path = given_path(text, where)
    if path.exists() and not path.is_dir():
        raise UserError("the output is a file", where=str(path), expected="a folder", fix="name another one")
    return path


def make_folder(path: Path) -> None:
    """Make a folder for results.

    Raises:
        UserError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refusal("the folder cannot be made", path, error) from error


def one_of(text: str, known: Sequence[str], option: str) -> str:
    """The value of an option with a few names. Raises UserError for another one."""
    if text not in known:
        raise UserError(
            "unknown name",
            where=option,
            expected=f"one of {', '.join(known)}",
            found=text,
            fix=nearest(text, known) or "choose one of these",
        )
    return text


def names(text: str | None, known: Sequence[str], option: str) -> list[str]:
    """The different names of an option that takes several, by commas. Raises UserError for an unknown one, or none."""
    if text is None:
        return []
    return list(dict.fromkeys(one_of(name.strip(), known, option) for name in text.split(",")))


def words(text: str | None) -> tuple[str, ...]:
    """The different words of an option that takes several, by commas."""
    parts = (part.strip() for part in (text or "").split(","))
    return tuple(dict.fromkeys(part for part in parts if part))


def lengths(text: str, option: str = "--lengths") -> list[int]:
    """Different lengths in tokens, by commas, in the order given. Raises UserError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    fit = (re.fullmatch(r"[0-9]{1,9}", part) and 2 <= int(part) <= LONGEST for part in parts)
    if len(parts) > ENTRIES or not all(fit):
        raise UserError(
            "lengths are whole numbers of tokens",
            where=option,
            expected=f"at most {ENTRIES} numbers from 2 to {LONGEST:,}, by commas, as 1024,4096",
            found=text[:80] or "nothing",
            fix="write them without signs, spaces and separators",
        )
    return list(dict.fromkeys(int(part) for part in parts))


def device(text: str) -> str:
    """The name of a device, which need not be there. Raises UserError for what is none."""
    if not DEVICE.fullmatch(text):
        raise UserError(
            "unknown device",
            where="--device",
            expected="auto, balanced, cpu, mps, cuda or cuda:N",
            found=text,
            fix="`compress doctor` lists the devices",
        )
    return text


def recipe_file(text: str) -> str:
    """A recipe's path. Raises UserError where it cannot be one."""
    return str(given_path(text, "RECIPE"))


def model(text: str, where: str = "MODEL") -> str:
    """The name of a model, which may be a hub id.

    Raises:
        UserError: a path with nothing there, a recipe, or a run folder.
    """
    path = given_path(text, where)
    if path.suffix in RECIPES:
        raise UserError(
            "this is a recipe, not a model",
            where=text,
            expected="a folder with a model, a .gguf file or a hub id",
            fix=f"compress run {text}, and then name the `checkpoint` in its run folder",
        )
    if not (path / "config.json").is_file() and any((path / name).is_file() for name in RUN_FILES):
        inside = path / "checkpoint"
        there = (inside / "config.json").is_file()
        raise UserError(
            "this is a run folder, not a model",
            where=text,
            expected="a folder with a model, a .gguf file or a hub id",
            found="a run without a checkpoint" if not there else None,
            fix=f"did you mean `{inside}`?" if there else "`compress run` with its recipe makes one",
        )
    if path.is_file() and path.suffix not in (".gguf", ".json"):
        raise UserError(
            "a file, not a model",
            where=text,
            expected="a folder with a model, a .gguf file or a hub id",
            fix="name the folder that it lies in",
        )
    looks_like_path = text.startswith((".", "/", "~")) or text.count("/") > 1 or path.suffix in (".gguf", ".json")
    if looks_like_path and not path.exists():
        raise UserError(
            "no such model", where=text, fix="check the path; `demo/smollm2-135m` is there without any file"
        )
    return text
