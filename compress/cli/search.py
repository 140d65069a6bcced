"""`compress search`."""

from __future__ import annotations

import typer

from compress.cli.output import AsJson, Overwrite, RecipeFile, Verbose


def search(recipe: RecipeFile, overwrite: Overwrite = False, as_json: AsJson = False, verbose: Verbose = False) -> None:
    """Decide what every head group becomes under the budget, and write plan.json. Needs the profile."""
    from compress.cli.session import open_session
    from compress.cli.stages import search_stage

    with open_session(recipe, overwrite=overwrite) as session:
        plan = search_stage(session)
    if as_json:
        typer.echo(plan.to_json(), nl=False)
