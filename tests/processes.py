"""Starts Python processes for tests: forks of `tests/zygote.py`, which need no seconds to import torch.

Where importing torch starts threads, as the libraries beside it do on some machines, every process is a fresh one.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Read when libraries load: with more than one thread a fork of them would not be safe.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@functools.cache
def zygote() -> socket.socket | None:
    """The way to ask the zygote of this test process, which is started the first time and ends with it.

    None where it cannot be forked safely; its standard error says why.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    command = [sys.executable, "-P", str(Path(__file__).with_name("zygote.py")), str(theirs.fileno())]
    environment = {**os.environ, **ONE_THREAD}
    environment.pop("PYTHONPATH", None)
    # In a session of its own: a Ctrl-C is for pytest, whose end it notices.
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, env=environment, pass_fds=[theirs.fileno()], start_new_session=True
    )
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait(timeout=30)

    atexit.register(end)
    return ours if ours.recv(1) else None


# What a process that runs the toolkit imports, a half of what a short training takes.
TOOLKIT = "compress.cli.app compress.evaluate.compare compress.export.export compress.train.recovery tests.train.common"


@functools.cache
def toolkit() -> socket.socket | None:
    """The way to ask a fork of the zygote that has imported the toolkit, too; as `zygote` where that is not safe."""
    parent = zygote()
    if parent is None:
        return None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    here = {"arguments": [""], "folder": str(ROOT), "environment": dict(os.environ), "path": [str(ROOT)]}
    running = Forked(parent, {"run": ("zygote", TOOLKIT), **here}, theirs)
    theirs.close()
    if not ours.recv(1):
        print(running.done(30).stderr, file=sys.stderr)
        return parent

    def end() -> None:  # before that of `zygote`, which waits for it
        ours.close()
        running.stdout.close()

    atexit.register(end)
    return ours


class Fresh:
    """A running process of its own, with the face of `Forked`."""

    def __init__(self, command: list[str], cwd: Path, env: dict[str, str]) -> None:
        self._command = command
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
        )
        assert self._process.stdout is not None
        self.pid, self.stdout = self._process.pid, self._process.stdout

    def done(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """As `Forked.done`."""
        try:
            out, err = self._process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            raise
        return subprocess.CompletedProcess(self._command, self._process.returncode, out, err)


class Forked:
    """A running child of the zygote: `pid`, and what it prints, `stdout`."""

    def __init__(self, zygote: socket.socket, order: dict[str, Any], *more: socket.socket) -> None:
        self._words = order["arguments"]
        pipes = [os.pipe() for _ in range(3)]
        given = [*(write for _, write in pipes), *(each.fileno() for each in more)]
        socket.send_fds(zygote, [json.dumps(order).encode() + b"\n"], given)
        for _, write in pipes:
            os.close(write)
        self.stdout, self._stderr, self._status = (os.fdopen(read, encoding="utf-8") for read, _ in pipes)
        self.pid = int(self._status.readline())

    def done(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """What it still printed, what it told, and its exit status, once it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not after so many seconds, and was killed.
        """
        streams = (self.stdout, self._stderr, self._status)
        with ThreadPoolExecutor(3) as pool:
            parts = [pool.submit(stream.read) for stream in streams]
            try:
                out, err, status = (part.result(timeout) for part in parts)
            except Late:
                os.kill(self.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired("a child of the zygote", timeout) from None
        for stream in streams:
            stream.close()
        return subprocess.CompletedProcess(self._words, int(status), out, err)


Process = Forked | Fresh


def start(
    what: str,
    name: str,
    *arguments: object,
    cwd: Path = ROOT,
    env: dict[str, str] | None = None,
    parent: Callable[[], socket.socket | None] | None = None,
) -> Process:
    """Start `python -m NAME` (where `what` is module), `python -c NAME` (code) or `python -P NAME` (file).

    `cwd` is the folder that it runs in, `env` its environment; None stands for this process's. `parent` is whom to ask
    for it: `zygote`, or `toolkit` for what imports the toolkit anyway.
    """
    environment = dict(os.environ) if env is None else env
    local = [] if what == "file" else [str(cwd)]
    path = [*local, *(entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry)]
    words = ["-c" if what == "code" else name, *map(str, arguments)]
    asked = (parent or zygote)()
    if asked is None:
        flags = {"code": ["-c"], "module": ["-m"], "file": ["-P"]}[what]
        command = [sys.executable, *flags, name, *map(str, arguments)]
        return Fresh(command, cwd, {**environment, "PYTHONPATH": os.pathsep.join(path)})
    order: dict[str, Any] = {
        "run": (what, name),
        "arguments": words,
        "folder": str(cwd),
        "environment": environment,
        "path": path,
    }
    return Forked(asked, order)


def run(
    what: str,
    name: str,
    *arguments: object,
    cwd: Path = ROOT,
    env: dict[str, str] | None = None,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """As `start`, to its end."""
    return start(what, name, *arguments, cwd=cwd, env=env).done(timeout)


def spawn(function: Callable[..., None], arguments: tuple[object, ...], nprocs: int) -> None:
    """Call a function of a test module in several processes at once: with its rank, and then what is given.

    Arguments are written as Python writes them, so they are strings, numbers and the like.
    """
    call = f"from {function.__module__} import {function.__name__} as call; call({{}}, *{arguments!r})"
    children = [start("code", call.format(rank), parent=toolkit) for rank in range(nprocs)]
    ended = [child.done(240) for child in children]
    assert not any(child.returncode for child in ended), "\n".join(child.stderr for child in ended)


def launch(name: str, *arguments: object, count: int, timeout: float = 240) -> list[subprocess.CompletedProcess[str]]:
    """`python -m NAME` in several processes that train together, with the environment that `torchrun` gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    place |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    children = [
        start("module", name, *arguments, env={**os.environ, **place, **rank}, parent=toolkit) for rank in ranks
    ]
    return [child.done(timeout) for child in children]


def run_fresh(
    script: Path, arguments: Sequence[str], environment: dict[str, str], folder: Path
) -> subprocess.CompletedProcess[str]:
    """In place of `compress.export.verify.run_fresh`."""
    return run("file", str(script), *arguments, cwd=folder, env=environment)
