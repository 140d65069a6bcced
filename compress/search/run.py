"""Runs a search: solver, baselines at the same cost, choice by measured loss, and the files of the run folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from compress.data.sample import Sample
from compress.errors import UserError
from compress.files import write_json, write_text
from compress.models.families import check_reordering, context_of
from compress.models.load import LoadedModel
from compress.models.prepared import prepared_for
from compress.plan import Plan
from compress.registry import budget_kinds, solvers
from compress.search.baselines import (
    CHANCE,
    DRAWN,
    EVEN,
    INTERLEAVED,
    PRUNED_ALIKE,
    baselines_of,
    chance_routed,
    drawn_baseline,
    drawn_places,
    even_layers,
    interleaved,
    kept_alike,
    pruned_alike,
    removing,
    thresholds_alike,
)
from compress.search.budget.budget import Budget, check_lengths
from compress.search.checks import section_problems
from compress.search.dense import Dense
from compress.search.measure import LossLog, Planned, Progress, best_plan, measure
from compress.search.problem import Candidate, Layers, Problem, ProfileLike, Trained
from compress.search.refine.refine import Refine, State, refine
from compress.search.response import response_loss
from compress.search.serve import FREE, Serve
from compress.search.solver import Solver, check_rows
from compress.search.words import cost_lines, serving_line, sliding_line
from compress.search.workers import Workers
from compress.words import counted

REFINED = "refined"
LONG_ENOUGH = 0.9  # of the budget's length, documents of a refinement


class SearchSection(Protocol):
    """The recipe's search section."""

    @property
    def solver(self) -> Solver:
        """What decides."""

    @property
    def budget(self) -> Budget:
        """What a plan may cost."""

    @property
    def refine(self) -> Refine | None:
        """What follows the choice."""

    @property
    def serve(self) -> Serve | None:
        """What an engine asks of the plan."""


@dataclass(frozen=True)
class SearchResult:
    """What a search leaves behind.

    Attributes:
        plan: the chosen plan (`plan.json`).
        baselines: plans to compare it with, by name (`search/<name>.json`).
        report: the content of `search/pareto.json`.
        lines: what the plan costs beside the dense model, and what serving costs, a sentence each.
    """

    plan: Plan
    baselines: dict[str, Plan]
    report: dict[str, Any]
    lines: list[str]


def make_problem(
    dense: Dense,
    profile: ProfileLike,
    budget: Budget,
    solver: Solver,
    say: Callable[[str], None] = lambda line: None,
    *,
    prepared: Sequence[Trained] = (),
    effects: ProfileLike | None = None,
    serve: Serve | None = None,
) -> Problem:
    """The problem of a model, a profile and a budget, for a solver.

    Args:
        say: called with a line on how much of a model with sliding layers can be compressed.
        prepared: targets that were trained before.
        effects: what these cost the loss to first order, None where that was not measured.
        serve: what an engine asks of the plans.

    Raises:
        UserError: the budget needs what is missing (see `Budget.rows`), the profile has no table of rules, no plan
            that the solver may choose meets the budget, or the engine cannot serve what it may choose.
    """
    dense = replace(dense, removes=solver.removes)
    rows = budget.rows(dense, sorted(profile.lengths))
    asked = tuple(budget.lengths or ())
    problem = Problem(dense, profile, rows, prepared=tuple(prepared), effects=effects, asked=asked, serve=serve)
    choices, whole = solver.choices(problem), solver.whole_layers(problem)
    if serve is not None:
        serve.check_groups(dense.shape.kv_heads)
        if serve.permute and dense.config is not None:
            check_reordering(dense.config, "search.serve.permute", "write `permute: false`")
        serve.check_targets([*choices, *(target for groups in whole.entries for target in groups)])
    for remark in whole.remarks:
        say(remark)
    problem = problem.counting(choices, whole.entries)
    least = solver.least_amounts(problem)
    if (line := sliding_line(problem, least.tolist())) is not None:
        say(line)
    if solver.spans:
        check_rows(problem, least, solver)
    return problem


