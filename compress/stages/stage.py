"""What all stages do alike: run once and be noted as done, refuse to go on without another one, and draw."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from compress.data.calibration import calibration_documents
from compress.data.prompt import Task
from compress.data.sample import TextSample
from compress.data.text import Part, Source
from compress.errors import UserError
from compress.models.placement import input_device
from compress.models.processes import find_processes
from compress.stages.session import Session

Result = TypeVar("Result")


def timed(session: Session, stage: str, key: Callable[[], str], made: list[str], work: Callable[[], Result]) -> Result:
    """Run a stage, note its time, and mark it as done. Until then it counts as not done, whatever lies there.

    A helper works, too, and leaves the notes to the main process.

    Args:
        key: makes the stage's key, of the session.
        made: the files and folders that the stage leaves, relative to the run folder.
    """
    if session.helper:
        return work()
    run = session.run
    depends = key()
    session.reporter.say(f"{stage}: starting")
    run.log("begin", stage=stage)
    started = time.monotonic()
    result = work()
    session.inputs.check()
    run.finish(stage, depends, seconds=time.monotonic() - started, made=made, outline=session.outline(key))
    return result


def require(session: Session, *stages: str) -> None:
    """Refuse to go on without a stage, before any weights are loaded, as far as it can be known without them.

    Raises:
        UserError: the stage was not run, or was run for another recipe, or what it made is gone.
    """
    run = session.run
    places = {
        "prepare": (session.prepare_key, run.path / "options"),
        "profile": (session.profile_key, run.profile),
        "search": (session.search_key, run.plan),
        "upcycle": (session.upcycle_key, run.plan),
        "recover": (session.recover_key, run.path / "recover"),
        "control": (session.control_key, run.path / "recover"),
        "windows": (session.windows_key, run.path / "recover"),
    }
    for stage in stages:
        key, where = places[stage]
        if not run.may_be_done(stage, session.outline(key)):
            raise missing(session, "recover" if stage in ("control", "windows") else stage, where)


def require_weights(session: Session) -> None:
    """`require` for the stages whose results a checkpoint, or its evaluation, is made of."""
    settings = session.recipe.recover
    trained = [] if settings is None else ["recover", *settings.controls]
    require(session, "search" if session.recipe.upcycle is None else "upcycle", *trained)


def refuse_upcycled(session: Session, stage: str) -> None:
    """Raise UserError for a stage that has no place where several models become one."""
    if session.recipe.upcycle is not None:
        raise UserError(
            f"an upcycled model has no {stage}: its plan is that all experts stay",
            where=str(session.recipe.source),
            fix=f"compress upcycle {session.recipe.words}, or all at once: compress run {session.recipe.words}",
        )


def missing(session: Session, stage: str, where: Path) -> UserError:
    """What to say when a command needs a stage that was not run, or was run for another recipe."""
    older = session.run.began(stage)
    return UserError(
        f"the {stage} stage was run for an earlier form of this recipe" if older else f"the {stage} stage is missing",
        where=str(where),
        fix=f"compress {stage} {session.recipe.words}, or all at once: compress run {session.recipe.words}",
    )


def documents_of(
    session: Session, requests: Sequence[Task], part: Part, text: Source | None = None
) -> dict[int, list[TextSample]]:
    """The documents of a part of a text (without one, the calibration's), by length, with the dense model's answers.

    Of several processes that work together the main one makes them, and the others read what it has written.
    """
    if not requests:
        return {}
    loaded = session.measured if part == "calibration" else session.loaded
    processes = find_processes(input_device(loaded.model))
    if not processes.main:
        processes.wait()
    with session.reporter.progress(f"documents ({part.replace('_', ' ')})") as report:
        documents = calibration_documents(
            loaded,
            requests,
            text or session.recipe.calibration.text,
            part,
            session.recipe.seed,
            session.run.path / "calibration",
            progress=report,
        )
    if processes.main:
        processes.wait()
    return documents


def draw(session: Session, plots: Callable[[Path], list[Path]]) -> None:
    """Plots of a stage that is done."""
    written = plots(session.run.path)
    if written:
        session.reporter.say("plots: " + ", ".join(str(path) for path in written))
