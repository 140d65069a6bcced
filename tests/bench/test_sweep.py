"""Candidates in processes of their own: one that breaks its process is told, and the others run."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest

from scripts import gpu_sweep
from scripts.gpu_sweep import Tried, apart, side_by_side

SPOILT: list[bool] = []  # of this process


def work(what: str, given: int, change: int) -> int:
    if what == "refused":
        raise ValueError("too many\n registers")
    if what == "ends":
        os._exit(3)
    if what == "spoils":
        SPOILT.append(True)
    return given * change + len(SPOILT)


def wait() -> None:
    if SPOILT:
        raise RuntimeError("an illegal memory access")


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that need not import anything, and a GPU of each on which nothing runs after what spoils it."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(gpu_sweep, "get_context", lambda _: fork)
    monkeypatch.setattr(gpu_sweep, "_wait", wait)


def test_what_breaks_its_process_is_told_and_the_others_run() -> None:
    names = ("fine", "refused", "ends", "fine", "spoils", "ends", "fine", "fine")
    jobs = [(name, number, 10) for number, name in enumerate(names)]
    found = apart(work, jobs, [[0, 1, 2, 3, 4, 5, 6], [7]])
    refused, ended = Tried(wrong="ValueError: too many registers"), Tried(wrong="its process ended with 3", breaks=True)
    spoilt = Tried(wrong="RuntimeError: an illegal memory access", breaks=True)
    assert [found[number] for number in range(8)] == [
        Tried(0), refused, ended, Tried(30), spoilt, ended, Tried(60), Tried(70)
    ]  # fmt: skip
    assert side_by_side(work, jobs, 3) == found


def test_nothing_begins_behind_the_end() -> None:
    assert apart(work, [("fine", 1, 1)], [[0]], time.time() - 1) == {}
