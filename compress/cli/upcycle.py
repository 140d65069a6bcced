"""`compress upcycle`."""

from __future__ import annotations

import typer

from compress.cli.output import AsJson, Verbose
from compress.cli.recipe import Overwrite, RecipeFile, Settings, opened
from compress.errors import UserError


def upcycle(
    recipe: RecipeFile,
    settings: Settings = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Make one model of several of one shape, as `upcycle:` in the recipe says, and write plan.json.

    Attentions and MLPs of all lie side by side, and routers mix or choose them for every token (BAM). This adds cost:
    parameters, FLOPs and cache, which the command prints. `compress recover`, export and eval go on from there.
    """
    with opened(recipe, settings, overwrite=overwrite) as session:
        from compress.stages.upcycle import upcycle_stage

        if session.recipe.upcycle is None:
            raise UserError(
                "the recipe does not say which models become one",
                where=recipe,
                expected="a section `upcycle:`, for instance `upcycle: {experts: [MODEL, MODEL]}`",
            )
        plan = upcycle_stage(session)
        place = session.run.plan
    typer.echo(plan.to_json() if as_json else str(place), nl=not as_json)
