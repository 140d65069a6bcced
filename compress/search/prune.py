"""Runs the search of a pruned plan: candidates, a random plan of the same widths, the choice by measured loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from compress.data.sample import Sample
from compress.models.families import layers_of
from compress.models.load import LoadedModel
from compress.models.planned import planned_model
from compress.models.pruning import Kept, block_parameters, missing_biases, output_projections, parameters_per_unit
from compress.models.shape import shape_of
from compress.plan import Plan
from compress.runtime.widths import Width
from compress.search.budget.budget import Budget
from compress.search.measure import LossLog, Progress, measure
from compress.search.removal import PrunedCandidate, PruningProblem, PruningSolver, Widths, pick
from compress.search.response import response_loss

if TYPE_CHECKING:
    from collections.abc import Callable

    from compress.plan import ModelShape


class Scores(Protocol):
    """What the search of a pruned plan reads of a profile."""

    @property
    def lengths(self) -> Sequence[int]:
        """Profiled lengths in tokens."""

    def tensor(self, key: str) -> torch.Tensor:
        """One tensor of the profile."""


@dataclass(frozen=True)
class PruningResult:
    """The chosen plan, the plans of all candidates and of the baselines by name, and the content of `pareto.json`."""

    plan: Plan
    plans: dict[str, Plan]
    baselines: dict[str, Plan]
    report: dict[str, Any]


def pruning_problem(model: Any, profile: Scores, budget: Budget, shape: ModelShape | None = None) -> PruningProblem:
    """The problem of a model, a profile with scores and a budget with `parameters`; `shape` is the model's, if known.

    Raises:
        UserError: the architecture is not supported, or its layers do not divide into units.
    """
    block = block_parameters(model)
    layers = layers_of(model)

    @torch.no_grad()
    def outputs(layer: int, heads: torch.Tensor, neurons: torch.Tensor) -> tuple[list[float], list[float]]:
        attention, mlp = output_projections(layers[layer], model.config)
        pairs = ((attention, heads.flatten()), (mlp, neurons))
        found = [(module.weight.double() @ means.to(module.weight.device)).tolist() for module, means in pairs]
        return found[0], found[1]

    return PruningProblem(
        shape or shape_of(model),
        tuple(parameters_per_unit(model)),
        tuple(parameters_per_unit(model, biased=True)),
        Width.of(model.config).neurons,
        block,
        missing_biases(model),
        budget.most_parameters(block),
        profile.tensor,
        model.dtype.itemsize,
        tuple(sorted(profile.lengths)),
        outputs,
    )


def random_candidate(problem: PruningProblem, like: Sequence[Kept], seed: int) -> PrunedCandidate:
    """The plan of the same widths whose units are drawn: what the scores have to beat."""
    generator = torch.Generator().manual_seed(seed)
    shape = problem.shape

    def draw(*size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64)

    widths = []
    for layer in like:
        groups, queries, neurons = layer.widths(problem.share)
        widths.append(Widths(groups, queries // groups, neurons))
    heads = draw(shape.layers, shape.kv_heads, problem.share)
    kept = pick(problem, widths, draw(shape.layers, shape.kv_heads), heads, draw(shape.layers, problem.neurons))
    return PrunedCandidate(kept, f"drawn with seed {seed}")


def run_pruning(
    loaded: LoadedModel,
    profile: Scores,
    documents: Sequence[Sample],
    solver: PruningSolver,
    solver_facts: Mapping[str, Any],
    budget: Budget,
    folder: Path,
    progress: Progress | None,
    seed: int,
) -> PruningResult:
    """Candidates, the random baseline and measured losses.

    Args:
        documents: held-out ones, whose answers the candidates are measured on; none takes the first candidate.
        solver_facts: name and fields of the solver, for the provenance.
        folder: the run folder; measured losses are kept in `search/response.jsonl`.
        seed: of the random baseline.
    """
    problem = pruning_problem(loaded.model, profile, budget, loaded.shape)
    candidates = {f"pruned-{number}": each for number, each in enumerate(solver.solve(problem))}
    asked = {"solver": dict(solver_facts), "budget": budget.model_dump(mode="json")}
    plans = {
        name: each.to_plan(
            problem,
            # Of several scores a plan names the one that ranked its units, which its card tells.
            {
                **asked,
                "solver": {**solver_facts, "importance": each.importance},
                "name": name,
                "question": each.note,
                "gap": each.gap,
            },
        )
        for name, each in candidates.items()
    }
    losses: dict[str, float] = {}
    log = LossLog(folder / "search" / "response.jsonl", f"{problem.shape.fingerprint} {loaded.model.dtype}")
    if documents:
        losses = measure({"dense": None, **plans}, documents, _measurer(loaded.model), log, progress)
    chosen = min(plans, key=lambda name: losses[name]) if losses else next(iter(plans))
    baseline = random_candidate(problem, candidates[chosen].kept, seed)
    baselines = {"random": baseline.to_plan(problem, {"name": "random", "question": baseline.note, **asked})}
    if documents:
        losses |= measure(baselines, documents, _measurer(loaded.model), log, progress)
    rows = [_row(name, plans[name], candidates[name], losses) for name in plans]
    report = {
        "schema": 1,
        "model": {"architecture": problem.shape.architecture, "fingerprint": problem.shape.fingerprint},
        **asked,
        "limits": {"parameters": problem.most, "dense_parameters": problem.block},
        "held_out": {
            "documents": len(documents),
            "lengths": sorted({document.length for document in documents}),
            "dense_response_loss": losses.get("dense"),
        },
        "plans": rows,
        "baselines": [_row("random", baselines["random"], baseline, losses)],
        "chosen": chosen,
        "why": _why(chosen, candidates, losses),
    }
    return PruningResult(plans[chosen], plans, baselines, report)


def _measurer(model: Any) -> Callable[[Plan | None, Sample], float]:
    """Measures plans one after the other, each on a sliced model that is made once."""
    current: list[tuple[Plan, Any]] = []

    def loss(plan: Plan | None, document: Sample) -> float:
        if plan is None:
            return response_loss(model, [document])
        if not current or current[0][0] != plan:
            current[:] = [(plan, planned_model(model, plan))]
        return response_loss(current[0][1], [document])

    return loss


def _why(chosen: str, candidates: Mapping[str, PrunedCandidate], losses: Mapping[str, float]) -> str:
    """In words, what the plan removes and why it was taken."""
    note = candidates[chosen].note
    if not losses:
        return f"{chosen}: {note}" + ("; no held-out documents to choose by" if len(candidates) > 1 else "")
    return (
        f"{chosen}: {note}; response loss {losses[chosen]:.4f} nats before recovery, the lowest of "
        f"{len(candidates)} plan(s); the dense model has {losses['dense']:.4f}, a random plan of the same widths "
        f"{losses['random']:.4f}"
    )


def _row(name: str, plan: Plan, candidate: PrunedCandidate, losses: Mapping[str, float]) -> dict[str, Any]:
    """One plan in `pareto.json`."""
    predicted = plan.predicted
    dense = predicted.dense_parameters or 1
    return {
        "name": name,
        "question": candidate.note,
        "predicted_losses": {} if candidate.loss is None else {"removed": candidate.loss},
        "gap": candidate.gap,
        "parameters": predicted.parameters,
        "parameters_share": (predicted.parameters or 0) / dense,
        "kv_bytes": {str(length): size for length, size in predicted.kv_bytes.items()},
        "kv_share": {
            str(length): size / predicted.dense_kv_bytes[length] for length, size in predicted.kv_bytes.items()
        },
        "response_loss": losses.get(name),
    }