def explain(
    chosen: str,
    candidates: Mapping[str, Candidate],
    losses: Mapping[str, float],
    baselines: Sequence[str],
    refined: State | None = None,
) -> str:
    """A sentence on why a plan was chosen, and on whether a baseline measured better."""
    if refined is not None and not losses:
        return (
            f"refined: from {refined.start} the measured loss fell from {refined.first:.4f} to {refined.loss:.4f}, "
            "relative to the uniform plan's; there are no held-out documents to measure a response loss on"
        )
    note = candidates[chosen].note
    if not losses:
        predicted = all(candidate.losses for candidate in candidates.values())
        least = "has the lowest predicted loss at the longest profiled length" if predicted else "is the first"
        return (
            f"{chosen} {least}, of {counted(len(candidates), 'plan')}: {note}; there are no held-out documents to "
            "measure a response loss on"
        )
    others = [losses[name] for name in candidates if name != chosen]
    why = f"{chosen} ({note}) has the lowest measured response loss, {losses[chosen]:.4f} nats"
    why += f", the next of {len(candidates)} has {min(others):.4f}" if others else ", as the only plan"
    why += "".join(f"; the {name} plan has {losses[name]:.4f}" for name in baselines)
    why += f"; the dense model has {losses['dense']:.4f}"
    better = [name for name in baselines if losses[name] < losses[chosen]]
    return why + (f". Measured better than every searched plan: {', '.join(better)}" if better else "")


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
    say: Callable[[str], None] = lambda line: None,
    effects: ProfileLike | None = None,
    workers: Workers | None = None,
) -> SearchResult:
    """Search, refine where asked, choose by measured response loss; write `plan.json` and `search/` of the run folder.

    Losses are kept in `search/response.jsonl` and a refinement's steps in `search/refine.json`, so that an interrupted
    search continues where it was. `plan.json` is written last, and every file whole or not at all.

    Args:
        held_out_documents: documents to choose by, best longer than the profiled ones; a list, or lists by length.
        folder: the run folder.
        refine_documents: what a refinement measures its loss on; the held-out ones stay unseen by it.
        seed: of the refinement's choice of documents, and of what is drawn for a baseline.
        progress: called with (done, in all, what).
        bandwidth: measures the device's bandwidth in bytes per second, for a `decode_time` that names neither a table
            nor a bandwidth.
        say: called with a line on how much of a model with sliding layers can be compressed.
        effects: what the targets that `loaded` carries prepared cost the loss to first order, None where that was not
            measured.
        workers: processes that share what is measured; None measures here alone.

    Raises:
        UserError: the budget cannot be met, a cost table cannot be used, or the profile does not fit.
    """
    solver, budget = section.solver, section.budget
    if wrong := section_problems(solver, budget, section.refine, section.serve):
        raise UserError([problem for _, problem in wrong])
    check_lengths(budget, context_of(loaded.model.config))
    dense = Dense(loaded.shape, loaded.model.dtype.itemsize, loaded.model, bandwidth=bandwidth)
    prepared, serve = prepared_for(loaded.model), section.serve
    problem = make_problem(dense, profile, budget, solver, say, prepared=prepared, effects=effects, serve=serve)
    smallest = solver.least_amounts(problem)
    documents = list(_flat(held_out_documents))

    candidates = {f"{solver.stem}-{number}": candidate for number, candidate in enumerate(solver.solve(problem))}
    baselines = dict(baselines_of(solver, problem)) | kept_alike(problem, list(candidates.values()))
    solved = list(candidates)
    refined = None
    if section.refine is not None:
        known = candidates | baselines
        layers = [candidate.layers for candidate in known.values()]
        alike = thresholds_alike(problem, solver.choices(problem))
        known |= {name: candidate for name, candidate in alike.items() if candidate.layers not in layers}
        starts = _starts(problem, known)
        if line := too_short(problem, refine_documents):
            say(line)
        refined = refine(
            loaded.model,
            problem,
            section.refine,
            starts,
            starts["uniform"],
            refine_documents,
            folder / "search",
            seed,
            progress,
            solver.ranks,
            workers,
        )
        note = f"{refined.start} refined in {refined.step} steps, loss {refined.loss:.4f} from {refined.first:.4f}"
        start = known[refined.start]
        candidates[REFINED] = Candidate(refined.layers(), note=note, importance=start.importance)
    asked = {"solver": solvers.written(solver), "budget": budget.model_dump(mode="json")}

    def searched(name: str, candidate: Candidate) -> Plan:
        given = {**asked, "solver": solver.written(candidate), "name": name, "question": candidate.note}
        return candidate.to_plan(problem, {**given, "gap": candidate.gap})

    def baseline(name: str, candidate: Candidate, task: Problem = problem) -> Plan:
        return candidate.to_plan(task, {"name": name, "question": candidate.note, "budget": asked["budget"]})

    plans = {name: searched(name, candidate) for name, candidate in candidates.items()}
    compared = {name: baseline(name, candidate) for name, candidate in baselines.items()}

    losses: dict[str, float] = {}
    log = LossLog(folder / "search" / "response.jsonl", f"{problem.shape.fingerprint} {loaded.model.dtype}")
    planned = Planned(loaded.model)

    def loss(plan: Plan | None, document: Sample) -> float:
        return response_loss(planned.of(plan), [document])

    dealt: dict[str, Any] = {}
    if workers is not None:
        dealt = {"shared": partial(workers.deal, "response"), "at_once": workers.count}
    if documents:
        losses = measure({"dense": None, **plans, **compared}, documents, loss, log, progress, **dealt)
    # Without held-out documents only the refinement has measured anything.
    chosen = REFINED if refined is not None and not losses else choose(plans, losses)
    for name, (candidate, task) in _like(solver, problem, budget, candidates[chosen], seed).items():
        baselines[name], compared[name] = candidate, baseline(name, candidate, task)
        if documents:
            losses |= measure({name: compared[name]}, documents, loss, log, progress, **dealt)
    measured: dict[str, Any] = {
        "held_out_documents": len(documents),
        "response_loss": losses.get(chosen),
        "dense_response_loss": losses.get("dense"),
    }
    serving: dict[str, Any] = {}
    if serve is not None:
        # Both by the best of the solver's plans: a refinement would be of the served ones alone.
        free = {f"{FREE}-{number}": one for number, one in enumerate(solver.solve(replace(problem, serve=None)))}
        without = {name: baseline(FREE, candidate) for name, candidate in free.items()}
        of_free = measure(without, documents, loss, log, progress, **dealt) if documents else {}
        best = choose(without, of_free)
        baselines[FREE], compared[FREE] = free[best], without[best]
        if documents:
            losses[FREE] = of_free[best]
        first = choose({name: plans[name] for name in solved}, losses)
        both = (plans[first].predicted.loss, without[best].predicted.loss)
        loss_served, loss_free = (losses[first], losses[FREE]) if documents else both
        serving = {**serve.model_dump(mode="json"), "loss": loss_served, "loss_without": loss_free}
        serving["measured"] = bool(documents)
        measured["serve"] = serving
    if serve is not None:
        # Only now, for no loss depends on the order of heads, and plans of one order share a model while they are
        # measured.
        plans = {name: serve.ordered(plan) for name, plan in plans.items()}
    plan = plans[chosen].model_copy(update={"provenance": plans[chosen].provenance | measured})
    shape = problem.shape
    report: dict[str, Any] = {
        "schema": 2,
        "model": {"architecture": shape.architecture, "fingerprint": shape.fingerprint},
        **asked,
        "limits": [row.describe(int(least)) for row, least in zip(problem.rows, smallest, strict=True)],
        "held_out": {
            "documents": len(documents),
            "lengths": sorted({document.length for document in documents}),
            "longer_than_profiled": bool(documents)
            and min(document.length for document in documents) > max(problem.lengths),
            "dense_response_loss": losses.get("dense"),
        },
        "plans": [_row(name, candidates[name], plans[name], losses) for name in plans],
        "baselines": [_row(name, baselines[name], compared[name], losses) for name in compared],
        "chosen": chosen,
        "why": explain(chosen, candidates, losses, list(compared), refined),
    }
    if refined is not None:
        report["refine"] = refined.summary()
    lines = cost_lines(plan, problem.rows)
    if serve is not None:
        report["serve"] = serving
        lines.append(serving_line(serve, serving))
    if remarks := solver.whole_layers(problem).remarks:
        report["remarks"] = remarks
    write_result(folder, report, plan, plans, compared)
    return SearchResult(plan, compared, report, lines)


