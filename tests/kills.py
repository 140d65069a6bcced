"""Ends a run of `compress` at one of its writes, runs it again, and compares what it leaves with an unbroken run's."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import zygote
from tests.cli.recipes import HEAD, make_recipe
from tests.forkserver import ForkServer, Outcome

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# Audit events of Python that change what is on the disk; `open` is judged by its flags.
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Left out of the comparison: when it was, how long it took, how much memory the process had, and hashes of these.
TIMES = {"seconds", "peak_memory_bytes", "checksum", "time"}
UNLIKE = {"log.jsonl", ".lock", "report.html"}
LEFT_OVER = re.compile(r".*\.(part|partial|old)|compress-.*|partial(-.*|\.json)?|.*\.tmp")

SPAN = (
    HEAD
    + """\
  documents:
    - {{task: continuation, length: 192, count: 2, answer_tokens: 16}}
  held_out:
    - {{task: continuation, length: 256, count: 1, answer_tokens: 16}}
profile:
  statistics:
    - {{name: influence, grid: {{sinks: [4], betas: [0]}}}}
search:
  solver: {{name: moa, points: 1}}
  budget: {{kv: 0.8, lengths: [192]}}
evaluate:
  compare: [plan, uniform]
  perplexity: {{text: *text, length: 128, windows: 1}}
"""
)
PRUNE = (
    HEAD
    + """\
  documents:
    - {{task: continuation, length: 128, count: 2, answer: text, answer_tokens: 64}}
profile:
  statistics:
    - {{name: amp}}
search:
  solver: {{name: amp, multiple: 1}}
  budget: {{parameters: 0.7}}
export: {{form: auto}}
evaluate:
  compare: [plan]
  perplexity: {{text: *text, length: 128, windows: 1}}
