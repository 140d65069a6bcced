"""Runs that are killed, terminated and interrupted at their writes end where an unbroken run does (`kills.py`)."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forkserver import ForkServer
from tests.kills import PRELOAD, SIGNALS, Bed, chain, differences, left_overs, points


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer(PRELOAD) as running:
        yield running


@pytest.mark.parametrize("kind", ["span", "prune", "recover"])
def test_a_run_that_is_ended_again_and_again(tmp_path: Path, server: ForkServer, kind: str) -> None:
    """One run, ended once by every signal, a training twice; `scripts/kill_sweep.py` ends one at each of its writes."""
    bed = Bed(tmp_path / kind, kind, server, plots=False, timeout=300)
    wanted, writes = bed.whole()
    assert wanted["stages.json"].keys() >= {"profile", "search", "export", "evaluate"}
    assert chain(bed, wanted, 6 if kind == "recover" else 3, seed=len(kind), most=writes // 2) == []


def test_the_comparison_sees_what_is_lost_changed_and_left(tmp_path: Path) -> None:
    wanted = {"plan.json": {"layers": 1}, "a": b"1"}
    assert differences(wanted, {"plan.json": {"layers": 2}, "b": b"1"}) == [
        "a is missing",
        "b is there besides",
        "plan.json differs",
    ]
    assert differences(wanted, dict(wanted)) == []
    for name in (".plan.json.12.part", ".checkpoint.partial", "compress-verify-1-abc", "plan.json"):
        (tmp_path / name).write_text("x")
    assert len(left_overs(tmp_path)) == 3


def test_writes_are_chosen_from_the_first_to_the_last() -> None:
    assert points(5, 10) == [1, 2, 3, 4, 5]
    assert points(101, 3) == [1, 51, 101]
    assert set(SIGNALS) == {signal.SIGKILL, signal.SIGTERM, signal.SIGINT}
