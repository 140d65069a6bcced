"""Runs a search: solver, baselines at the same bytes, choice by measured loss, and the files of the run folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from compress.data.sample import Sample
from compress.errors import UserError
from compress.files import write_json, write_text
from compress.models.load import LoadedModel
from compress.models.planned import planned_model, set_plan
from compress.plan import Plan
from compress.runtime.span import FULL
from compress.search.budget.budget import (
    Budget,
    check_feasible,
    check_lengths,
    dense_bytes,
    rule_keys,
    smallest_bytes,
    smallest_rule,
)
from compress.search.budget.step_time import StepTime, step_bytes
from compress.search.checks import kind_problems, parse_solver
from compress.search.measure import LossLog, Progress, best_plan, measure
from compress.search.problem import CandidatePlan, SearchProblem, Solver, positional, solver_name
from compress.search.prune import run_pruning
from compress.search.refine.refine import Refine, State, refine
from compress.search.removal import PruningSolver
from compress.search.response import response_loss
from compress.search.solvers.streaming import Streaming
from compress.search.solvers.uniform import Uniform
from compress.targets.window import SpanGrid

if TYPE_CHECKING:
    import torch

    from compress.plan import ModelShape


class ProfileLike(Protocol):
    """What a search reads of a profile."""

    @property
    def lengths(self) -> Sequence[int]:
        """Profiled lengths in tokens."""

    @property
    def grid(self) -> SpanGrid | None:
        """The grid of the rule tables, None when none were profiled."""

    def tensor(self, key: str) -> torch.Tensor:
        """One tensor of the profile."""


class SearchSection(Protocol):
    """The recipe's search section."""

    @property
    def solver(self) -> Any:
        """A solver, or its recipe form."""

    @property
    def budget(self) -> Any:
        """The `Budget`."""

    @property
    def refine(self) -> Any:
        """The `Refine` that follows the choice, or None."""


@dataclass(frozen=True)
class SearchResult:
    """What a search leaves behind.

    Attributes:
        plan: the chosen plan (`plan.json`).
        baselines: uniform plans of the same bytes by name (`search/<name>.json`).
        report: the content of `search/pareto.json`.
    """

    plan: Plan
    baselines: dict[str, Plan]
    report: dict[str, Any]


def make_problem(
    shape: ModelShape, profile: ProfileLike, budget: Budget, itemsize: int, step: StepTime | None = None
) -> SearchProblem:
    """The search problem of a profile and a budget.

    Args:
        step: time of a decode step; needed for a budget with `decode_time`.

    Raises:
        UserError: the profile has no table of rules, or no plan of its grid meets the budget.
    """
    grid = profile.grid
    if grid is None:
        raise UserError(
            "no statistic of the profile prices rules",
            where="profile.statistics",
            expected="`influence` or `hidden_mass`",
            fix="add one of them to the recipe and profile again",
        )
    lengths = tuple(sorted(profile.lengths))
    problem = SearchProblem(
        shape,
        grid,
        lengths,
        profile.tensor,
        budget.limits(shape, itemsize, lengths),
        itemsize,
        budget.key_limits(shape, lengths),
        None if step is None else budget.time_limit(shape, itemsize, lengths, step),
    )
    check_feasible(problem)
    return problem


def solve_baselines(problem: SearchProblem) -> dict[str, CandidatePlan]:
    """Uniform plans within the budget, by name.

    `uniform` and `streaming` meet it at every length. `uniform-at-longest` is the fixed window that has the budget's
    bytes at the longest length alone: the strongest uniform plan there, which may exceed the budget at shorter
    lengths (with one length it is `uniform`). A baseline that no window fits is left out.
    """
    wanted: dict[str, tuple[Solver, SearchProblem]] = {
        "uniform": (Uniform(), problem),
        "uniform-at-longest": (Uniform(), problem.only([max(problem.budget_lengths)])),
        "streaming": (Streaming(), problem),
    }
    found = {}
    for name, (solver, task) in wanted.items():
        try:
            (found[name],) = solver.solve(task)
        except UserError:
            continue
    return found


