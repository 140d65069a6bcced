"""`compress recover`."""

from __future__ import annotations

import typer

from compress.cli.output import Verbose
from compress.cli.recipe import Overwrite, RecipeFile, Settings, opened
from compress.errors import UserError


def recover(
    recipe: RecipeFile, settings: Settings = None, overwrite: Overwrite = False, verbose: Verbose = False
) -> None:
    """Train the plan's model as `recover:` in the recipe says. Needs the plan. Prints the folder of the weights.

    An interrupted training goes on where it was saved. For several processes: torchrun -m compress recover RECIPE.
    """
    with opened(recipe, settings, overwrite=overwrite, helpers=True) as session:
        from compress.stages.processes import check_launch
        from compress.stages.recover import recover_stage

        check_launch(session.recipe, session.run.path, "recover")
        folder = recover_stage(session)
        if folder is None:
            raise UserError(
                "the recipe does not say how to recover",
                where=recipe,
                expected="a section `recover:`, for instance `recover: {steps: 1000}`",
            )
        if not session.helper:
            typer.echo(str(folder))
