"""Runs commands on the GPUs of a machine, so many at once on each, until all are done or the time is over.

python scripts/gpu_jobs.py JOBS.yaml --out FOLDER [--minutes N] [--set NAME=VALUE] [NAME ...]

JOBS.yaml has `values`, words that commands, and values behind them, name as {WORD} and `--set` changes, and `jobs`, by
their names:

    run      the command, in a shell; {out} is FOLDER
    share    of a GPU that it takes, 0.5 without; jobs with 1 run alone on theirs
    gpus     how many it sees, 1 without
    after    jobs that have to be done before it
    minutes  that it takes, about: it is not started where less than half of that is left

A job sees its GPUs alone (CUDA_VISIBLE_DEVICES). What it prints is in FOLDER/NAME.log, and FOLDER/NAME.done says that
it ended well: the same command goes on with the others. When the time is over, those that run are sent SIGTERM, on
which trainings save their state. profiles/smollm2-135m/jobs.yaml has the rows of the tables there that were not run.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

GRACE = 45.0  # seconds to save a state in


@dataclass(frozen=True)
class Job:
    """One command; see the file."""

    name: str
    run: str
    share: float = 0.5
    gpus: int = 1
    after: tuple[str, ...] = ()
    minutes: float = 0.0


@dataclass(frozen=True)
class Running:
    """A job that was started, and when and on which GPUs."""

    job: Job
    process: subprocess.Popen[bytes]
    gpus: list[int]
    started: float


def read_jobs(data: dict[str, Any], values: dict[str, str]) -> list[Job]:
    """The jobs of a file, in its order, with words put into their commands.

    Raises:
        ValueError: a job names one that there is not, takes no part of a GPU or more than one, or has an unknown word.
    """
    words = dict(values)
    for name, value in (data.get("values") or {}).items():
        words.setdefault(name, str(value).format_map(words))
    jobs: list[Job] = []
    for name, keys in data["jobs"].items():
        try:
            command = str(keys["run"]).format_map(words)
        except KeyError as word:
            raise ValueError(f"job {name}: no value for the word {word}; give it under `values` or by --set") from None
        job = Job(name, **{**keys, "run": command, "after": tuple(keys.get("after", ()))})
        if not 0 < job.share <= 1:
            raise ValueError(f"job {name}: expected a share of a GPU above 0 and at most 1, got {job.share}")
        if missing := [other for other in job.after if other not in data["jobs"]]:
            raise ValueError(f"job {name}: there is no job {', '.join(missing)} to wait for")
        jobs.append(job)
    return jobs


class Machine:
    """How much of each GPU is taken.

    Args:
        gpus: how many there are; 0 is a machine without any, on which jobs share one place.
    """

    def __init__(self, gpus: int) -> None:
        self.seen, self.taken = gpus > 0, [0.0] * max(1, gpus)

    def place(self, job: Job) -> list[int] | None:
        """The GPUs with the most room for a job, which it takes; None where there is too little."""
        count = min(job.gpus, len(self.taken))
        fitting = [gpu for gpu, taken in enumerate(self.taken) if taken + job.share <= 1 + 1e-9]
        if len(fitting) < count:
            return None
        chosen = sorted(sorted(fitting, key=lambda gpu: self.taken[gpu])[:count])
        for gpu in chosen:
            self.taken[gpu] += job.share
        return chosen

    def free(self, job: Job, gpus: list[int]) -> None:
        """Give back what a job took."""
        for gpu in gpus:
            self.taken[gpu] -= job.share


def run_all(jobs: list[Job], out: Path, end: float, gpus: int) -> list[str]:
    """Run jobs until they are done or the time is over; the names of those that did not end well.

    Args:
        end: by `time.monotonic`.
        gpus: of the machine.
    """
    out.mkdir(parents=True, exist_ok=True)
    machine, running, begun = Machine(gpus), list[Running](), time.monotonic()
    waiting = [job for job in jobs if not done(out, job.name)]
    asked = {job.name for job in jobs}

    def say(what: str) -> None:
        print(f"{time.monotonic() - begun:6.0f} s  {what}", flush=True)

    def able(job: Job) -> bool:
        return all(done(out, other) for other in job.after if other in asked) and (
            time.monotonic() + 30 * job.minutes <= end
        )

    try:
        while running or any(map(able, waiting)):
            for job in filter(able, list(waiting)):
                if (chosen := machine.place(job)) is None:
                    continue
                waiting.remove(job)
                running.append(start(job, out, chosen, seen=machine.seen))
                say(f"{job.name}: started" + (f" on GPU {', '.join(map(str, chosen))}" if machine.seen else ""))
            if time.monotonic() > end:
                break
            for each in list(running):
                if (status := each.process.poll()) is None:
                    continue
                running.remove(each)
                machine.free(each.job, each.gpus)
                took = f"after {time.monotonic() - each.started:.0f} s"
                if status == 0:
                    (out / f"{each.job.name}.done").touch()
                    say(f"{each.job.name}: done {took}")
                else:
                    lines = (out / f"{each.job.name}.log").read_text(errors="replace").splitlines()[-6:]
                    told = "".join(f"\n    {line[:300]}" for line in lines)
                    say(f"{each.job.name}: ended with {status} {took}{told}")
            time.sleep(0.2)
    finally:  # they are in sessions of their own, and would go on without this one
        end_all([each.process for each in running], to_group)
    for each in running:
        say(f"{each.job.name}: stopped, the time is over")
    return [job.name for job in jobs if not done(out, job.name)]


def start(job: Job, out: Path, gpus: list[int], *, seen: bool) -> Running:
    """A job's process, in a session of its own; with GPUs to be seen, on a machine that has any."""
    own = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))} if seen else {}
    with (out / f"{job.name}.log").open("ab") as log:
        command = ["bash", "-c", job.run]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | own, start_new_session=True)
    return Running(job, process, gpus, time.monotonic())


def done(out: Path, name: str) -> bool:
    """Whether a job ended well, now or before."""
    return (out / f"{name}.done").is_file()


def to_group(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a process that leads a session, and to what it has started."""
    os.killpg(process.pid, number)


def end_all(
    processes: Collection[subprocess.Popen[bytes]],
    send: Callable[[subprocess.Popen[bytes], int], None] = subprocess.Popen.send_signal,
) -> None:
    """End processes, with time for each to save what it has."""
    for process in processes:
        send(process, signal.SIGTERM)
    for process in processes:
        try:
            process.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            send(process, signal.SIGKILL)
            process.wait()


def main() -> int:
    """Run the jobs that are asked for; 0 where all are done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("jobs", type=Path, metavar="JOBS.yaml")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of the jobs to run; all without")
    parser.add_argument("--out", type=Path, required=True, help="folder of what they print, and of what is done")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop then")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a word in the commands")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the jobs are ended as well
    given = dict(setting.split("=", 1) for setting in options.set)
    try:
        jobs = read_jobs(yaml.safe_load(options.jobs.read_text()), {"out": str(options.out)} | given)
    except ValueError as error:
        sys.exit(str(error))
    if unknown := set(options.names) - {job.name for job in jobs}:
        sys.exit(f"no job {', '.join(sorted(unknown))}; jobs are {', '.join(job.name for job in jobs)}")
    chosen = [job for job in jobs if not options.names or job.name in options.names]
    left = run_all(chosen, options.out, time.monotonic() + 60 * options.minutes, torch.cuda.device_count())
    print(f"{len(chosen) - len(left)} of {len(chosen)} done" + (f"; not {', '.join(left)}" if left else ""))
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main())
