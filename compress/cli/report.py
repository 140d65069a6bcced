"""`compress report`: one HTML page from the folders that other commands wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compress.cli.output import Verbose, say, size


def report(
    folders: Annotated[
        list[str], typer.Argument(metavar="FOLDER...", help="Run, eval or bench folders, side by side.")
    ],
    out: Annotated[str | None, typer.Option(help="The page; report.html in the first folder by default.")] = None,
    verbose: Verbose = False,
) -> None:
    """Write what was measured as one page without outside resources, which can be mailed."""
    path = Path(out).expanduser() if out else Path(folders[0]).expanduser() / "report.html"
    write_report([Path(folder).expanduser() for folder in folders], path)
    typer.echo(str(path))


def write_report(folders: list[Path], path: Path) -> None:
    """The page of these folders at `path`."""
    from datetime import date

    from compress import __version__
    from compress.files import write_text
    from compress.report.facts import read_facts
    from compress.report.page import render

    facts = [read_facts(folder) for folder in folders]
    page = render(facts, date.today().isoformat(), __version__)
    write_text(path, page)
    say(f"report: {len(facts)} folder(s), {size(len(page.encode()))}")
