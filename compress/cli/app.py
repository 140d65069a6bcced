"""The `compress` command: gathers the commands of this folder."""

from __future__ import annotations

from collections.abc import Callable
from inspect import cleandoc
from typing import Any

import typer

from compress import __version__
from compress.cli import (
    bench,
    doctor,
    evaluate,
    export,
    init,
    inspect,
    methods,
    prepare,
    profile,
    recipes,
    recover,
    report,
    run,
    search,
    sweep,
    upcycle,
    validate,
)
from compress.cli.output import guarded

EPILOG = "Start with: compress init demo/smollm2-135m --kv 0.5, and compress run with the recipe that it writes"

app = typer.Typer(
    name="compress",
    help="Makes Hugging Face transformers cheaper head by head, and writes a checkpoint that loads anywhere.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _help(command: Callable[..., Any]) -> str:
    """A command's docstring with each paragraph on a line of its own, which a terminal wraps at its width."""
    return "\n\n".join(" ".join(part.split()) for part in cleandoc(command.__doc__ or "").split("\n\n"))


STAGES, FILES = "The whole run, and its stages", "Files and machine"
for name, panel, command in (
    ("init", STAGES, init.init),
    ("validate", STAGES, validate.validate),
    ("run", STAGES, run.run),
    ("profile", STAGES, profile.profile),
    ("prepare", STAGES, prepare.prepare),
    ("search", STAGES, search.search),
    ("upcycle", STAGES, upcycle.upcycle),
    ("recover", STAGES, recover.recover),
    ("export", STAGES, export.export),
    ("eval", STAGES, evaluate.evaluate),
    ("sweep", STAGES, sweep.sweep),
    ("bench", STAGES, bench.bench),
    ("report", STAGES, report.report),
    ("methods", FILES, methods.methods),
    ("inspect", FILES, inspect.inspect),
    ("recipes", FILES, recipes.recipes),
    ("doctor", FILES, doctor.doctor),
):
    open_ended = {"allow_extra_args": True, "ignore_unknown_options": True} if command is init.init else None
    app.command(name, help=_help(command), rich_help_panel=panel, context_settings=open_ended)(guarded(command))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"compress {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Makes Hugging Face transformers cheaper head by head, and writes a checkpoint that loads anywhere."""


def main() -> None:
    """Entry point of the console script."""
    app()
