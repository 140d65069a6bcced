"""The prepare stage: trains targets that cannot be priced untrained, and then prices them."""

from __future__ import annotations

from compress.models.prepared import Option, attach, prepared_for, read_prepared
from compress.profile.run import run_profile
from compress.profile.store import Profile, effect_key, read_profile
from compress.registry import targets
from compress.runfolder import EFFECTS, PREPARED
from compress.search.preview import unlearnt
from compress.stages.profile import profile_stage
from compress.stages.session import Session
from compress.stages.stage import documents_of, missing, timed
from compress.train.prepare import prepare
from compress.train.windows import half_and_half
from compress.words import duration


def prepare_stage(session: Session, *, must_be_done: bool = False) -> None:
    """Train the recipe's `prepare:`, or take what was trained before; nothing where the recipe has none.

    Afterwards the dense model of the session carries the tensors, so that plans with these targets find them, and with
    `effect: true` what the targets cost the loss is measured. In a launch of several processes all of them call this,
    and wait here for the main one.

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
            reader, wanted = session.reader(report), settings.text_tokens
            tokens = reader.ids(source, "calibration", wanted)
            if settings.second is not None:
                other = reader.ids(settings.second, "calibration", wanted)
                tokens = half_and_half(tokens, other, settings.length)
            return prepare(
                session.loaded.model,
                session.shape,
                settings,
                tokens,
                folder,
                seed=session.recipe.seed,
                progress=report,
                tokenizer=session.loaded.tokenizer,
            )

    with session.together():
        if run.stage_done("prepare", session.prepare_key()):
            say(f"prepare: done before, {folder}")
        else:
            recover = None if session.recipe.recover is None else session.recipe.recover.length
            for line in unlearnt(session.loaded.model.config, settings, recover, session.recipe.calibration.lengths):
                say(f"prepare: {line}")
            options = timed(session, "prepare", session.prepare_key, [PREPARED], work)
            for option in options.values():
                words = targets.parse(option.target).words()
                say(
                    f"prepare: {words}, {option.steps} steps, {option.tokens:,} tokens, loss "
                    f"{option.first_loss:.4g} to {option.last_loss:.4g}, {duration(option.seconds)}"
                )
            for found in read_prepared(folder):
                if found.retention is not None:
                    ranks = " ".join(f"{rank:.2f}" for rank in found.retention.rank.nanmean(1).tolist())
                    say(f"prepare: {found.target.words()}, by layer its rank correlation with the scores: {ranks}")
    attach(session.loaded.model, read_prepared(folder))
    effects_stage(session)


def effects_stage(session: Session, *, must_be_done: bool = False) -> Profile | None:
    """What the prepared targets, which the model carries, cost the loss to first order, in the form of a profile.

    They are priced as the statistic `effect` prices others, on the same documents, in `options/effect`. An interrupted
    measurement goes on where it was.

    Args:
        must_be_done: only read what is there.

    Returns:
        None where the recipe does not ask for it (`prepare.effect`).

    Raises:
        UserError: not done although it must be, or it failed (see `run_profile`).
    """
    settings = session.recipe.prepare
    if settings is None or not settings.effect:
        return None
    run, recipe, say = session.run, session.recipe, session.reporter.say
    folder = run.path / EFFECTS
    if must_be_done:
        if not run.stage_done("effect", session.effect_key()):
            raise missing(session, "prepare", folder)
        return read_profile(folder, session.shape)

    def work() -> Profile:
        documents = documents_of(session, recipe.calibration.documents, "calibration")
        statistic = settings.pricing()
        # What ranks heads is among what the profile of the dense model has.
        known = profile_stage(session, must_be_done=True).tensors if statistic.follows else None
        with session.reporter.progress("effect") as report:
            return run_profile(
                session.loaded, documents, [statistic], folder, seed=recipe.seed, progress=report, known=known
            )

    with session.together():
        if run.stage_done("effect", session.effect_key()):
            say(f"effect: done before, {folder}")
            return read_profile(folder, session.shape)
        effects = timed(session, "effect", session.effect_key, [EFFECTS], work)
    for target in effects.priced:
        losses = [f"{float(effects.effect(target, length).mean()):.3g} at {length:,}" for length in effects.lengths]
        say(f"effect: {target.words()}, nats to first order, mean over head groups: {', '.join(losses)} tokens")
    for option in effects.priced_layers:
        tensors = {length: effects.tensor(effect_key(option, length)) for length in effects.lengths}
        losses = [f"{float(tensor.mean()):.3g} at {length:,}" for length, tensor in tensors.items()]
        say(f"effect: {option.words()}, nats to first order, mean over head groups: {', '.join(losses)} tokens")
    return effects
