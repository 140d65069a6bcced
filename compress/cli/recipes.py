"""`compress recipes`."""

from __future__ import annotations

from pathlib import Path

import typer

from compress.cli.output import Verbose


def recipes(verbose: Verbose = False) -> None:
    """List the recipes that come with the project, with their first line."""
    from compress.errors import UserError

    folders = [folder for folder in (Path("recipes"), Path(__file__).parents[2] / "recipes") if folder.is_dir()]
    if not folders:
        raise UserError("there is no folder `recipes`", fix="run this command inside a clone of the project")
    for path in sorted(folders[0].glob("*.yaml")):
        first = path.read_text(encoding="utf-8", errors="replace").split("\n", 1)[0]
        typer.echo(f"{path}  {first.removeprefix('#').strip() if first.startswith('#') else ''}".rstrip())