"""
)
RECOVER = SPAN + "recover: {{length: 32, batch_size: 2, steps: 4, rate: 0.01, control: true, save_every: 1}}\n"
# What a server imports before it forks, besides what it has anyway.
PRELOAD = (
    *zygote.MODULES,
    "compress.cli.app",
    "compress.recipe.read",
    "compress.stages.session",
    "compress.evaluate.compare",
    "compress.export.export",
    "compress.train.recovery",
    "compress.stages.evaluate",
    "matplotlib.figure",
    "matplotlib.backends.backend_svg",
    "tests.kills",
)
RECIPES = {"span": SPAN, "prune": PRUNE, "recover": RECOVER}


@dataclass(frozen=True)
class Case:
    """One broken run.

    Attributes:
        number: of the write that it ended before, from 1.
        problems: what was not as promised; empty where all was.
    """

    recipe: str
    number: int
    signal: str
    code: int
    problems: tuple[str, ...]


class Bed:
    """A tiny model, a text and a recipe in a folder that every case starts from anew.

    Args:
        kind: one of `RECIPES`.
        plots: whether runs draw their plots and charts.
        timeout: seconds of a run; what takes longer counts as hanging.
    """

    def __init__(
        self, folder: Path, kind: str, server: ForkServer, *, plots: bool = True, timeout: float = 20.0
    ) -> None:
        self.folder, self.kind, self.server, self.plots, self.timeout = folder, kind, server, plots, timeout
        self.recipe, self.run_folder, self.scratch = folder / "recipe.yaml", folder / "run", folder / "scratch"
        folder.mkdir()
        make_recipe(folder)
        self.recipe.write_text(
            RECIPES[kind].format(model=folder / "model", text=folder / "text.txt", output=self.run_folder)
        )
        self.clear()

    def clear(self) -> None:
        """Forget all runs."""
        shutil.rmtree(self.run_folder, ignore_errors=True)
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()

    def run(self, number: int = 0, signal_number: int = 0) -> Outcome:
        """A run that ends itself before its write of that number; 0 lets it run to its end."""
        return self.server.run(
            ended_run, str(self.recipe), str(self.folder), number, int(signal_number), self.plots, timeout=self.timeout
        )

    def whole(self) -> tuple[dict[str, Any], int]:
        """Contents of an unbroken run, and the number of its writes."""
        self.clear()
        outcome = self.run()
        assert outcome.code == 0, outcome.stderr
        found = contents(self.run_folder)
        writes = int((self.folder / "writes").read_text())
        self.clear()
        return found, writes

    def case(self, number: int, signal_number: int, wanted: dict[str, Any]) -> Case:
        """End a run at a write, run to the end, compare."""
        self.clear()
        ended = self.run(number, signal_number)
        problems = faults(ended, signal_number)
        problems += self.finish(wanted)
        return Case(self.kind, number, signal.Signals(signal_number).name, ended.code, tuple(problems))

    def finish(self, wanted: dict[str, Any]) -> list[str]:
        """Run to the end; what is not as in an unbroken run."""
        again = self.run()
        if again.code != 0:
            return [f"the run after it ended with {again.code}: {again.stderr[-600:]}"]
        return differences(wanted, contents(self.run_folder)) + left_overs(self.folder)


def ended_run(recipe: str, folder: str, number: int, signal_number: int, plots: bool) -> int:
    """`compress run` in this process, which sends itself a signal before a write below a folder. For a child."""
    import compress.export.verify
    from compress.cli.app import app

    compress.export.verify.run_fresh = run_forked
    if not plots:
        import compress.report.sections
        import compress.stages.evaluate
        import compress.stages.search

        vars(compress.report.sections)["chart_svg"] = lambda chart, name: ""
        for stage in (compress.stages.search, compress.stages.evaluate):
            vars(stage)["draw"] = lambda session, plots: None
    os.environ["TMPDIR"] = tempfile.tempdir = f"{folder}/scratch"
    me, done = os.getpid(), [0]

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            if not isinstance(args[2], int) or not args[2] & WRITING:
                return
        elif event not in CHANGES:
            return
        path = args[0]
        if isinstance(path, bytes | str) and os.fsdecode(path).startswith(folder) and os.getpid() == me:
            done[0] += 1
            if done[0] == number:
                os.kill(me, signal_number)

    sys.addaudithook(watch)
    code = 0
    try:
        app(["run", recipe])
    except SystemExit as end:
        code = int(end.code or 0)
    writes = done[0]
    done[0] = -(1 << 30)
    Path(folder, "writes").write_text(str(writes))
    return code


def run_forked(
    script: Path, arguments: Sequence[str], environment: dict[str, str], folder: Path
) -> subprocess.CompletedProcess[str]:
    """In place of `compress.export.verify.run_fresh`: a fork of this process, ended with it by an interrupt."""
    with tempfile.TemporaryFile("w+") as out:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            order = {"environment": environment, "folder": str(folder), "path": [], "arguments": [script, *arguments]}
            zygote.become(order)
            status = zygote.do("file", str(script))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        try:
            _, status = os.waitpid(child, 0)
        except BaseException:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
        out.seek(0)
        return subprocess.CompletedProcess([], os.waitstatus_to_exitcode(status), "", out.read())


def faults(ended: Outcome, signal_number: int) -> list[str]:
    """What a run that was ended promised and did not keep."""
    # A training that is told to stop ends after the step that it is in, and so may be done by then.
    allowed = {-signal.SIGKILL} if signal_number == signal.SIGKILL else {130}
    problems = []
    if ended.timed_out:
        problems.append("it did not end in time")
    elif ended.code not in allowed:
        problems.append(f"it ended with {ended.code}: {ended.stderr[-600:]}")
    if "Traceback" in ended.stderr + ended.stdout or "Exception ignored" in ended.stderr:
        problems.append(f"a traceback: {ended.stderr[-1200:]}")
    return problems


def contents(folder: Path) -> dict[str, Any]:
    """What is in a run folder by path, without times."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or path.name in UNLIKE:
            continue
        data = path.read_bytes()
        if name == "stages.json":  # keys are of files with times in them
            found[name] = {stage: entry["made"] for stage, entry in json.loads(data)["stages"].items()}
        elif path.suffix == ".json":
            found[name] = _timeless(json.loads(data))
        elif path.suffix == ".jsonl":
            found[name] = [_timeless(json.loads(line)) for line in data.splitlines()]
        else:
            found[name] = data
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(part) for key, part in value.items() if key not in TIMES}
    return [_timeless(part) for part in value] if isinstance(value, list) else value


def differences(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Files that are there in one of the two only, or are not the same."""
    lacking = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    more = [f"{name} is there besides" for name in found.keys() - wanted.keys()]
    return sorted(lacking + more) + [
        f"{name} differs" for name in sorted(wanted.keys() & found.keys()) if wanted[name] != found[name]
    ]


def left_overs(folder: Path) -> list[str]:
    """Temporary files and folders, in a folder and below."""
    return [
        f"{path.relative_to(folder)} is left over"
        for path in sorted(folder.rglob("*"))
        if LEFT_OVER.fullmatch(path.name) and not path.is_relative_to(folder / "model")
    ]


def chain(bed: Bed, wanted: dict[str, Any], kills: int, seed: int, most: int) -> list[str]:
    """End one run again and again, each time some writes later than it began, then let it finish; the problems."""
    bed.clear()
    source = random.Random(seed)
    problems = []
    for number in range(kills):
        chosen = SIGNALS[number % len(SIGNALS)]
        ended = bed.run(source.randint(1, most), chosen)
        if ended.code == 0:
            break
        problems += [f"kill {number + 1}, {chosen.name}: {fault}" for fault in faults(ended, chosen)]
    return problems + bed.finish(wanted)


def points(writes: int, count: int) -> list[int]:
    """Numbers of writes, all of them where they are not more, else spread evenly from the first to the last."""
    if count >= writes:
        return list(range(1, writes + 1))
    return sorted({1 + round(step * (writes - 1) / (count - 1)) for step in range(count)})
