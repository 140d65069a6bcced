"""The recover stage: trains the plan's model, and what it is compared with beside it if asked to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress.files import write_text
from compress.models.planned import planned_model
from compress.plan import Plan, measured_plan
from compress.runfolder import CONTROL, RECOVERED, TRAINED_PLAN, WINDOWS
from compress.stages.plan import finished_plan
from compress.stages.session import Session
from compress.stages.stage import missing, timed
from compress.train.recovery import Recovered, read_recovered, recover
from compress.train.settings import RecoverSettings
from compress.train.window_dropout import windows_only
from compress.words import duration


def recover_stage(session: Session, *, must_be_done: bool = False) -> Path | None:
    """The folder of the trained weights; None where the recipe has no `recover:`.

    In a launch of several processes all of them call this, and wait here for the main one.

    Args:
        must_be_done: only check that it is there.

    Raises:
        UserError: there is no plan, or the stage is not done although it must be, or it failed (see `recover`).
    """
    settings, run = session.recipe.recover, session.run
    if settings is None:
        if not session.helper:
            (run.path / TRAINED_PLAN).unlink(missing_ok=True)
        return None
    folder = run.path / "recover"
    if must_be_done:
        done = run.stage_done("recover", session.recover_key())
        keys = {"control": session.control_key, "windows": session.windows_key}
        if not done or not all(run.stage_done(name, keys[name]()) for name in settings.controls):
            raise missing(session, "recover", folder)
        return folder
    train_stage(session, "recover", *settings.controls)
    return folder


def train_stage(session: Session, *names: str) -> list[Path]:
    """Train the plan's model (`recover`), the dense model (`control`) or the plan without its states (`windows`).

    Returns:
        The folders of the trained weights.

    Raises:
        UserError: there is no plan, or see `recover`.
    """
    settings = session.recipe.recover
    assert settings is not None
    folders = []
    with session.together():
        plan = finished_plan(session)
        dense = session.loaded.model
        trainings: dict[str, tuple[Callable[[], str], str, Callable[[], Any]]] = {
            "recover": (session.recover_key, RECOVERED, lambda: planned_model(dense, plan)),
            "control": (session.control_key, CONTROL, lambda: copy.deepcopy(dense)),
            "windows": (session.windows_key, WINDOWS, lambda: windows_only(planned_model(dense, plan))),
        }
        for name in names:
            key, made, build = trainings[name]
            folders.append(session.run.path / Path(made).parent)
            own = settings.of_control if name == "control" else settings
            _train(session, own, name, key, folders[-1], made, build)
            if name == "recover" and not session.helper:
                _write_plan(session, plan, folders[-1])
    return folders


def _write_plan(session: Session, plan: Plan, folder: Path) -> None:
    """The plan beside the trained weights, for readers, where it is not the one that was searched."""
    path, trained = session.run.path / TRAINED_PLAN, trained_plan(plan, folder)
    if trained is plan:
        path.unlink(missing_ok=True)
    else:
        write_text(path, trained.to_json())
        shares = [one.share for row in read_recovered(folder).kept or () for one in row if one is not None]
        session.reporter.say(
            f"recover: heads keep {min(shares):.3g} to {max(shares):.3g} of the tokens before their windows, mean "
            f"{sum(shares) / len(shares):.3g}; the plan with their new thresholds: {path}"
        )


def trained_plan(plan: Plan, weights: Path | None) -> Plan:
    """The plan that trained weights run: as it was, but for the thresholds and shares of heads that keep tokens.

    Args:
        weights: folder of the weights, as `recover_stage` gives it; None where nothing was trained.
    """
    kept = None if weights is None else read_recovered(weights).kept
    return plan if kept is None else measured_plan(plan, kept)


def _train(
    session: Session,
    settings: RecoverSettings,
    stage: str,
    key: Callable[[], str],
    folder: Path,
    made: str,
    build: Callable[[], Any],
) -> None:
    """One training, unless it was done before."""
    if session.run.stage_done(stage, key()):
        session.reporter.say(f"{stage}: done before, {folder}")
        return
    source = settings.text or session.recipe.calibration.text

    def work() -> Recovered:
        with session.reporter.progress(stage) as report:
            tokens = session.reader(report).ids(source, "calibration", settings.text_tokens)
            return recover(
                build(),
                settings,
                tokens,
                folder,
                teacher=session.loaded.model,
                seed=session.recipe.seed,
                progress=report,
            )

    record = timed(session, stage, key, [made], work)
    session.reporter.say(
        f"{stage}: {record.steps} steps, {record.tokens:,} tokens, loss {record.first_loss:.4f} to "
        f"{record.last_loss:.4f}, {duration(record.seconds)}"
    )
