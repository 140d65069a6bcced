"""`compress export`."""

from __future__ import annotations

import typer

from compress.cli.output import Verbose
from compress.cli.recipe import Overwrite, RecipeFile, Settings, opened


def export(
    recipe: RecipeFile, settings: Settings = None, overwrite: Overwrite = False, verbose: Verbose = False
) -> None:
    """Write the checkpoint of the plan, and prove that it loads and answers without compress. Prints its path."""
    with opened(recipe, settings, overwrite=overwrite) as session:
        from compress.stages.export import export_stage

        checkpoint = export_stage(session, overwrite=overwrite)
    typer.echo(str(checkpoint))
