"""`compress profile`."""

from __future__ import annotations

from compress.cli.output import Fresh, Overwrite, RecipeFile, Verbose


def profile(recipe: RecipeFile, overwrite: Overwrite = False, fresh: Fresh = False, verbose: Verbose = False) -> None:
    """Measure what every head group does, on calibration documents. Goes on where it was interrupted."""
    from compress.cli.session import open_session
    from compress.cli.stages import profile_stage

    with open_session(recipe, overwrite=overwrite, fresh=fresh) as session:
        profile_stage(session)
