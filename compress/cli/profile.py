"""`compress profile`."""

from __future__ import annotations

from compress.cli.output import Verbose
from compress.cli.recipe import Fresh, Overwrite, RecipeFile, Settings, opened


def profile(
    recipe: RecipeFile,
    settings: Settings = None,
    overwrite: Overwrite = False,
    fresh: Fresh = False,
    verbose: Verbose = False,
) -> None:
    """Measure what every head group does, on calibration documents. Goes on where it was interrupted.

    Several processes share the documents: torchrun -m compress profile RECIPE.
    """
    with opened(recipe, settings, overwrite=overwrite, fresh=fresh, helpers=True) as session:
        from compress.stages.processes import check_launch
        from compress.stages.profile import profile_stage

        check_launch(session.recipe, session.run.path, "profile")
        profile_stage(session)
