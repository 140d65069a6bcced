"""`compress eval`."""

from __future__ import annotations

import typer

from compress.cli.output import AsJson, Overwrite, RecipeFile, Verbose


def evaluate(
    recipe: RecipeFile, overwrite: Overwrite = False, as_json: AsJson = False, verbose: Verbose = False
) -> None:
    """Perplexity and recall of the dense model, the plan and uniform plans of the same bytes, side by side."""
    from rich.console import Console

    from compress.cli.session import open_session
    from compress.cli.stages import evaluate_stage

    with open_session(recipe, overwrite=overwrite) as session:
        comparison = evaluate_stage(session)
    if as_json:
        typer.echo(comparison.model_dump_json(by_alias=True, indent=1))
    else:
        comparison.print(Console())
