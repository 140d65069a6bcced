"""`compress methods`: what a recipe may name."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from compress.cli.output import AsJson, Verbose


def methods(
    kind: Annotated[
        str | None,
        typer.Argument(metavar="KIND", help="statistics, solvers, targets, tasks, ..., or the name of a method."),
    ] = None,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One of that kind.")] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """List what is registered: all kinds, the methods of one kind, or one method with its keys and its source."""
    from compress.recipe.catalogue import entries, names, place_of

    if kind is None:
        if as_json:
            typer.echo(json.dumps(names(), indent=1))
            return
        for plural, known in names().items():
            typer.echo(f"{plural:<14}{', '.join(known)}")
        typer.echo(
            "\ncompress methods KIND describes every method of a kind; compress methods KIND NAME lists the keys of one"
        )
        return
    kind, name = place_of(kind, name)
    shown = [one for one in entries(kind) if name in (None, one.name)]
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in shown], indent=1))
        return
    if name is None:
        width = max((len(one.name) for one in shown), default=0) + 2
        for one in shown:
            others = [source for source in one.sources if source not in one.line]
            typer.echo(f"{one.name:<{width}}{one.line}" + (f" ({', '.join(others)})" if others else ""))
        return
    for one in shown:
        typer.echo(f"{one.name}: {one.text}")
        for key in one.parameters:
            typer.echo(f"\n  {key.name}: {key.kind}, {_default(key.default)}")
            typer.echo(f"    {key.description}")
        if one.sources:
            typer.echo(f"\nsource: {', '.join(one.sources)}")


def _default(default: str) -> str:
    return default if default == "required" else f"default {default}"
