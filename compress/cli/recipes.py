"""`compress recipes`."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import typer

from compress.cli.output import Verbose


def recipes(verbose: Verbose = False) -> None:
    """List the recipes that come with the project, with the first sentence of each."""
    from compress.errors import UserError

    folders = [folder for folder in (Path("recipes"), Path(__file__).parents[2] / "recipes") if folder.is_dir()]
    if not folders:
        raise UserError("there is no folder `recipes`", fix="run this command inside a clone of the project")
    for path in sorted(folders[0].glob("*.yaml")):
        typer.echo(f"{path}  {first_sentence(path.read_text(encoding='utf-8', errors='replace'))}".rstrip())


def first_sentence(text: str) -> str:
    """The first sentence of the comment that a recipe begins with; nothing where it begins with none.

    A full stop ends it before a space only: the one of a file's name, or of a version, does not.
    """
    comment = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    words = " ".join(line.lstrip("#").strip() for line in comment)
    return re.split(r"(?<=\.)\s", words, maxsplit=1)[0]