def _like(
    solver: Solver, problem: Problem, budget: Budget, chosen: Candidate, seed: int
) -> dict[str, tuple[Candidate, Problem]]:
    """The baselines that are made of the chosen plan, by name, with the problem that each is a plan of."""
    if solver.removes:
        return {DRAWN: (drawn_baseline(problem, chosen, seed), problem)}
    groups = [group for layer in chosen.layers for group in layer.groups]
    found: dict[str, Candidate | None] = {}
    if solver.placed or any(group.objective is not None for group in groups):
        found |= {DRAWN: drawn_places(problem, chosen, seed), INTERLEAVED: interleaved(problem, chosen)}
    task = problem
    if any(group.by_layer for group in groups):
        found |= {EVEN: even_layers(problem, chosen), CHANCE: chance_routed(chosen)}
        task = removing(problem, budget) or problem
        found[PRUNED_ALIKE] = None if task is problem else pruned_alike(task, chosen)
    return {name: (plan, task if name == PRUNED_ALIKE else problem) for name, plan in found.items() if plan is not None}


def _starts(problem: Problem, plans: Mapping[str, Candidate]) -> dict[str, Layers]:
    """The plans that a refinement may start from, by name: they go by position, meet the budget, and are as an engine
    asks.

    Raises:
        UserError: there is no uniform plan.
    """
    if "uniform" not in plans:
        raise no_start()
    return {
        name: layers
        for name, layers in ((name, candidate.layers) for name, candidate in plans.items())
        if problem.fits(layers)
        and not any(group.by_length for layer in layers for group in layer.groups)
        and (problem.serve is None or problem.serve.holds(layers))
    }


