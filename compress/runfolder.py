"""The run folder: where the artifacts of one run lie, which stages are done, and who is writing.

It is opened so that a kill between any two writes leaves a folder that the same command goes on with: what says whose
run it is (`model.json`) is written first, and a folder with nothing but the files of an opening counts as new.

recipe.yaml            the recipe, verbatim
recipe.resolved.yaml   with every default written out
model.json             the name of the model, which decides whether a folder can be gone on with
environment.json       versions, devices and threads of the last command
stages.json            what is done, and a key of all that it depended on
log.jsonl              one line per event, appended
calibration/  profile/  options/  search/  upcycle/  plan.json  recover/  checkpoint/
evaluation/  evaluation.json  plots/  report.html
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from compress.errors import Problem, UserError
from compress.files import PART, key_of, open_own, refusal, remove, sweep, write_json, write_text
from compress.json_file import JsonError, append_entry, parse_json

STAGES = "stages.json"
MODEL = "model.json"
LOG = "log.jsonl"
LOCK = ".lock"
PREPARED = "options/prepare.json"  # what was trained before the search
EFFECTS = "options/effect"  # what that costs the loss, in the form of a profile
RECOVERED, CONTROL = "recover/recover.json", "recover/control/recover.json"  # records of what was trained
TRAINED_PLAN = "recover/plan.json"  # of a training that changed what its heads keep
WINDOWS = "recover/windows/recover.json"  # of the plan without the states of its linear heads
SCHEMA = 1
# What is there before the first stage begins; where nothing else is, nothing is lost.
OPENING = {"recipe.yaml", "recipe.resolved.yaml", MODEL, "environment.json", "inputs.json", STAGES, LOG}
BEGUN: dict[str, Any] = {"key": None, "seconds": 0.0, "made": []}  # a stage that is not finished
ARTIFACTS = (
    "calibration",
    "options",
    "profile",
    "search",
    "upcycle",
    "plan.json",
    "recover",
    "evaluation",
    "evaluation.json",
    "plots",
    "report.html",
)


def stage_key(*facts: Any) -> str:
    """Key of the facts (JSON values) that a stage depends on, in this form of the run folder."""
    return key_of(SCHEMA, *facts)


class RunFolder:
    """One run's folder. `open_run` makes and holds one; reading needs neither.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: tuple[int, int] | None = None  # device and inode of the lock that is held

    @property
    def plan(self) -> Path:
        """`plan.json`."""
        return self.path / "plan.json"

    @property
    def checkpoint(self) -> Path:
        """`checkpoint/`."""
        return self.path / "checkpoint"

    @property
    def profile(self) -> Path:
        """`profile/`."""
        return self.path / "profile"

    @property
    def plots(self) -> Path:
        """`plots/`."""
        return self.path / "plots"

    def stages(self) -> dict[str, dict[str, Any]]:
        """What `finish` wrote, by stage; empty for a new folder, or when the file is damaged (then all is redone)."""
        try:
            data = parse_json((self.path / STAGES).read_bytes())
            stages = data["stages"]
            entries = {name: dict(entry) for name, entry in stages.items()} if data["schema"] == SCHEMA else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        return {name: entry for name, entry in entries.items() if _is_stage(entry)}

    def stage_done(self, name: str, key: str) -> bool:
        """Whether a stage was finished with this key and what it made is still there."""
        entry = self.stages().get(name)
        if entry is None or entry.get("key") != key:
            return False
        return all((self.path / made).exists() for made in entry.get("made", []))

    def may_be_done(self, name: str, outline: str) -> bool:
        """Whether a stage could be done, as far as a key says that leaves out what only the weights tell."""
        entry = self.stages().get(name, BEGUN)
        return self.stage_done(name, entry["key"] or "") and entry.get("outline", outline) == outline

    def finish(self, name: str, key: str, *, seconds: float, made: list[str], outline: str | None = None) -> None:
        """Note a stage as done.

        Args:
            key: `stage_key` of all it depended on; with another key the stage runs again.
            outline: the same without what only the weights tell, for `may_be_done`.
            seconds: wall clock.
            made: files and folders it made, relative to the run folder.
        """
        stages = self.stages()
        stages[name] = {"key": key, "seconds": round(seconds, 2), "made": made}
        if outline is not None:
            stages[name]["outline"] = outline
        self._write_stages(stages)
        self.log("stage", stage=name, seconds=round(seconds, 2))

    def begin(self, name: str) -> None:
        """Note that a stage is about to write: what is found in its place later is this run's, finished or not."""
        stages = self.stages()
        stages[name] = dict(BEGUN)
        self._write_stages(stages)

    def began(self, name: str) -> bool:
        """Whether a stage of this run has ever begun to write (`begin`), or finished."""
        return name in self.stages()

    def forget(self, *names: str) -> None:
        """Take stages as not done; without names, all of them."""
        stages = self.stages()
        self._write_stages({name: entry for name, entry in stages.items() if names and name not in names})

    def discard(self) -> None:
        """Delete what stages left here and go on from, by name; the checkpoint stays until an export replaces it."""
        # The checkpoint has to be known as this run's still.
        self._write_stages({"export": dict(BEGUN)} if self.began("export") else {})
        for name in ARTIFACTS:
            remove(self.path / name)

    def _write_stages(self, stages: dict[str, dict[str, Any]]) -> None:
        self._check_place()
        write_json(self.path / STAGES, {"schema": SCHEMA, "stages": stages})

    def log(self, event: str, **fields: Any) -> None:
        """Append one line to `log.jsonl`."""
        self._check_place()
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **fields}
        append_entry(self.path / LOG, line)

    def _check_place(self) -> None:
        """Refuse to go on in a folder that is no longer the one that was opened."""
        if self._lock is None:
            return
        try:
            status = (self.path / LOCK).stat()
            same = (status.st_dev, status.st_ino) == self._lock
        except FileNotFoundError:
            same = False
        if not same:
            raise UserError(
                "the run folder was moved or deleted while the command was running",
                where=str(self.path),
                fix="move it back, and run the same command again",
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder; the operating system lets go of it when the process ends, however it ends.

        Raises:
            UserError: another process holds it.
        """
        try:
            handle = open_own(self.path / LOCK, os.O_RDWR)
        except OSError as error:
            raise refusal("the run folder cannot be locked", self.path / LOCK, error) from error
        with os.fdopen(handle, "r+", encoding="utf-8", errors="replace") as file:
            holder = file.read(64).strip()
            if holder and not holder.isdigit():
                raise UserError(
                    "a file that compress did not write has the name of the run folder's lock",
                    where=str(self.path / LOCK),
                    expected="no such file, or one that this program wrote",
                    fix="move the file away",
                )
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise refusal("the run folder cannot be locked", self.path / LOCK, error) from error
                raise UserError(
                    "another run is writing in this folder",
                    where=str(self.path),
                    found=f"process {holder or 'unknown'}",
                    fix="wait for it, stop it, or name another `output:` in the recipe",
                ) from error
            file.truncate(0)
            file.seek(0)
            file.write(str(os.getpid()))
            file.flush()
            status = os.fstat(handle)
            self._lock = status.st_dev, status.st_ino
            try:
                yield
            finally:
                self._lock = None
                with contextlib.suppress(OSError):
                    file.truncate(0)


def check_output(path: Path) -> None:
    """Raise UserError where no run folder can be: at or below a file, or where nothing can be written."""
    if "\0" in str(path):
        raise UserError("the path contains a NUL character", where=repr(str(path)), fix="change `output:`")
    try:
        there = next((part for part in (path, *path.parents) if part.exists()), Path())
        if not there.is_dir():
            raise UserError(
                "the output is a file" if there == path else "the output is below a file",
                where=str(path),
                expected="a folder",
                found=f"{there}, a file",
                fix="change `output:`",
            )
        _entries(path)
    except OSError as error:
        raise refusal("the output folder cannot be read", path, error) from error
    if not os.access(there, os.W_OK):
        raise UserError("the output folder cannot be written", where=str(there), fix="check its rights")


def occupied(path: Path, model: str) -> Problem | None:
    """What a folder holds that only `--overwrite` may join or replace: anything but a run, or one of another model."""
    entries, (is_run, before) = _entries(path), _run_in(path)
    if entries and not is_run:
        return Problem(
            "the output folder already holds something",
            where=str(path),
            expected="no folder, an empty one, or an earlier run to go on with",
            found=", ".join(entries[:5]) + (f" and {len(entries) - 5} more" if len(entries) > 5 else ""),
            fix="change `output:` in the recipe, or pass --overwrite to write there anyway",
        )
    begun = not OPENING.issuperset(entries) or RunFolder(path).stages()
    if is_run and before != model and begun:
        return Problem(
            "the output folder already holds a run of another model",
            where=str(path),
            expected=model,
            found=before or "a run whose recipe cannot be read",
            fix="change `output:` in the recipe, or pass --overwrite to replace that run",
        )
    return None


def _run_in(path: Path) -> tuple[bool, str | None]:
    """Whether a folder holds a run, and of which model, as far as that can be read."""
    entries, model = _entries(path), _model_of(path)
    is_run = STAGES in entries or (model is not None and OPENING.issuperset(entries))
    return is_run, model if is_run else None


@contextlib.contextmanager
def open_run(
    path: Path, *, model: str, text: str, resolved: str, overwrite: bool = False, fresh: bool = False
) -> Iterator[RunFolder]:
    """Make a run folder, or go on in one that holds a run of the same model, and hold it (`RunFolder.locked`).

    A changed recipe goes on too: stages whose key did not change are kept, the others run again. A folder that this
    made, and in which no stage began before a mistake of the user's ended the command, is removed again. `overwrite`
    goes on in a folder that holds something else; a file is only replaced by one of its name, nothing is deleted.

    Args:
        model: the recipe's model.
        text: the recipe, verbatim.
        resolved: the recipe with every default written out, as YAML.
        fresh: throw away what an earlier run left in the folder, except its checkpoint, which only an export replaces.

    Raises:
        UserError: the path is a file, cannot be written, is held by another process, or holds something that is no
            run of this model.
    """
    check_output(path)
    found, is_run, before = _entries(path), *_run_in(path)
    problem = None if overwrite else occupied(path, model)
    if problem is not None:
        raise UserError([problem])
    made = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refusal("the output folder cannot be made", path, error) from error
    run = RunFolder(path)
    with run.locked():
        sweep(path, held=True)
        if is_run and before != model:
            run.forget()
        if fresh:
            run.discard()
        write_json(path / MODEL, {"model": model})
        write_text(path / "recipe.yaml", text)
        write_text(path / "recipe.resolved.yaml", resolved)
        if STAGES not in found:
            run.forget()
        try:
            yield run
        except UserError:
            # A recipe with a mistake in it, as a wrong model, leaves nothing behind.
            if made and OPENING.issuperset(_entries(path)) and not run.stages():
                remove(path)
            raise


def _is_stage(entry: dict[str, Any]) -> bool:
    """Whether an entry of `stages.json` has the form that `finish` gives it."""
    key, made = entry.get("key", 0), entry.get("made", [])  # a stage that was begun has the key null
    named = isinstance(made, list) and all(isinstance(name, str) and len(name) < 100 for name in made)
    return named and (key is None or isinstance(key, str)) and type(entry.get("seconds")) in (int, float)


def _entries(path: Path) -> list[str]:
    """What is in a folder, without the lock and what a killed writer left; empty where there is no folder."""
    if not path.is_dir():
        return []
    names = sorted(entry.name for entry in path.iterdir())
    return [name for name in names if name != LOCK and not PART.fullmatch(name)]


def _model_of(path: Path) -> str | None:
    """The model that a run folder is about; None when that cannot be read."""
    try:
        model = parse_json((path / MODEL).read_bytes())["model"]
        return model if isinstance(model, str) else None
    except (OSError, JsonError, KeyError, TypeError):
        pass
    try:  # from before `model.json` was the first to be written
        text = (path / "recipe.resolved.yaml").read_text(encoding="utf-8")
        line = re.search(r"^model: .*$", text, re.MULTILINE)
        model = yaml.safe_load(line[0])["model"] if line else None
        return model if isinstance(model, str) else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
