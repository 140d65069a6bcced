"""The evaluate stage: the dense model, the plan and the baselines side by side."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compress.evaluate.compare import compare, share
from compress.evaluate.comparison import CONTROL_ROW, UNTRAINED, WINDOWS_ROW, Comparison, read_comparison
from compress.evaluate.measure import Variant, asked_for
from compress.evaluate.names import file_part
from compress.evaluate.tables import markdown
from compress.export.export import update_card
from compress.export.native import form_for
from compress.models.load import load_model
from compress.models.placement import input_device
from compress.models.planned import planned_model
from compress.models.processes import find_processes
from compress.models.trained import load_trained
from compress.plan import Plan, read_plan
from compress.recipe.schema import Recipe
from compress.report.plots import evaluation_plots
from compress.search.measure import plan_key
from compress.stages.plan import finished_plan
from compress.stages.recover import recover_stage, trained_plan
from compress.stages.session import Session
from compress.stages.stage import draw, require_weights, timed
from compress.targets.cost import Cost
from compress.train.recovery import read_recovered
from compress.train.settings import RecoverSettings
from compress.train.window_dropout import windows_only

QUALITY = "quality.svg"  # written last of the stage's plots: where it is, all are


def evaluate_stage(session: Session) -> Comparison:
    """Perplexity and recall of the dense model, the plan and the baselines; also into the checkpoint's card.

    In a launch of several processes the others call `help_evaluate`, and each makes a share of the measurements.

    Raises:
        UserError: there is no plan, a baseline is not there, or the evaluation failed (see `compare`).
    """
    run, say = session.run, session.reporter.say
    require_weights(session)
    plan = finished_plan(session)
    variants = _variants(session, plan, recover_stage(session, must_be_done=True))
    path = run.path / "evaluation.json"

    def work() -> Comparison:
        with session.reporter.progress("evaluate") as report:
            comparison = compare(**_arguments(session, variants), progress=report)
        comparison.write(path)
        return comparison

    if run.stage_done("evaluate", session.evaluate_key()):
        say(f"evaluate: done before, {path}")
        comparison = read_comparison(path)
    else:
        (run.plots / QUALITY).unlink(missing_ok=True)
        with session.together():
            comparison = timed(session, "evaluate", session.evaluate_key, ["evaluation.json"], work)
    if not (run.plots / QUALITY).is_file():
        draw(session, evaluation_plots)
    if (run.checkpoint / "config.json").is_file() and run.stage_done("export", session.export_key()):
        update_card(run.checkpoint, session.loaded, markdown(comparison))
    return comparison


def help_evaluate(session: Session) -> None:
    """What a helper does in the evaluate stage: its share of the measurements.

    Raises:
        UserError: as `evaluate_stage`.
    """
    if session.run.stage_done("evaluate", session.evaluate_key()):
        return
    with session.together():
        plan = finished_plan(session)
        share(**_arguments(session, _variants(session, plan, recover_stage(session, must_be_done=True))))


def _arguments(session: Session, variants: Sequence[Variant]) -> dict[str, Any]:
    """Of `compare` and `share`."""
    recipe = session.recipe
    return {
        "loaded": session.loaded,
        "variants": variants,
        "asked": asked_for(recipe.evaluate),
        "text": recipe.calibration.text,
        "seed": recipe.seed,
        "batch_size": recipe.evaluate.batch_size,
        "cache_dir": session.run.path / "evaluation",
        "processes": find_processes(input_device(session.loaded.model)),
    }


def _variants(session: Session, plan: Plan, weights: Path | None) -> list[Variant]:
    """The dense model, then what the recipe compares with it; with trained weights the plan before and after."""
    shape, model = session.shape, session.loaded.model
    settings = session.recipe.recover
    itemsize = model.dtype.itemsize
    evaluate = session.recipe.evaluate

    def dense(length: int) -> Cost:
        return shape.dense_cost(length, itemsize)

    plans: dict[str, Plan] = {"plan": plan}
    for name in evaluate.compare:
        if name != "plan":
            path = session.run.path / "search" / f"{name}.json"
            if not path.is_file():
                session.reporter.say(
                    f"evaluate: no row `{name}`: the search made no such plan, because none fits the budget or the "
                    "plan has nothing of the kind that it is compared in"
                )
                continue
            plans[name] = read_plan(path, shape)
    if "plan" not in evaluate.compare:
        del plans["plan"]
    variants = [Variant("dense", lambda: model, "dense", dense)]
    for label, entry in plans.items():

        def build(entry: Plan = entry) -> Any:
            return planned_model(model, entry)

        def cost(length: int, entry: Plan = entry) -> Cost:
            form = form_for(entry, model.config, session.recipe.export.form)
            return entry.cost(length, itemsize, form=form)

        if label == "plan":
            variants += _experts(session, plan, dense)
        if label == "plan" and weights is not None and settings is not None:
            after = trained_plan(plan, weights)
            trained = functools.partial(_trained, model, after, weights)
            key = f"{plan_key(after)} {read_recovered(weights).sha256}"
            variants.append(Variant("plan", trained, key, functools.partial(cost, entry=after)))
            variants.append(Variant(f"plan{UNTRAINED}", build, plan_key(plan), cost))
            variants += _controls(session, settings, weights, build, cost, dense)
        else:
            # Baselines are not trained: beside a trained plan their names say so.
            row = label if weights is None else f"{label}{UNTRAINED}"
            variants.append(Variant(row, build, plan_key(entry), cost))
    return variants


def _trained(model: Any, plan: Plan, weights: Path) -> Any:
    return load_trained(planned_model(model, plan), weights)


def _experts(session: Session, plan: Plan, dense: Callable[[int], Cost]) -> list[Variant]:
    """The models that an upcycled one is made of, but its seed; none of any other plan."""
    recipe = session.recipe
    if recipe.upcycle is None or plan.upcycle is None:
        return []
    marks = {expert.name: expert.fingerprint for expert in plan.upcycle.experts}
    device = str(input_device(session.loaded.model))

    def build(name: str) -> Any:
        return load_model(name, dtype=recipe.dtype, device=device).model

    names = recipe.upcycle.experts
    return [
        Variant(row, functools.partial(build, name), marks[name], dense)
        for row, name in zip(_expert_rows(names), names, strict=True)
    ]


def _expert_rows(names: Sequence[str]) -> list[str]:
    """The rows of experts, whose folders may have one name."""
    return [f"expert {number} {file_part(name)}" for number, name in enumerate(names, 1)]


def _controls(
    session: Session,
    settings: RecoverSettings,
    weights: Path,
    build: Callable[[], Any],
    cost: Callable[[int], Cost],
    dense: Callable[[int], Cost],
) -> list[Variant]:
    """What was trained beside the plan, as a comparison: the dense model, and the plan without its states."""
    rows = []
    if settings.control:
        control = weights / "control"

        def build_control() -> Any:
            return load_trained(copy.deepcopy(session.loaded.model), control)

        rows.append(Variant(CONTROL_ROW, build_control, read_recovered(control).sha256, dense))
    if settings.window_control:
        windows = weights / "windows"

        def build_windows() -> Any:
            return load_trained(windows_only(build()), windows)

        rows.append(Variant(WINDOWS_ROW, build_windows, read_recovered(windows).sha256, cost))
    return rows


def row_names(recipe: Recipe) -> list[str]:
    """The rows of a recipe's evaluation, as far as the search finds their plans."""
    names = ["dense"]
    for name in recipe.evaluate.compare:
        if name == "plan" and recipe.upcycle is not None:
            names += _expert_rows(recipe.upcycle.experts)
        if recipe.recover is None or name == "plan":
            names.append(name)
        if recipe.recover is not None:
            names.append(f"{name}{UNTRAINED}")
            names += [CONTROL_ROW] if name == "plan" and recipe.recover.control else []
            names += [WINDOWS_ROW] if name == "plan" and recipe.recover.window_control else []
    return names
