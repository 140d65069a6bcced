"""`compress export`."""

from __future__ import annotations

import typer

from compress.cli.output import Overwrite, RecipeFile, Verbose


def export(recipe: RecipeFile, overwrite: Overwrite = False, verbose: Verbose = False) -> None:
    """Write the checkpoint of the plan, and prove that it loads and answers without compress. Prints its path."""
    from compress.cli.session import open_session
    from compress.cli.stages import export_stage

    with open_session(recipe, overwrite=overwrite) as session:
        checkpoint = export_stage(session, overwrite=overwrite)
    typer.echo(str(checkpoint))
