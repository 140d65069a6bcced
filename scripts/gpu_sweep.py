"""Candidates of launch parameters, tried in processes of their own: one whose launch spoils the GPU spoils no other."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

Job = tuple[str, Any, Any]  # a kernel, what it is given, and what of its launch parameters is changed


@dataclass(frozen=True)
class Tried:
    """What became of a candidate.

    Attributes:
        value: what its function gave; None where it failed.
        wrong: why it failed.
        breaks: whether its process could go on with no other behind it.
    """

    value: Any = None
    wrong: str | None = None
    breaks: bool = False


def apart(
    work: Callable[..., Any], jobs: Sequence[Job], lists: Sequence[Sequence[int]], until: float = math.inf
) -> dict[int, Tried]:
    """Call `work(*job)` for lists of jobs, each list in a process of its own and all side by side.

    Behind a job that breaks its process, as an illegal memory access does, another process takes what is left.

    Args:
        work: a function of a module, as its processes are new.
        lists: of numbers of jobs.
        until: `time.time()` behind which no job begins.

    Returns:
        What became of each job that has begun, by its number.
    """
    context, found, left = get_context("spawn"), dict[int, Tried](), [list(numbers) for numbers in lists]
    while left := [numbers for numbers in left if numbers]:
        running = []
        for numbers in left:
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(work, jobs, numbers, until, there))
            process.start()
            there.close()  # so that it ends with the process
            running.append((process, here))
        for place, (process, here) in enumerate(running):
            told = dict(_told(here))
            process.join()
            found |= told
            rest = [number for number in left[place] if number not in told]
            late = time.time() > until  # then they may as well not have begun
            if rest and not late and not any(tried.breaks for tried in told.values()):
                found[rest.pop(0)] = Tried(wrong=f"its process ended with {process.exitcode}", breaks=True)
            left[place] = [] if late else rest
    return found


def side_by_side(work: Callable[..., Any], jobs: Sequence[Job], most: int) -> dict[int, Tried]:
    """All jobs, in up to `most` processes: for what needs compilers, and is not timed."""
    workers = max(1, min(most, torch.multiprocessing.cpu_count() - 2))
    return apart(work, jobs, [range(at, len(jobs), workers) for at in range(workers)])


def _told(here: Connection) -> list[tuple[int, Tried]]:
    """What a process says until it ends."""
    told = []
    with here:
        while True:
            try:
                told.append(here.recv())
            except EOFError:
                return told


def _run(
    work: Callable[..., Any], jobs: Sequence[Job], numbers: Sequence[int], until: float, there: Connection
) -> None:
    """Do those jobs and tell each; the last is one that breaks this process."""
    for number in numbers:
        if time.time() > until:
            return
        try:
            tried = Tried(work(*jobs[number]))
            _wait()
        except Exception as failure:  # a compiler's refusal is a result, too
            words = f"{type(failure).__name__}: {' '.join(str(failure).split())[:150]}"
            tried = Tried(wrong=words, breaks=_is_spoilt())
        there.send((number, tried))
        if tried.breaks:
            return


def _wait() -> None:
    """Wait for what is launched, so that its errors are those of the job that launched it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _is_spoilt() -> bool:
    """Whether nothing runs on the GPU any more in this process."""
    try:
        _wait()
    except RuntimeError:
        return True
    return False
