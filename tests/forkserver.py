"""Runs functions in forked children of a process that has imported all that is slow, each with limits of its own."""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).parents[1]
PRELOAD = ("torch", "transformers", "safetensors.torch", "compress.cli.app", "compress.recipe.read")


@dataclass(frozen=True)
class Outcome:
    """How a child ended.

    Attributes:
        code: its exit code; the negative number of the signal that ended it, as in `subprocess`.
        stdout, stderr: all that it and its own children printed, as text.
        maxrss: its largest resident memory in bytes, with what it shares with the server.
        seconds: wall clock.
        timed_out: it was killed because its time was over.
    """

    code: int
    stdout: str
    stderr: str
    maxrss: int
    seconds: float
    timed_out: bool = False


class ForkServer:
    """A process that forks a child for every call. A context manager.

    Args:
        preload: modules that the server imports once.
        fresh: start the server as a new interpreter; else it is forked from this process, with all that is imported
            here already, which costs no time. Functions are found by their module's name either way.
    """

    def __init__(self, preload: Sequence[str] = PRELOAD, *, fresh: bool = False) -> None:
        self._connection, theirs = Pipe()
        if fresh:
            code = f"from tests.forkserver import serve_at; serve_at({theirs.fileno()}, {tuple(preload)!r})"
            environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
            command = [sys.executable, "-c", code]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=ROOT, env=environment)
            self._wait: Callable[[], Any] = process.wait
        else:
            sys.stdout.flush()
            sys.stderr.flush()
            pid = os.fork()
            if pid == 0:
                self._connection.close()
                _serve(theirs, preload)
            self._wait = lambda: os.waitpid(pid, 0)
        theirs.close()

    def run(
        self, function: Callable[..., Any], *args: Any, timeout: float = 20.0, memory_limit: int = 2 << 30
    ) -> Outcome:
        """Call a function of a module in a child of its own; what it returns, if a whole number, is the exit code.

        Args:
            timeout: seconds of wall clock, after which the child and all that it started are killed.
            memory_limit: bytes of address space that it may take on top of the server's.
        """
        self._connection.send((function, args, timeout, memory_limit))
        outcome: Outcome = self._connection.recv()
        return outcome

    def close(self) -> None:
        """End the server."""
        self._connection.close()
        self._wait()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve_at(handle: int, preload: Sequence[str]) -> None:
    """Serve on an open file descriptor: what a fresh interpreter runs."""
    _serve(Connection(handle), preload)


def _serve(connection: Connection, preload: Sequence[str]) -> None:
    """Import, then fork a child for every request until the other end closes. Does not return."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at the terminal is the caller's to handle
    sys.path.insert(0, str(ROOT))
    for name in preload:
        importlib.import_module(name)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    while True:
        try:
            function, args, timeout, memory_limit = connection.recv()
        except EOFError:
            os._exit(0)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            pid = os.fork()
            if pid == 0:
                connection.close()
                _child(function, args, memory_limit, out, err)
            connection.send(_watch(pid, timeout, out, err))


def _child(function: Callable[..., Any], args: Sequence[Any], memory_limit: int, out: BinaryIO, err: BinaryIO) -> None:
    """Call the function as the main program of a new process. Does not return."""
    os.setsid()
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory_limit
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    code = 1
    try:
        result = function(*args)
        code = result if isinstance(result, int) else 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _watch(pid: int, timeout: float, out: BinaryIO, err: BinaryIO) -> Outcome:
    """Wait for a child, kill it when its time is over, and end what it left running."""
    started = time.monotonic()
    timed_out = False
    pause = 0.001
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if not timed_out and time.monotonic() - started > timeout:
            timed_out = True
            os.kill(pid, signal.SIGKILL)
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    _kill_group(pid)
    texts = []
    for stream in (out, err):
        stream.seek(0)
        texts.append(stream.read().decode("utf-8", "replace"))
    code = os.waitstatus_to_exitcode(status)
    return Outcome(code, texts[0], texts[1], usage.ru_maxrss * 1024, time.monotonic() - started, timed_out)


def _kill_group(leader: int) -> None:
    """Kill what a child left running; there may be nothing."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
