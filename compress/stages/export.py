"""The export stage: the verified checkpoint."""

from __future__ import annotations

from pathlib import Path

from compress.export.export import ExportReport, export_checkpoint
from compress.export.staging import refuse_existing
from compress.stages.plan import finished_plan
from compress.stages.recover import recover_stage, trained_plan
from compress.stages.session import Session
from compress.stages.stage import require_weights, timed
from compress.words import size


def export_stage(session: Session, *, overwrite: bool = False) -> Path:
    """The verified checkpoint. A checkpoint that an earlier export of this run wrote is replaced.

    Raises:
        UserError: there is no plan, or `checkpoint/` holds something that no export of this run wrote and `overwrite`
            is not given, or the export failed (see `export_checkpoint`).
    """
    run, recipe, say = session.run, session.recipe, session.reporter.say
    check_target(session, overwrite)
    require_weights(session)
    plan = finished_plan(session)
    weights = recover_stage(session, must_be_done=True)
    if run.stage_done("export", session.export_key()):
        say(f"export: done before, {run.checkpoint}")
        return run.checkpoint
    run.begin("export")

    def work() -> ExportReport:
        return export_checkpoint(
            session.loaded,
            trained_plan(plan, weights),
            run.checkpoint,
            weights=weights,
            recipe_text=recipe.text,
            form=recipe.export.form,
            dtype=recipe.export.dtype,
            max_shard_size=recipe.export.max_shard_size,
            overwrite=True,
            progress=lambda line: say(f"  export: {line}"),
        )

    report = timed(session, "export", session.export_key, ["checkpoint/config.json"], work)
    checks = report.checks
    say(f"export: {report.path}, {size(report.bytes)}")
    say(f"export: {checks.words()}")
    return run.checkpoint


def check_target(session: Session, overwrite: bool) -> None:
    """Refuse to replace a checkpoint that no export of this run wrote, before anything is done.

    Raises:
        UserError: there is one, and `overwrite` is not given.
    """
    refuse_existing(session.run.checkpoint, overwrite or session.run.began("export"))
