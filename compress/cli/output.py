"""What the commands print: results to stdout, everything for humans to stderr; and how they end."""

from __future__ import annotations

import errno
import functools
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from compress.cli.processes import is_helper
from compress.errors import UserError

Command = TypeVar("Command", bound=Callable[..., Any])
Report = Callable[[int, int, str], None]  # done, in all, what

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the traceback of an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Write into an output folder that holds something else.", rich_help_panel="Danger"
    ),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Throw away what is done and start again.", rich_help_panel="Danger")
]

QUIET_SECONDS = 20.0  # between two progress lines where there is no terminal


def humans() -> Console:
    """The console for humans, on stderr."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """One line for humans, exactly as it is; of several processes only the main one speaks."""
    if not is_helper():
        typer.echo(line, err=True)


def guarded(command: Command) -> Command:
    """Wraps a command so that a user's mistake ends with 2 and a clear message, and an interrupt with 130.

    A traceback is shown with `--verbose` only; an unforeseen exception is a defect and shows its own.
    """

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        verbose = bool(options.get("verbose"))
        try:
            return command(*args, **options)
        except UserError as error:
            _show(verbose)
            count = len(error.problems)
            typer.echo(str(error), err=True)  # of a helper, too: what went wrong may be its own
            if count > 1:
                say(f"{count} problems")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            _show(verbose)
            say(f"\ninterrupted; what is done is kept. {_again(options)}")
            raise typer.Exit(130) from None
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            _show(verbose)
            say(f"{error.filename or 'writing'}: the disk is full; free some space. {_again(options)}")
            raise typer.Exit(2) from None

    return run  # type: ignore[return-value]


def _show(verbose: bool) -> None:
    if verbose:
        say(traceback.format_exc())


def _again(options: dict[str, Any]) -> str:
    return "The same command goes on from there." if "recipe" in options else "Run the same command again."


@contextmanager
def progress(title: str) -> Iterator[Report]:
    """A bar on a terminal, a line now and then elsewhere; yields what stages call with (done, in all, what)."""
    console = humans()
    if is_helper():
        yield lambda done, total, what: None
        return
    if not console.is_terminal:
        yield _lines(title)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[what]}"),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task(title, total=None, what="")
        yield lambda done, total, what: bars.update(bar, completed=done, total=total, what=what)


def _lines(title: str) -> Report:
    """Progress as lines: the first, the last, and one every 20 seconds."""
    last = [0.0]

    def report(done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if now - last[0] >= QUIET_SECONDS:
            last[0] = now
            say(f"  {title}: {done}/{total} {what}".rstrip())

    return report


def size(count: int | float) -> str:
    """Bytes for people, in powers of 1024."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"