def too_short(problem: Problem, documents: Sequence[Sample]) -> str | None:
    """What to say where a refinement's documents are shorter than the budget's lengths; None where they are not.

    Windows within a budget for long inputs hide little or nothing of short documents, so these cannot say what the
    windows lose on inputs of the budget's length.
    """
    longest, asked = max((document.length for document in documents), default=0), max(problem.budget_lengths)
    if not documents or longest >= asked * LONG_ENOUGH:
        return None
    return (
        f"refinement measures on documents of at most {longest:,} {documents[0].unit}, the budget is for {asked:,}: "
        "it does not see what windows hide there; give `calibration.documents` or `calibration.training` that length"
    )


def no_start() -> UserError:
    """What to say where a refinement has no uniform plan."""
    return UserError(
        "no uniform window meets the budget, so refinement has nothing to measure its loss by",
        where="search.refine",
        fix="raise the budget, or leave `refine` out",
    )


def choose(plans: Mapping[str, Plan], losses: Mapping[str, float]) -> str:
    """Name of the plan to use: of the lowest measured loss; without any, of the lowest predicted one, or the first."""
    if not losses and any(plan.predicted.loss is None for plan in plans.values()):
        return next(iter(plans))
    by = {name: losses[name] if losses else plan.predicted.loss or 0.0 for name, plan in plans.items()}
    return best_plan(by, {name: list(plan.predicted.of("kv").values())[-1].plan for name, plan in plans.items()})


def write_result(
    folder: Path, report: Mapping[str, Any], plan: Plan, plans: Mapping[str, Plan], baselines: Mapping[str, Plan]
) -> None:
    """Write `search/plans/<name>.json`, `search/<baseline>.json`, `search/pareto.json` and, last, `plan.json`.

    Files of an earlier search that this one does not write are removed.
    """
    wanted = {folder / "search" / "plans" / f"{name}.json": candidate.to_json() for name, candidate in plans.items()}
    wanted |= {folder / "search" / f"{name}.json": baseline.to_json() for name, baseline in baselines.items()}
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


def _row(name: str, candidate: Candidate, plan: Plan, losses: Mapping[str, float]) -> dict[str, Any]:
    """One plan in `pareto.json`."""
    row: dict[str, Any] = {
        "name": name,
        "question": candidate.note,
        "predicted_losses": dict(candidate.losses),
        "gap": candidate.gap,
        "amounts": [amount.model_dump(mode="json") for amount in plan.predicted.amounts],
        "response_loss": losses.get(name),
    }
    return row | {kind: plan.provenance[kind] for kind in budget_kinds if kind in plan.provenance}
