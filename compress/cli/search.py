"""`compress search`."""

from __future__ import annotations

import typer

from compress.cli.output import AsJson, Verbose
from compress.cli.recipe import Overwrite, RecipeFile, Settings, opened


def search(
    recipe: RecipeFile,
    settings: Settings = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Decide what every head group becomes under the budget, and write plan.json. Needs the profile."""
    with opened(recipe, settings, overwrite=overwrite) as session:
        from compress.stages.search import search_stage

        plan = search_stage(session)
    if as_json:
        typer.echo(plan.to_json(), nl=False)
