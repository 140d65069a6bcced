"""`compress sweep`: a grid of recipes, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from compress.cli import arguments
from compress.cli.output import AsJson, Terminal, Verbose, say
from compress.cli.recipe import RecipeFile


def sweep(
    recipe: RecipeFile,
    values: Annotated[
        list[str],
        typer.Option("--set", metavar="KEY=V1,V2", help="A key by dots and its values, as YAML. Repeatable."),
    ],
    out: Annotated[str | None, typer.Option(help="The folder; the recipe's output with -sweep by default.")] = None,
    export: Annotated[bool, typer.Option("--export", help="Write checkpoints, too.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Run a recipe with every combination of some values, and show what each kept and lost side by side.

    Every combination has a run folder below the sweep's, and a recipe that runs alone. What several of them need
    (documents, a profile, the dense model's figures) is done once. Interrupted, the same command goes on; a
    combination that cannot be run is listed at the end. Writes report.html, cells.csv and cells.json.
    """
    from compress.recipe.grid import axes_of, grid

    axes = axes_of(values)
    given = None if out is None else str(arguments.out_folder(out))
    folder, points = grid(Path(arguments.recipe_file(recipe)), axes, given)
    arguments.make_folder(folder)
    from compress.cli.report import write_cells, write_report
    from compress.stages.sweep import run_grid

    done, failed = run_grid(points, folder, Terminal(), export=export)
    folders = [run.path for run in done]
    if folders:
        write_report(folders, folder / "report.html")
        settings = {point.name: dict(point.settings) for point in points}
        for kind in ("csv", "json"):
            write_cells(folders, folder / f"cells.{kind}", settings)
        _show(folder, folders, as_json)
    say(f"sweep: {len(done)} of {len(points)} done" + (f"; {folder / 'report.html'}" if folders else ""))
    if failed:
        say(f"sweep: not done: {', '.join(failed)}; the reasons are above, and the same command tries these again")
        raise typer.Exit(2)


def _show(folder: Path, folders: list[Path], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(json.loads((folder / "cells.json").read_text(encoding="utf-8")), indent=1))
        return
    from compress.cli.tables import show
    from compress.evaluate.tables import tables
    from compress.report.facts import read_facts
    from compress.report.together import side_by_side

    facts = [read_facts(path) for path in folders]
    together = side_by_side(facts)
    alone = [grid for folder in facts if folder.comparison is not None for grid in tables(folder.comparison)]
    for table in [together] if together is not None else alone:
        show(table)
