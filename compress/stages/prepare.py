"""The prepare stage: trains targets that cannot be priced untrained, and lets the dense model carry what came of it."""

from __future__ import annotations

from compress.models.prepared import Option, attach, prepared_for, read_prepared
from compress.runfolder import PREPARED
from compress.stages.device import resolve_device
from compress.stages.processes import together
from compress.stages.session import Session
from compress.stages.stage import missing, timed
from compress.train.prepare import prepare
from compress.words import duration


def prepare_stage(session: Session, *, must_be_done: bool = False) -> None:
    """Train the recipe's `prepare:`, or take what was trained before; nothing where the recipe has none.

    Afterwards the dense model of the session carries the tensors, so that plans with these targets find them.
    In a launch of several processes all of them call this, and wait here for the main one.

    Args:
        must_be_done: only read what is there.

    Raises:
        UserError: not done although it must be, or it failed (see `prepare`).
    """
    settings = session.recipe.prepare
    if settings is None or (must_be_done and prepared_for(session.loaded.model)):
        return
    run, say = session.run, session.reporter.say
    folder = run.path / "options"
    if must_be_done:
        if not run.stage_done("prepare", session.prepare_key()):
            raise missing(session, "prepare", folder)
        attach(session.loaded.model, read_prepared(folder))
        return
    source = settings.text or session.recipe.calibration.text

    def work() -> dict[str, Option]:
        with session.reporter.progress("prepare") as report:
            tokens = session.reader(report).ids(source, "calibration", settings.text_tokens)
            return prepare(
                session.loaded.model,
                session.shape,
                settings,
                tokens,
                folder,
                seed=session.recipe.seed,
                progress=report,
            )

    with together(resolve_device(session.recipe.device)):
        if run.stage_done("prepare", session.prepare_key()):
            say(f"prepare: done before, {folder}")
        else:
            options = timed(session, "prepare", session.prepare_key, [PREPARED], work)
            for target, option in zip(settings.targets, options.values(), strict=True):
                say(
                    f"prepare: {target.words()}, {option.steps} steps, {option.tokens:,} tokens, loss "
                    f"{option.first_loss:.4g} to {option.last_loss:.4g}, {duration(option.seconds)}"
                )
    attach(session.loaded.model, read_prepared(folder))
