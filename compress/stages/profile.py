"""The profile stage: calibration documents and the statistics taken on them."""

from __future__ import annotations

from compress.profile.run import run_profile
from compress.profile.stability import stabilities
from compress.profile.store import Profile, read_profile
from compress.stages.session import Session
from compress.stages.stage import documents_of, missing, refuse_upcycled, require, timed
from compress.words import duration, size


def profile_stage(session: Session, *, must_be_done: bool = False) -> Profile:
    """The profile of the recipe's model, measured or as it was measured before.

    In a launch of several processes all of them call this, and share the documents; the numbers are those of one.

    Args:
        must_be_done: only read what is there.

    Raises:
        UserError: not done although it must be, or it failed (see `run_profile`).
    """
    run, recipe, say = session.run, session.recipe, session.reporter.say
    if must_be_done:
        require(session, "profile")
    refuse_upcycled(session, "profile")
    if must_be_done:
        if not run.stage_done("profile", session.profile_key()):
            raise missing(session, "profile", run.profile)
        return read_profile(run.profile, session.shape)

    def work() -> Profile:
        calibration = recipe.calibration
        documents = documents_of(session, calibration.documents, "calibration")
        training = documents_of(session, calibration.training, "calibration")
        second = None
        if calibration.second is not None:
            second = documents_of(session, calibration.documents, "calibration", calibration.second)
        with session.reporter.progress("profile") as report:
            return run_profile(
                session.measured,
                documents,
                recipe.profile.statistics,
                run.profile,
                seed=recipe.seed,
                training=training,
                second=second,
                progress=report,
                context=recipe.profile.context,
            )

    made = ["profile/profile.json", "profile/statistics.safetensors"]
    with session.together():
        _ = session.measured  # whose shape the key has
        if run.stage_done("profile", session.profile_key()):
            say(f"profile: done before, {run.profile}")
            return read_profile(run.profile, session.shape)
        profile = timed(session, "profile", session.profile_key, made, work)
    header = profile.header
    counts = ", ".join(f"{count} x {length:,} tokens" for length, count in sorted(header.documents.items()))
    say(
        f"profile: {counts}; {', '.join(header.statistics)}; {duration(header.seconds)}, "
        f"peak memory {size(header.peak_memory_bytes)}"
    )
    for name, agreement in stabilities(profile).items():
        say(f"profile: {name} on two corpora: {agreement.line()}")
    return profile