def describe_budget(problem: SearchProblem) -> dict[str, dict[str, float]]:
    """The budget by length, in bytes, visible keys and their shares, with the smallest shares that the grid could reach
    (the ceiling of what there is to save: layers that slide by themselves have nothing to give).

    The bytes are those that `kv` and `decode_time` allow together; a kind that is not limited there is left out.
    """
    rows: dict[str, dict[str, float]] = {str(length): {} for length in problem.budget_lengths}
    for length, limit in problem.byte_limits.items():
        dense = dense_bytes(problem.shape, length, problem.itemsize)
        smallest = smallest_bytes(problem.shape, problem.grid, length, problem.itemsize)
        rows[str(length)] |= {
            "dense_bytes": dense,
            "limit_bytes": limit,
            "limit_share": limit / dense,
            "smallest_share": smallest / dense,
        }
        if problem.times is not None and length in problem.times.limits:
            rows[str(length)] |= {
                "limit_time_share": problem.times.share,
                "smallest_time_share": problem.times.share_of(smallest, length),
            }
    for length, limit in problem.key_limits.items():
        dense = rule_keys(problem.shape, FULL, length)
        rows[str(length)] |= {
            "dense_keys": dense,
            "limit_keys": limit,
            "limit_density": limit / dense,
            "smallest_density": rule_keys(problem.shape, smallest_rule(problem.grid), length) / dense,
        }
    return rows


def explain(
    chosen: str,
    plans: Sequence[str],
    losses: Mapping[str, float],
    baselines: Sequence[str],
    refined: State | None = None,
) -> str:
    """In words, why a plan won, and whether a baseline did better."""
    if refined is not None and not losses:
        return (
            f"refined: from {refined.start} the measured loss fell from {refined.first:.4f} to {refined.loss:.4f}, "
            "relative to the uniform plan's; there are no held-out documents to measure a response loss on"
        )
    if not losses:
        return (
            f"{chosen} has the lowest predicted loss at the longest profiled length, of {len(plans)} plan(s); there "
            "are no held-out documents to measure a response loss on"
        )
    others = [losses[name] for name in plans if name != chosen]
    why = f"{chosen} has the lowest measured response loss, {losses[chosen]:.4f} nats"
    why += f", the next of {len(plans)} has {min(others):.4f}" if others else ", as the only plan"
    why += f"; the dense model has {losses['dense']:.4f}"
    better = [name for name in baselines if losses[name] < losses[chosen]]
    if better:
        named = ", ".join(f"{name} ({losses[name]:.4f})" for name in better)
        why += f". Measured better than every searched plan: {named}"
    return why


