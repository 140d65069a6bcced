"""`compress report`: one HTML page from the folders that other commands wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from compress.cli import arguments
from compress.cli.output import Verbose, say
from compress.errors import UserError
from compress.words import counted, size


def report(
    folders: Annotated[
        list[str], typer.Argument(metavar="FOLDER...", help="Run, eval or bench folders, side by side.")
    ],
    out: Annotated[str | None, typer.Option(help="The page; report.html in the first folder by default.")] = None,
    plots: Annotated[
        str | None, typer.Option(help="A folder for spans and quality as SVG and PNG, all folders side by side.")
    ] = None,
    cells: Annotated[str | None, typer.Option(help="A .csv or .json file for every number of the evaluations.")] = None,
    verbose: Verbose = False,
) -> None:
    """Write what was measured as one page without outside resources, which can be mailed."""
    given = [_folder(folder) for folder in folders]
    path = arguments.given_path(out, "--out") if out is not None else given[0] / "report.html"
    if path.is_dir():
        raise UserError(
            "the page is a folder", where=str(path), expected="the name of a file", fix=f"--out {path}/report.html"
        )
    table = None if cells is None else arguments.given_path(cells, "--cells")
    if table is not None and table.suffix not in (".csv", ".json"):
        raise UserError(
            "of unknown form", where="--cells", expected="a name that ends with .csv or .json", found=str(cells)
        )
    drawn = None if plots is None else arguments.out_folder(plots, "--plots")
    arguments.make_folder(path.parent)
    write_report(given, path)
    typer.echo(str(path))
    if table is not None:
        arguments.make_folder(table.parent)
        write_cells(given, table)
        typer.echo(str(table))
    if drawn is not None:
        arguments.make_folder(drawn)
        for file in draw_plots(given, drawn):
            typer.echo(str(file))


def _folder(text: str) -> Path:
    """A folder to show. Raises UserError where there is none."""
    path = arguments.given_path(text, "FOLDER")
    if not path.is_dir():
        raise UserError(
            "no such folder",
            where=text,
            expected="a run folder, or a folder that `compress eval` or `compress bench --out` wrote",
            found="a file" if path.exists() else "nothing",
            fix="compress run RECIPE makes one; compress eval MODEL --tasks ... makes another",
        )
    return path


def draw_plots(folders: list[Path], out: Path) -> list[Path]:
    """The plots of these folders in `out`; the files. Raises UserError where there is nothing to draw."""
    from compress.report.facts import read_facts
    from compress.report.plots import plots_side_by_side

    return plots_side_by_side([read_facts(folder) for folder in folders], out)


def write_cells(folders: list[Path], path: Path, settings: dict[str, dict[str, Any]] | None = None) -> None:
    """Every number of the evaluations in these folders as CSV or JSON, by the name's ending.

    Args:
        settings: by folder's name, keys of its recipe that get a column each.
    """
    import csv
    import io
    import json

    from compress.files import write_text
    from compress.report.facts import read_facts

    facts = [read_facts(folder) for folder in folders]
    records = [
        {"folder": folder.name, **(settings or {}).get(folder.name, {}), **record}
        for folder in facts
        if folder.comparison is not None
        for record in folder.comparison.records()
    ]
    if not records:
        raise UserError(
            "no evaluation in these folders", where=", ".join(map(str, folders)), fix="compress eval RECIPE"
        )
    if path.suffix == ".json":
        write_text(path, json.dumps(records, indent=1) + "\n")
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_text(path, text.getvalue())


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
    say(f"report: {counted(len(facts), 'folder')}, {size(len(page.encode()))}")
