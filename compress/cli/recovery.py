"""The stage between search and export: trains the plan's model, and the dense one beside it if asked to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.cli.output import duration, progress, say
from compress.cli.processes import together

if TYPE_CHECKING:
    from compress.cli.session import Session

RECORD = "recover/recover.json"
CONTROL = "recover/control/recover.json"


def row_names(recipe: Any) -> list[str]:
    """The rows of a recipe's evaluation, as far as the search finds their plans."""
    from compress.evaluate.comparison import CONTROL_ROW, UNTRAINED

    names = ["dense"]
    for name in recipe.evaluate.compare:
        if recipe.recover is None or name == "plan":
            names.append(name)
        if recipe.recover is not None:
            names.append(f"{name}{UNTRAINED}")
            names += [CONTROL_ROW] if name == "plan" and recipe.recover.control else []
    return names


def recover_stage(session: Session, *, must_be_done: bool = False) -> Path | None:
    """The folder of the trained weights; None where the recipe has no `recover:`.

    In a launch of several processes all of them call this, and wait here for the main one.

    Raises:
        UserError: there is no plan, or the stage is not done although it must be, or it failed (see `recover`).
    """
    from compress.cli.session import resolve_device
    from compress.cli.stages import missing, search_stage
    from compress.models.planned import planned_model

    if session.recipe.recover is None:
        return None
    run, settings = session.run, _settings(session)
    folder = run.path / "recover"
    if must_be_done:
        done = run.stage_done("recover", session.recover_key())
        if not done or (settings.control and not run.stage_done("control", session.control_key())):
            raise missing(session, "recover", folder)
        return folder
    with together(resolve_device(session.recipe.device)):
        plan = search_stage(session, must_be_done=True)
        _train(session, "recover", session.recover_key, folder, RECORD, lambda: planned_model(_dense(session), plan))
        if settings.control:
            key, control = session.control_key, folder / "control"
            _train(session, "control", key, control, CONTROL, lambda: copy.deepcopy(_dense(session)))
    return folder


def _train(
    session: Session, stage: str, key: Callable[[], str], folder: Path, made: str, build: Callable[[], Any]
) -> None:
    """One training, unless it was done before."""
    from compress.cli.stages import timed
    from compress.data.text import part_of
    from compress.train.recovery import recover

    if session.run.stage_done(stage, key()):
        say(f"{stage}: done before, {folder}")
        return
    settings = _settings(session)
    source: Any = settings.text or session.recipe.calibration.text

    def work() -> Any:
        tokens = part_of(session.loaded.tokenizer, source, "calibration", settings.text_tokens)
        with progress(stage) as report:
            return recover(
                build(),
                settings,
                tokens,
                folder,
                teacher=_dense(session),
                seed=session.recipe.seed,
                progress=report,
            )

    record = timed(session, stage, key, [made], work)
    say(
        f"{stage}: {record.steps} steps, {record.tokens:,} tokens, loss {record.first_loss:.4f} to "
        f"{record.last_loss:.4f}, {duration(record.seconds)}"
    )


def _settings(session: Session) -> Any:
    return session.recipe.recover


def _dense(session: Session) -> Any:
    return session.loaded.model