def run_search(
    loaded: LoadedModel,
    profile: ProfileLike,
    held_out_documents: Mapping[int, Sequence[Sample]] | Sequence[Sample],
    section: SearchSection,
    folder: Path,
    progress: Progress | None = None,
    refine_documents: Sequence[Sample] = (),
    seed: int = 0,
    bandwidth: Callable[[], float] | None = None,
) -> SearchResult:
    """Search, refine where asked, choose by measured response loss; write `plan.json` and `search/` of the run folder.

    Losses are kept in `search/response.jsonl` and a refinement's steps in `search/refine.json`, so that an interrupted
    search continues where it was. `plan.json` is written last, and every file whole or not at all.

    Args:
        held_out_documents: documents to choose by, best longer than the profiled ones; a list, or lists by length.
        folder: the run folder.
        refine_documents: what a refinement measures its loss on; the held-out ones stay unseen by it.
        seed: of the refinement's choice of documents.
        progress: called with (done, in all, what).
        bandwidth: measures the device's bandwidth in bytes per second, for a `decode_time` that names neither a table
            nor a bandwidth.

    Raises:
        UserError: the budget cannot be met, a cost table cannot be used, or the profile does not fit.
    """
    solver = parse_solver(section.solver)
    budget: Budget = section.budget
    if wrong := kind_problems(solver, budget, section.refine):
        raise UserError([found for _, found in wrong])
    check_lengths(budget, getattr(loaded.model.config, "max_position_embeddings", None))
    if isinstance(solver, PruningSolver):
        facts = {"name": solver_name(solver), **solver.model_dump(mode="json")}
        held_out = list(_flat(held_out_documents))
        pruned = run_pruning(loaded, profile, held_out, solver, facts, budget, folder, progress, seed)
        write_result(folder, pruned.report, pruned.plan, pruned.plans, pruned.baselines)
        return SearchResult(pruned.plan, pruned.baselines, pruned.report)
    shape = loaded.shape
    itemsize = loaded.model.dtype.itemsize
    step = None
    if budget.decode_time is not None:
        copied = bandwidth() if bandwidth is not None and not budget.tables and budget.bandwidth is None else None
        step = budget.step_time(shape, itemsize, profile.lengths, step_bytes(loaded.model), copied)
    problem = make_problem(shape, profile, budget, itemsize, step)
    documents = list(_flat(held_out_documents))

    candidates = {f"pareto-{number}": candidate for number, candidate in enumerate(solver.solve(problem))}
    baselines = solve_baselines(problem)
    refined = None
    if section.refine is not None:
        found = {**candidates, **baselines}
        refined = _refine(
            loaded.model, problem, section.refine, found, refine_documents, folder / "search", seed, progress
        )
        note = f"{refined.start} refined in {refined.step} steps, loss {refined.loss:.4f} from {refined.first:.4f}"
        candidates["refined"] = CandidatePlan(refined.spans(), note=note)
    asked = {
        "solver": {"name": solver_name(solver), **solver.model_dump(mode="json")},
        "budget": budget.model_dump(mode="json"),
    }
    plans = {
        name: candidate.to_plan(problem, {**asked, "name": name, "question": candidate.note, "gap": candidate.gap})
        for name, candidate in candidates.items()
    }
    uniform = {
        name: candidate.to_plan(problem, {"name": name, "budget": asked["budget"]})
        for name, candidate in baselines.items()
    }

    losses: dict[str, float] = {}
    if documents:
        log = LossLog(folder / "search" / "response.jsonl", f"{shape.fingerprint} {loaded.model.dtype}")
        wanted: dict[str, Plan | None] = {"dense": None, **plans, **uniform}
        losses = measure(wanted, documents, _measurer(loaded.model, next(iter(plans.values()))), log, progress)
    # Without held-out documents only the refinement has measured anything.
    chosen = "refined" if refined is not None and not losses else choose(plans, losses)
    plan = plans[chosen].model_copy(
        update={
            "provenance": plans[chosen].provenance
            | {
                "held_out_documents": len(documents),
                "response_loss": losses.get(chosen),
                "dense_response_loss": losses.get("dense"),
            }
        }
    )
    report = {
        "schema": 1,
        "model": {"architecture": shape.architecture, "fingerprint": shape.fingerprint},
        **asked,
        "limits": describe_budget(problem),
        "held_out": {
            "documents": len(documents),
            "lengths": sorted({document.length for document in documents}),
            "longer_than_profiled": bool(documents)
            and min(document.length for document in documents) > max(problem.lengths),
            "dense_response_loss": losses.get("dense"),
        },
        "plans": [_row(name, candidates[name], plans[name], losses) for name in plans],
        "baselines": [_row(name, baselines[name], uniform[name], losses) for name in uniform],
        "chosen": chosen,
        "why": explain(chosen, list(plans), losses, list(uniform), refined),
    }
    if refined is not None:
        report["refine"] = {
            "start": refined.start,
            "loss": refined.loss,
            "start_loss": refined.first,
            "tasks": refined.tasks,
            "steps": refined.step,
            "exhausted": refined.exhausted,
            "seconds": refined.seconds,
        }
    write_result(folder, report, plan, plans, uniform)
    return SearchResult(plan, uniform, report)


