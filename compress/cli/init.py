"""`compress init`: a recipe for a model, with every default spelled out and explained."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated

import typer

from compress.cli import arguments
from compress.cli.output import Verbose, say
from compress.cli.recipe import Settings
from compress.errors import UserError


def init(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="demo/smollm2-135m, a hub id, a folder or a .gguf file")
    ],
    kv: Annotated[str | None, typer.Option(metavar="SHARE", help="Share of the KV cache's bytes to keep.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Input lengths in tokens, by commas; chosen by default.")] = None,
    settings: Settings = None,
    output: Annotated[str | None, typer.Option(help="The run folder; runs/MODEL by default.")] = None,
    out: Annotated[str | None, typer.Option(help="The recipe; MODEL.yaml by default.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file of that name.")] = False,
    verbose: Verbose = False,
) -> None:
    """Write a recipe for a model, with every default spelled out and a word on each.

    The budget is half of the KV cache unless another is given: --kv 0.25, or any kind that `compress methods
    budget_kinds` lists, as --parameters 0.8. Several kinds hold together. With --set 'upcycle={experts: [ONE, TWO]}' it
    is a recipe that makes several models one, which has no budget.
    """
    name = re.sub(r"[^\w.-]+", "-", Path(arguments.model(model)).stem or "model").strip("-")
    file = arguments.given_path(out or f"{name}.yaml", "--out")
    if file.is_dir():
        raise UserError("the recipe is a folder", where=str(file), expected="the name of a file", fix="--out NAME.yaml")
    if file.exists() and not overwrite:
        raise UserError("there is a file of that name", where=str(file), fix="--out NAME.yaml, or --overwrite")
    budget = ([] if kv is None else [("--kv", f"kv={kv}")]) + _others(context.args)
    given = {f"model={model}": "MODEL", f"output={output or f'runs/{name}'}": "--output"}
    if not budget and not any(setting.strip().startswith("upcycle") for setting in settings or ()):
        budget = [("--kv", "kv=0.5")]
    given |= {f"search.budget.{setting}": option for option, setting in budget}
    if lengths is not None:
        given[f"search.budget.lengths={arguments.lengths(lengths)}"] = "--lengths"
    command = " ".join(["compress init", *map(shlex.quote, _words(context, model))])
    from compress.recipe.load import read_settings

    recipe = read_settings([*given, *(settings or ())], given)
    from compress.recipe.write import explained  # imports torch, as reading the recipe has

    arguments.make_folder(file.parent)
    file.write_text(explained(recipe, command), encoding="utf-8")
    typer.echo(str(file))
    say(f"next: compress validate {file}, which says how long a run takes here, and: compress run {file}")


def _others(words: list[str]) -> list[tuple[str, str]]:
    """`--KIND VALUE` or `--KIND=VALUE` of other kinds of budget: each option with its setting."""
    settings: list[tuple[str, str]] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, sign, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name or (not sign and not rest):
            raise UserError("not an option", where=word, expected="a kind of budget and its value, as --parameters 0.8")
        settings.append((f"--{name}", f"{name.replace('-', '_')}={value if sign else rest.pop(0)}"))
    return settings


def _words(context: typer.Context, model: str) -> list[str]:
    """The command's words, options that were given only."""
    words = [model]
    for option, value in context.params.items():
        if option in ("model", "overwrite", "verbose") or value in (None, [], ()):
            continue
        for item in value if isinstance(value, list | tuple) else [value]:
            words += [f"--{'set' if option == 'settings' else option}", str(item)]
    return words + list(context.args)
