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
    """Decide what every head group becomes under the budget, and write plan.json. Needs the profile.

    Several processes share the documents that losses are measured on: torchrun -m compress search RECIPE.
    """
    with opened(recipe, settings, overwrite=overwrite, helpers=True) as session:
        from compress.stages.search import help_search, search_stage

        if session.helper:
            help_search(session)
            return
        plan = search_stage(session)
    if as_json:
        typer.echo(plan.to_json(), nl=False)