def _refine(
    model: Any,
    problem: SearchProblem,
    settings: Refine,
    found: Mapping[str, CandidatePlan],
    documents: Sequence[Sample],
    folder: Path,
    seed: int,
    progress: Progress | None,
) -> State:
    """Refine the best of the plans found, by name, that go by position and meet the budget."""
    if "uniform" not in found:
        raise no_start()
    every = {name: positional(each.decision) for name, each in found.items()}
    starts = {name: each for name, each in every.items() if each is not None and problem.fits(each)}
    return refine(model, problem, settings, starts, starts["uniform"], documents, folder, seed, progress)


def no_start() -> UserError:
    """What to say where a refinement has no uniform plan."""
    return UserError(
        "no uniform window meets the budget, so refinement has nothing to measure its loss by",
        where="search.refine",
        fix="raise the budget, or leave `refine` out",
    )


def choose(plans: Mapping[str, Plan], losses: Mapping[str, float]) -> str:
    """Name of the plan to use: the lowest measured loss, or without measurements the lowest predicted one."""
    by = {name: losses[name] if losses else plan.predicted.loss or 0.0 for name, plan in plans.items()}
    return best_plan(by, {name: plan.predicted.kv_bytes[max(plan.predicted.kv_bytes)] for name, plan in plans.items()})


def write_result(
    folder: Path, report: Mapping[str, Any], plan: Plan, plans: Mapping[str, Plan], baselines: Mapping[str, Plan]
) -> None:
    """Write `search/plans/<name>.json`, `search/<baseline>.json`, `search/pareto.json` and, last, `plan.json`.

    Files of an earlier search that this one does not write are removed.
    """
    wanted = {folder / "search" / "plans" / f"{name}.json": each.to_json() for name, each in plans.items()}
    wanted |= {folder / "search" / f"{name}.json": each.to_json() for name, each in baselines.items()}
    for old in [*(folder / "search").glob("*.json"), *(folder / "search" / "plans").glob("*.json")]:
        if old not in wanted and old.name not in ("pareto.json", "refine.json"):
            old.unlink()
    (folder / "search").mkdir(exist_ok=True)
    for path, text in wanted.items():
        write_text(path, text)
    write_json(folder / "search" / "pareto.json", dict(report))
    write_text(folder / "plan.json", plan.to_json())


def _flat(documents: Mapping[int, Sequence[Sample]] | Sequence[Sample]) -> Iterator[Sample]:
    if isinstance(documents, Mapping):
        for _, group in sorted(documents.items()):
            yield from group
    else:
        yield from documents


def _measurer(model: Any, first: Plan) -> Callable[[Plan | None, Sample], float]:
    """Measures plans on one planned model that is switched in place, and None on the dense model itself."""
    planned: list[Any] = []
    current: list[Plan] = []

    def loss(plan: Plan | None, document: Sample) -> float:
        if plan is None:
            return response_loss(model, [document])
        if not planned:
            planned.append(planned_model(model, first))
        if current != [plan]:
            set_plan(planned[0], plan)
            current[:] = [plan]
        return response_loss(planned[0], [document])

    return loss


def _row(name: str, candidate: CandidatePlan, plan: Plan, losses: Mapping[str, float]) -> dict[str, Any]:
    """One plan in `pareto.json`."""
    predicted = plan.predicted
    return {
        "name": name,
        "question": candidate.note,
        "predicted_losses": candidate.losses,
        "gap": candidate.gap,
        "kv_bytes": {str(length): size for length, size in predicted.kv_bytes.items()},
        "kv_share": {
            str(length): size / predicted.dense_kv_bytes[length] for length, size in predicted.kv_bytes.items()
        },
        "response_loss": losses.get(name),
        **{key: plan.provenance[key] for key in ("decode_time",) if key in plan.provenance},
    }
