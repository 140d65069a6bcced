"""What the commands print: results to stdout, everything for humans to stderr; and how they end."""

from __future__ import annotations

import errno
import functools
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from compress.errors import UserError
from compress.files import system_error, words_of
from compress.stages.processes import is_helper
from compress.stages.reporter import Progress as Report

Command = TypeVar("Command", bound=Callable[..., Any])

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the traceback of an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
ENDING = tuple(signal.Signals[name] for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
DEFECT = "this is a bug in compress"  # what begins the sentence of a foreign exception
QUIET_SECONDS = 20.0  # between two progress lines where there is no terminal


def humans() -> Console:
    """The console for humans, on stderr."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """One line for humans, exactly as it is; of several processes only the main one speaks."""
    if not is_helper():
        typer.echo(line, err=True)


def guarded(command: Command) -> Command:
    """Wraps a command so that it ends orderly: 0, 1 with a sentence, 2 for a user's mistake, 130 for an interrupt.

    SIGTERM and SIGHUP interrupt as Ctrl-C does. A traceback is shown with `--verbose` only.
    """

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        verbose = bool(options.get("verbose"))
        try:
            with _signals():
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
            say(f"\ninterrupted; finished work is saved. {_again(options)}")
            raise typer.Exit(130) from None
        except BrokenPipeError:  # who read the output has enough of it; click ends with 1
            raise
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:
            _show(verbose)
            typer.echo(_sentence_for(error, options), err=True)
            refused = system_error(error)
            raise typer.Exit(1 if refused is None or refused.errno == errno.ENOMEM else 2) from None

    return run  # type: ignore[return-value]


@contextmanager
def _signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does, so that the command can clean up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    changed = [number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL]  # nohup's is left alone
    for number in changed:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


def _sentence_for(error: Exception, options: dict[str, Any]) -> str:
    """A sentence for an exception that no part of the project expected."""
    refused = system_error(error)
    if refused is not None:
        refused_because, fix = words_of(refused)
        names = [os.fspath(name) for name in (refused.filename, refused.filename2) if isinstance(name, str | bytes)]
        return f"{os.fsdecode(names[0]) if names else 'the system'}: {refused_because}; {fix}. {_again(options)}"
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "not enough memory" in text or "out of memory" in text:
        return f"there is not enough memory; use a smaller model, shorter lengths or another device ({text[:200]})"
    return (
        f"{DEFECT}: {type(error).__name__}: {text[:300]}\n"
        "  do       report it with the traceback, which the same command prints with --verbose"
    )


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


class Terminal:
    """The reporter of the commands: lines and progress bars on stderr."""

    def say(self, line: str) -> None:
        """`say`."""
        say(line)

    def progress(self, title: str) -> AbstractContextManager[Report]:
        """`progress`."""
        return progress(title)
