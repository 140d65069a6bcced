"""`compress prepare`."""

from __future__ import annotations

import typer

from compress.cli.output import Verbose
from compress.cli.recipe import Overwrite, RecipeFile, Settings, opened
from compress.errors import UserError


def prepare(
    recipe: RecipeFile, settings: Settings = None, overwrite: Overwrite = False, verbose: Verbose = False
) -> None:
    """Train targets that cannot be priced untrained, as `prepare:` in the recipe says. Prints the folder with them.

    An interrupted training goes on where it was saved. For several processes: torchrun -m compress prepare RECIPE.
    """
    with opened(recipe, settings, overwrite=overwrite, helpers=True) as session:
        from compress.stages.prepare import prepare_stage

        if session.recipe.prepare is None:
            raise UserError(
                "the recipe does not say what to prepare",
                where=recipe,
                expected="a section `prepare:` with `targets`, for targets that have to be trained before the search",
            )
        prepare_stage(session)
        if not session.helper:
            typer.echo(str(session.run.path / "options"))
