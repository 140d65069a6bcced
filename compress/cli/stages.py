"""The stages of a run, as one function each: skip what is done, say what is missing, do it, note it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from compress.cli.output import duration, progress, say, size
from compress.cli.recovery import recover_stage
from compress.errors import UserError

if TYPE_CHECKING:
    from compress.cli.session import Session
    from compress.data.document import Document
    from compress.evaluate.comparison import Comparison
    from compress.plan import Plan
    from compress.profile.store import Profile
    from compress.registry import Method

Result = TypeVar("Result")
SPANS, QUALITY = "spans.svg", "quality.svg"  # written last of a stage's plots: where they are, all are

# Why a refinement measured no exchange, by whether nothing was left to try.
NO_STEPS = {
    True: "; no exchange within the budget is better by the quadratic model, so none was measured",
    False: "; the time ended before the first exchange, raise `search.refine.minutes`",
}


def profile_stage(session: Session, *, must_be_done: bool = False) -> Profile:
    """Calibration documents and the statistics taken on them.

    Args:
        must_be_done: only read what is there.

    Raises:
        UserError: not done although it must be, or it failed (see `run_profile`).
    """
    from compress.profile.run import run_profile
    from compress.profile.stability import stabilities
    from compress.profile.store import read_profile

    run, recipe = session.run, session.recipe
    if must_be_done:
        require(session, "profile")
    key = session.profile_key()
    if run.stage_done("profile", key):
        if not must_be_done:
            say(f"profile: done before, {run.profile}")
        return read_profile(run.profile, session.shape)
    if must_be_done:
        raise missing(session, "profile", run.profile)

    def work() -> Profile:
        documents = _documents(session, recipe.calibration.documents, "calibration")
        training = _documents(session, recipe.calibration.training, "calibration")
        other = recipe.calibration.second
        second = None if other is None else _documents(session, recipe.calibration.documents, "calibration", other)
        statistics: Any = recipe.profile.statistics
        with progress("profile") as report:
            return run_profile(
                session.loaded,
                documents,
                statistics,
                run.profile,
                seed=recipe.seed,
                training=training,
                second=second,
                progress=report,
            )

    profile = timed(
        session, "profile", session.profile_key, ["profile/profile.json", "profile/statistics.safetensors"], work
    )
    header = profile.header
    counts = ", ".join(f"{count} x {length:,} tokens" for length, count in sorted(header.documents.items()))
    say(
        f"profile: {counts}; {', '.join(header.statistics)}; {duration(header.seconds)}, "
        f"peak memory {size(header.peak_memory_bytes)}"
    )
    for name, found in stabilities(profile).items():
        say(f"profile: {name} on two corpora: {found.line()}")
    return profile


def search_stage(session: Session, *, must_be_done: bool = False) -> Plan:
    """The plan, chosen by measured loss on the held-out documents. Arguments and errors as in `profile_stage`."""
    from compress.bench.measure import copy_bandwidth
    from compress.plan import read_plan
    from compress.plots.run import search_plots
    from compress.search.run import run_search

    run, recipe = session.run, session.recipe
    if must_be_done:
        require(session, "search")
    elif not run.may_be_done("search", session.outline(session.search_key)):
        require(session, "profile")
    key = session.search_key()
    if run.stage_done("search", key):
        if not must_be_done:
            say(f"search: done before, {run.plan}")
            if not (run.plots / SPANS).is_file():
                _draw(search_plots, run.path)
        return read_plan(run.plan, session.shape)
    if must_be_done:
        raise missing(session, "search", run.plan)
    profile = profile_stage(session, must_be_done=True)

    def work() -> Any:
        held_out = _documents(session, recipe.calibration.held_out, "held_out")
        section: Any = recipe.search
        learnt: list[Document] = []
        if section.refine is not None:
            for requests in (recipe.calibration.documents, recipe.calibration.training):
                for _, group in sorted(_documents(session, requests, "calibration").items()):
                    learnt += group
        with progress("search") as report:
            return run_search(
                session.loaded,
                profile,
                held_out,
                section,
                run.path,
                progress=report,
                refine_documents=learnt,
                seed=recipe.seed,
                bandwidth=lambda: copy_bandwidth(session.loaded.model.device),
                say=lambda line: say(f"search: {line}"),
            )

    (run.plots / SPANS).unlink(missing_ok=True)
    result = timed(session, "search", session.search_key, ["plan.json", "search"], work)
    plan: Plan = result.plan
    if "refine" in result.report:
        told = result.report["refine"]
        say(
            f"search: refined {told['start']} in {told['steps']} steps and {duration(told['seconds'])}: loss "
            f"{told['start_loss']:.4f} to {told['loss']:.4f}, relative to the uniform plan's"
            + ("" if told["steps"] else NO_STEPS[told["exhausted"]])
        )
    say(f"search: {result.report['why']}")
    for line in result.lines:
        say(f"search: {line}")
    for length, used in sorted(plan.predicted.kv_bytes.items()):
        dense = plan.predicted.dense_kv_bytes[length]
        say(f"search: KV cache at {length:,} tokens {size(used)}, {used / dense:.1%} of the dense model's")
    _draw(search_plots, run.path)
    return plan


def export_stage(session: Session, *, overwrite: bool = False) -> Path:
    """The verified checkpoint. A checkpoint that an earlier export of this run wrote is replaced.

    Raises:
        UserError: there is no plan, or `checkpoint/` holds something that no export of this run wrote and `overwrite`
            is not given, or the export failed (see `export_checkpoint`).
    """
    run, recipe = session.run, session.recipe
    check_target(session, overwrite)
    require(session, *_needed(session))
    from compress.export.export import export_checkpoint

    plan = search_stage(session, must_be_done=True)
    weights = recover_stage(session, must_be_done=True)
    if run.stage_done("export", session.export_key()):
        say(f"export: done before, {run.checkpoint}")
        return run.checkpoint
    run.begin("export")

    def work() -> Any:
        return export_checkpoint(
            session.loaded,
            plan,
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
    say(
        f"export: a fresh process without `compress` loads it as {checks.loaded_as}; largest logit difference "
        f"{checks.logit_difference:.1e} (allowed {checks.tolerance:.0e}); cache at {checks.probe_tokens:,} tokens "
        f"{size(checks.cache_bytes)} as predicted, dense {size(checks.dense_bytes)}"
    )
    return run.checkpoint


def evaluate_stage(session: Session) -> Comparison:
    """Perplexity and recall of the dense model, the plan and the baselines; also into the checkpoint's card.

    Raises:
        UserError: there is no plan, a baseline is not there, or the evaluation failed (see `compare`).
    """
    from compress.evaluate.compare import compare
    from compress.evaluate.comparison import read_comparison
    from compress.plots.run import evaluation_plots

    run, recipe = session.run, session.recipe
    require(session, *_needed(session))
    plan = search_stage(session, must_be_done=True)
    variants = _variants(session, plan, recover_stage(session, must_be_done=True))
    path = run.path / "evaluation.json"
    request: Any = recipe.evaluate.perplexity
    tasks: Any = recipe.evaluate.recall
    harness: Any = recipe.evaluate.lm_eval
    timing: Any = recipe.evaluate.latency

    def work() -> Comparison:
        with progress("evaluate") as report:
            comparison = compare(
                session.loaded,
                variants,
                perplexity_request=request,
                recall_requests=tasks,
                recall_text=None if request is not None else _text(session),
                harness_request=harness,
                latency_request=timing,
                seed=recipe.seed,
                batch_size=recipe.evaluate.batch_size,
                cache_dir=run.path / "evaluation",
                progress=report,
            )
        comparison.write(path)
        return comparison

    if run.stage_done("evaluate", session.evaluate_key()):
        say(f"evaluate: done before, {path}")
        comparison = read_comparison(path)
    else:
        (run.plots / QUALITY).unlink(missing_ok=True)
        comparison = timed(session, "evaluate", session.evaluate_key, ["evaluation.json"], work)
    if not (run.plots / QUALITY).is_file():
        _draw(evaluation_plots, run.path)
    if (run.checkpoint / "config.json").is_file() and run.stage_done("export", session.export_key()):
        from compress.export.export import update_card

        update_card(run.checkpoint, session.loaded, markdown(comparison))
    return comparison


def markdown(comparison: Comparison) -> str:
    """The tables of a comparison in Markdown, with their conditions above and below."""
    return "\n\n".join(_markdown_table(table) for table in comparison.tables())


def _markdown_table(table: Any) -> str:
    """One rich table in Markdown."""
    heads = [str(column.header).replace("\n", " ") for column in table.columns]
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    lines = [str(table.title), "", f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    lines += [f"| {' | '.join(row)} |" for row in zip(*cells, strict=True)]
    return "\n".join([*lines, *(["", str(table.caption)] if table.caption else [])])


def _variants(session: Session, plan: Plan, weights: Path | None) -> list[Any]:
    """The dense model, then what the recipe compares with it; with trained weights the plan before and after."""
    from compress.evaluate.compare import Variant
    from compress.evaluate.comparison import UNTRAINED
    from compress.models.planned import planned_model
    from compress.plan import read_plan
    from compress.search.measure import plan_key

    shape, model = session.shape, session.loaded.model
    itemsize = model.dtype.itemsize
    evaluate: Any = session.recipe.evaluate
    asked = [*evaluate.recall, *([evaluate.perplexity] if evaluate.perplexity is not None else [])]
    suites: tuple[int, ...] = evaluate.lm_eval.lengths if evaluate.lm_eval and evaluate.lm_eval.suites else ()
    lengths = sorted({int(request.length) for request in asked} | set(suites))
    plans = {"plan": plan}
    for name in evaluate.compare:
        if name != "plan":
            path = session.run.path / "search" / f"{name}.json"
            if not path.is_file():
                say(f"evaluate: the search left no plan `{name}` within the budget, so there is no such row")
                continue
            plans[name] = read_plan(path, shape)
    if "plan" not in evaluate.compare:
        del plans["plan"]
    dense = {length: shape.dense_cost(length, itemsize).held_bytes for length in lengths}
    variants = [Variant("dense", lambda: model, "dense", dense)]
    for name, entry in plans.items():
        held = {length: entry.cost(length, itemsize).held_bytes for length in lengths}

        def build(entry: Plan = entry) -> Any:
            return planned_model(model, entry)

        if name == "plan" and weights is not None:
            variants += _recovered(session, weights, plan, build, held, dense)
        else:
            # Baselines are not trained: beside a trained plan their names say so.
            label = name if weights is None else f"{name}{UNTRAINED}"
            variants.append(Variant(label, build, plan_key(entry), held))
    return variants


def _recovered(
    session: Session,
    weights: Path,
    plan: Plan,
    build: Callable[[], Any],
    held: dict[int, int],
    dense: dict[int, int],
) -> list[Any]:
    """The plan with its trained weights, without them, and the dense model trained alike, where there is one."""
    from compress.evaluate.compare import Variant
    from compress.evaluate.comparison import CONTROL_ROW, UNTRAINED
    from compress.models.trained import load_trained
    from compress.search.measure import plan_key
    from compress.train.recovery import read_recovered

    key = plan_key(plan)
    trained = Variant("plan", lambda: load_trained(build(), weights), f"{key} {read_recovered(weights).sha256}", held)
    rows = [trained, Variant(f"plan{UNTRAINED}", build, key, held)]
    settings: Any = session.recipe.recover
    if settings.control:
        control = weights / "control"

        def build_control() -> Any:
            return load_trained(copy.deepcopy(session.loaded.model), control)

        rows.append(Variant(CONTROL_ROW, build_control, read_recovered(control).sha256, dense))
    return rows


def _documents(
    session: Session, requests: Sequence[Method], part: str, text: Method | None = None
) -> dict[int, list[Document]]:
    """The documents of a part of a text (without one, the calibration's), with the dense model's answers."""
    from compress.data.calibration import calibration_documents

    if not requests:
        return {}
    given: Any = {"requests": requests, "text": text or _text(session), "split": part}
    with progress(f"documents ({part.replace('_', ' ')})") as report:
        return calibration_documents(
            session.loaded,
            seed=session.recipe.seed,
            cache_dir=session.run.path / "calibration",
            progress=report,
            **given,
        )


def _text(session: Session) -> Any:
    return session.recipe.calibration.text


def _draw(plots: Callable[[Path], list[Path]], folder: Path) -> None:
    """Plots of a stage that is done; where matplotlib is missing, one line that says how to get it."""
    from compress.plots.figure import EXTRA

    try:
        written = plots(folder)
    except ImportError:
        say(f"plots: skipped, matplotlib is not installed ({EXTRA})")
        return
    if written:
        say("plots: " + ", ".join(str(path) for path in written))


def timed(session: Session, stage: str, key: Callable[[], str], made: list[str], work: Callable[[], Result]) -> Result:
    """Run a stage, note its time, and mark it as done. Until then it counts as not done, whatever lies there.

    A helper works, too, and leaves the notes to the main process.

    Args:
        key: makes the stage's key, of the session.
    """
    if session.helper:
        return work()
    run = session.run
    depends = key()
    say(f"{stage}: starting")
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
        "profile": (session.profile_key, run.profile),
        "search": (session.search_key, run.plan),
        "recover": (session.recover_key, run.path / "recover"),
        "control": (session.control_key, run.path / "recover"),
    }
    for stage in stages:
        key, where = places[stage]
        if not run.may_be_done(stage, session.outline(key)):
            raise missing(session, "recover" if stage == "control" else stage, where)


def _needed(session: Session) -> list[str]:
    """The stages whose results a checkpoint, or its evaluation, is made of."""
    settings: Any = session.recipe.recover
    if settings is None:
        return ["search"]
    return ["search", "recover", *(["control"] if settings.control else [])]


def check_target(session: Session, overwrite: bool) -> None:
    """Refuse to replace a checkpoint that no export of this run wrote, before anything is done.

    Raises:
        UserError: there is one, and `overwrite` is not given.
    """
    from compress.export.staging import refuse_existing

    refuse_existing(session.run.checkpoint, overwrite or session.run.began("export"))


def missing(session: Session, stage: str, where: Path) -> UserError:
    """What to say when a command needs a stage that was not run, or was run for another recipe."""
    older = session.run.began(stage)
    return UserError(
        f"the {stage} stage was run for an earlier form of this recipe" if older else f"the {stage} stage is missing",
        where=str(where),
        fix=f"compress {stage} {session.recipe.source}, or all at once: compress run {session.recipe.source}",
    )
