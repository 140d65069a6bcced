"""The run folder: where the artifacts of one run lie, which stages are done, and who is writing.

recipe.yaml            the recipe, verbatim
recipe.resolved.yaml   with every default written out
model.json             the name of the model, which decides whether a folder can be gone on with
environment.json       versions, devices and threads of the last command
stages.json            what is done, and a key of all that it depended on
log.jsonl              one line per event, appended
calibration/  profile/  search/  plan.json  recover/  checkpoint/  evaluation/  evaluation.json  plots/  report.html
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compress.errors import UserError
from compress.files import key_of, write_json, write_text

STAGES = "stages.json"
LOCK = ".lock"
SCHEMA = 1
ARTIFACTS = (
    "calibration",
    "profile",
    "search",
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
            data = json.loads((self.path / STAGES).read_text(encoding="utf-8"))
            stages = data["stages"]
            return {name: dict(entry) for name, entry in stages.items()} if data["schema"] == SCHEMA else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def stage_done(self, name: str, key: str) -> bool:
        """Whether a stage was finished with this key and what it made is still there."""
        entry = self.stages().get(name)
        if entry is None or entry.get("key") != key:
            return False
        return all((self.path / made).exists() for made in entry.get("made", []))

    def finish(self, name: str, key: str, *, seconds: float, made: list[str]) -> None:
        """Note a stage as done.

        Args:
            key: `stage_key` of all it depended on; with another key the stage runs again.
            seconds: wall clock.
            made: files and folders it made, relative to the run folder.
        """
        stages = self.stages()
        stages[name] = {"key": key, "seconds": round(seconds, 2), "made": made}
        self._write_stages(stages)
        self.log("stage", stage=name, seconds=round(seconds, 2))

    def forget(self, *names: str) -> None:
        """Take stages as not done; without names, all of them."""
        stages = self.stages()
        self._write_stages({name: entry for name, entry in stages.items() if names and name not in names})

    def discard(self) -> None:
        """Delete what stages left here and go on from, by name; the checkpoint stays until an export replaces it."""
        for name in ARTIFACTS:
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _write_stages(self, stages: dict[str, dict[str, Any]]) -> None:
        write_json(self.path / STAGES, {"schema": SCHEMA, "stages": stages})

    def log(self, event: str, **fields: Any) -> None:
        """Append one line to `log.jsonl`."""
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **fields}
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder; the operating system lets go of it when the process ends, however it ends.

        Raises:
            UserError: another process holds it.
        """
        with (self.path / LOCK).open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                file.seek(0)
                raise UserError(
                    "another run is writing in this folder",
                    where=str(self.path),
                    found=f"process {file.read().strip() or 'unknown'}",
                    fix="wait for it, stop it, or name another `output:` in the recipe",
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)


@contextlib.contextmanager
def open_run(
    path: Path, *, model: str, text: str, resolved: str, overwrite: bool = False, fresh: bool = False
) -> Iterator[RunFolder]:
    """Make a run folder, or go on in one that holds a run of the same model, and hold it (`RunFolder.locked`).

    A changed recipe goes on too: stages whose key did not change are kept, the others run again. `overwrite` goes on
    in a folder that holds something else; a file is only replaced by one of its name, nothing is deleted.

    Args:
        model: the recipe's model.
        text: the recipe, verbatim.
        resolved: the recipe with every default written out, as YAML.
        fresh: throw away what an earlier run left in the folder, except its checkpoint, which only an export replaces.

    Raises:
        UserError: the path is a file, cannot be written, is held by another process, or holds something that is no
            run of this model.
    """
    if path.exists() and not path.is_dir():
        raise UserError("the output is a file", where=str(path), expected="a folder", fix="change `output:`")
    entries = sorted(entry.name for entry in path.iterdir() if entry.name != LOCK) if path.is_dir() else []
    is_run = STAGES in entries
    before = _model_of(path) if is_run else None
    if entries and not is_run and not overwrite:
        raise UserError(
            "the output folder already holds something",
            where=str(path),
            expected="no folder, an empty one, or an earlier run to go on with",
            found=", ".join(entries[:5]) + (f" and {len(entries) - 5} more" if len(entries) > 5 else ""),
            fix="change `output:` in the recipe, or pass --overwrite to write there nevertheless",
        )
    if is_run and before != model and not overwrite:
        raise UserError(
            "the output folder already holds a run of another model",
            where=str(path),
            expected=model,
            found=before or "a run whose recipe cannot be read",
            fix="change `output:` in the recipe, or pass --overwrite to replace that run",
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("the output folder cannot be made", where=str(path), found=error.strerror) from error
    if not os.access(path, os.W_OK):
        raise UserError("the output folder cannot be written", where=str(path), fix="check its rights")
    run = RunFolder(path)
    with run.locked():
        if is_run and fresh:
            run.discard()
        if not is_run or fresh or before != model:
            run.forget()
        write_text(path / "recipe.yaml", text)
        write_text(path / "recipe.resolved.yaml", resolved)
        write_json(path / "model.json", {"model": model})
        yield run


def _model_of(path: Path) -> str | None:
    """The model that a run folder is about; None when that cannot be read."""
    try:
        return str(json.loads((path / "model.json").read_text(encoding="utf-8"))["model"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
