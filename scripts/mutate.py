"""Damages every file that the product reads, thousands of times, and counts what the commands make of it.

    python -m scripts.mutate --cases 20000 --processes 2 --out findings

A case is right if the command ends with 0, with 1 or 2 and a message, or with 130; within 20 s and 2 GiB, without a
traceback, and without taking a changed file that has a checksum for whole. Failing inputs are kept, each in a folder
with what it needs to be run again:

    python -m scripts.mutate --replay findings/0001-...
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from tests.damage import READERS, Finding, Reader, Trials, last_line, make_world, scratch
from tests.forkserver import ForkServer

BATCH = 20
SLOW_SHARE = 0.05
TELL = 60.0  # seconds between two lines of progress


def main() -> None:
    """Run cases, or one again."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cases", type=int, default=20_000)
    options.add_argument("--processes", type=int, default=2)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", default="", help="kinds or commands that have this in their name")
    options.add_argument("--out", type=Path, default=Path("findings"))
    options.add_argument("--minutes", type=float, default=float("inf"), help="stop after this time")
    options.add_argument("--replay", type=Path)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    world = Path(scratch() or "/tmp") / f"compress-world-{os.getpid()}"
    try:
        make_world(world)
        if chosen.replay is not None:
            _replay(chosen.replay, world)
        else:
            _all(chosen, world)
    finally:
        shutil.rmtree(world, ignore_errors=True)


def _all(chosen: argparse.Namespace, world: Path) -> None:
    readers = [number for number, reader in enumerate(READERS) if chosen.only in reader.name]
    weights = [SLOW_SHARE if READERS[number].slow else 1.0 for number in readers]
    jobs = []
    for number, weight in zip(readers, weights, strict=True):
        count = round(chosen.cases * weight / sum(weights))
        for start in range(0, count, BATCH):
            jobs.append((start, number, chosen.seed * 1_000_003 + number * 10_007 + start, min(BATCH, count - start)))
    jobs.sort()  # a run that is stopped has touched every file
    chosen.out.mkdir(parents=True, exist_ok=True)
    began, done, codes, faults = time.monotonic(), Counter[str](), Counter[str](), Counter[str]()
    told, last = 0, began
    # Ctrl-C ends it with the counts so far.
    with suppress(KeyboardInterrupt), get_context("fork").Pool(chosen.processes, _start, (str(world),)) as pool:
        for number, count, ends, findings in pool.imap_unordered(_work, jobs):
            reader = READERS[number]
            done[reader.name] += count
            codes.update(ends)
            for finding in findings:
                faults[reader.name] += 1
                told += 1
                _keep(chosen.out, told, finding)
                print(f"{finding.why}: {reader.name}: {finding.mutator}: {last_line(finding.outcome)}", flush=True)
            if time.monotonic() - last > TELL:
                last = time.monotonic()
                print(f"  {done.total():,} of {chosen.cases:,} cases, {told} faults", file=sys.stderr, flush=True)
            if time.monotonic() - began > chosen.minutes * 60:
                pool.terminate()
                break
    _print(done, codes, faults, time.monotonic() - began)


_trials: Trials | None = None


def _start(world: str) -> None:
    global _trials
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _trials = Trials(Path(world), ForkServer(()))


def _work(job: tuple[int, int, int, int]) -> tuple[int, int, Counter[str], list[Finding]]:
    _, number, seed, count = job
    assert _trials is not None
    try:
        _trials.expected(READERS[number])
    except AssertionError as error:
        print(f"does not work without damage: {error}", file=sys.stderr)
        return number, 0, Counter(), []
    ends: Counter[str] = Counter()
    found = []
    for end, finding in _trials.run(READERS[number], seed, count):
        ends[end] += 1
        if finding is not None:
            found.append(finding)
    return number, count, ends, found


def _keep(out: Path, number: int, finding: Finding) -> None:
    """The damaged file, what read it, and what was said."""
    label = "".join(letter if letter.isalnum() else "-" for letter in f"{finding.why} {finding.reader.kind}")
    folder = out / f"{number:04d}-{label}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / Path(finding.place).name).write_bytes(finding.data)
    facts: dict[str, Any] = {
        "world": finding.reader.world,
        "file": finding.place,
        "command": finding.reader.command,
        "reader": READERS.index(finding.reader),
        "mutator": finding.mutator,
        "seed": finding.seed,
        "why": finding.why,
        "seconds": round(finding.outcome.seconds, 2),
        "maxrss": finding.outcome.maxrss,
    }
    (folder / "case.json").write_text(json.dumps(facts, indent=1) + "\n")
    (folder / "said.txt").write_text(f"{finding.outcome.stdout}\n----\n{finding.outcome.stderr}", errors="replace")


def _replay(folder: Path, world: Path) -> None:
    facts = json.loads((folder / "case.json").read_text())
    reader: Reader = READERS[facts["reader"]]
    trials = Trials(world, ForkServer(()))
    why, outcome = trials.one(reader, (folder / Path(facts["file"]).name).read_bytes())
    print(outcome.stdout, outcome.stderr, f"exit {outcome.code}: {why or 'as it should be'}", sep="\n")
    sys.exit(why is not None)


def _print(done: Counter[str], codes: Counter[str], faults: Counter[str], seconds: float) -> None:
    width = max(map(len, done), default=0)
    for name, count in sorted(done.items()):
        print(f"{name:<{width}}  {count:>6} cases  {faults[name]:>4} faults")
    print(
        f"{done.total():,} cases in {seconds:,.0f} s, {faults.total()} faults; ended with {dict(sorted(codes.items()))}"
    )


if __name__ == "__main__":
    main()
