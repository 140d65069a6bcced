"""What the commands on a recipe share: their options, and the run folder that they open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli import arguments
from compress.cli.output import Terminal
from compress.recipe.load import load_recipe
from compress.stages.processes import is_helper

if TYPE_CHECKING:
    from compress.recipe.schema import Recipe
    from compress.stages.session import Session

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Write into an output folder that holds something else.",
        rich_help_panel="Danger",
    ),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Delete earlier results and start again.", rich_help_panel="Danger")
]


Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one key of the recipe, as search.budget.kv=0.25; may be repeated.",
    ),
]


def read_recipe(file: str, settings: list[str] | None = None) -> Recipe:
    """The recipe of a command, with what `--set` changes. Raises UserError for a wrong one."""
    return load_recipe(arguments.recipe_file(file), settings or ())


@contextmanager
def opened(
    file: str, settings: list[str] | None = None, *, overwrite: bool = False, fresh: bool = False, helpers: bool = False
) -> Iterator[Session]:
    """The session of a command on a recipe, which holds its run folder.

    Args:
        helpers: whether the command has work for helpers of a launch, which get a session without holding the folder;
            in other commands they end here.

    Raises:
        UserError: a wrong recipe, or a folder that cannot be used (see `open_run`).
    """
    helper = is_helper()
    if helper and not helpers:
        raise typer.Exit()
    recipe = read_recipe(file, settings)
    from compress.stages.session import open_session  # imports torch, as reading the recipe has

    with open_session(recipe, Terminal(), overwrite=overwrite, fresh=fresh, helper=helper, helpers=helpers) as session:
        yield session
