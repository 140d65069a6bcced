"""Widths layer by layer: which layers lose heads and neurons is decided together, by the plan solver's knapsack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from compress.errors import UserError
from compress.limits import SECONDS
from compress.registry import solvers
from compress.search.choice.knapsack import Knapsack
from compress.search.removal import MULTIPLES, TOLERANCE, PrunedCandidate, PruningProblem, PruningSolver, Widths


@dataclass(frozen=True)
class Choices:
    """What one attention or one MLP can become.

    Attributes:
        kept: units that stay, by choice.
        losses: sum of the scores removed `[choices, 1]`.
        costs: parameters that stay `[choices, 1]`.
    """

    kept: tuple[int, ...]
    losses: NDArray[np.float64]
    costs: NDArray[np.int64]


@solvers.register("allocated")
class Allocated(PruningSolver):
    """The smallest sum of removed scores over all layers within the budget; layers differ in width (patched form)."""

    normalise: Annotated[
        Literal["none", "layer", "standard"],
        Field(
            description="how scores of different layers, and of heads and neurons, are compared: as they are; divided "
            "by their layer's sum over heads or neurons; or standardised within the layer and weighed by parameters, "
            "which amounts to one threshold for all (FLAP)"
        ),
    ] = "layer"
    gap: Annotated[float, Field(ge=0, lt=1, description="relative optimality gap to stop at")] = 0.001
    time_limit: Annotated[float, Field(gt=0, le=SECONDS, description="seconds for the solver")] = 60.0

    def ranked_by(self, name: str, problem: PruningProblem) -> list[PrunedCandidate]:
        """One candidate; see `PruningSolver.solve`."""
        problem = self.counted(problem)
        heads, neurons = self.scores(name, problem)
        groups = self.group_scores(heads) if self.unit == "group" else heads.flatten(1)
        groups, neurons = self._compared(problem, groups, neurons)
        alone = self.protected(problem.shape.layers)
        multiple = self._multiple(problem)
        choices = []
        for layer, sizes in enumerate(problem.sizes):
            free = layer not in alone
            if self.unit == "group":
                kept = tuple(range(1 if free else problem.shape.kv_heads, problem.shape.kv_heads + 1))
                ranked, each = groups[layer].sort(descending=True).values, sizes.group
                losses = [float(ranked[count:].sum()) for count in kept]
            else:
                kept = tuple(range(1 if free else problem.share, problem.share + 1))
                own = groups[layer].view(problem.shape.kv_heads, problem.share)
                ranked, each = own.sort(dim=1, descending=True).values, sizes.query * problem.shape.kv_heads
                losses = [float(ranked[:, count:].sum()) for count in kept]
            choices.append(_choices(kept, losses, each))
            least = -(-self.least_neurons(problem) // multiple) * multiple
            steps = (*range(least, problem.neurons, multiple), problem.neurons) if free else (problem.neurons,)
            behind = torch.cat([neurons[layer].sort(descending=True).values.cumsum(0).flip(0), neurons.new_zeros(1)])
            total = float(behind[0])
            losses = [total - (float(behind[problem.neurons - count]) if count else 0.0) for count in steps]
            choices.append(_choices(steps, losses, sizes.neuron))
        fixed = problem.whole - sum(int(each.costs.max()) for each in choices)
        solution = Knapsack(choices, [problem.most - fixed]).solve(np.ones(1), gap=self.gap, time_limit=self.time_limit)
        if solution is None:
            raise UserError(
                "no widths meet the budget",
                where="search.budget.parameters",
                expected=f"at most {problem.most:,} parameters of the decoder layers",
                found=f"one head group and {self.least_neurons(problem)} neurons a layer stay at least (`floor`)",
                fix="raise the budget, lower `floor`, or protect fewer layers",
            )
        kept_units = [each.kept[index] for each, index in zip(choices, solution.choice.tolist(), strict=True)]
        by_group = self.unit == "group"
        rows = [
            Widths(attention if by_group else problem.shape.kv_heads, problem.share if by_group else attention, mlp)
            for attention, mlp in zip(kept_units[::2], kept_units[1::2], strict=True)
        ]
        note = f"widths by layer: {min(r.neurons for r in rows)} to {max(r.neurons for r in rows)} neurons"
        return [self.candidate(name, problem, rows, note, solution.gap, float(solution.losses[0]))]

    def _multiple(self, problem: PruningProblem) -> int:
        """The one asked for, or the largest whose single step is within the tolerance of the budget."""
        if self.multiple is not None:
            return self.multiple
        step = max(sizes.neuron for sizes in problem.sizes)
        return next((each for each in MULTIPLES if each * step <= TOLERANCE * problem.most), 1)

    def _compared(
        self, problem: PruningProblem, heads: torch.Tensor, neurons: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores `[layers, units]` of both kinds in a unit that all share; never negative: removing more never gains.

        Standardised scores count a parameter, so the least sum within the budget takes what lies below one threshold.
        """
        if self.normalise == "layer":
            return _shares(heads), _shares(neurons)
        if self.normalise == "standard":
            heads, neurons = _standardised(heads), _standardised(neurons)
            lowest = torch.minimum(heads.min(), neurons.min())
            by_group = self.unit == "group"
            sizes = [(each.group if by_group else each.query, each.neuron) for each in problem.sizes]
            weights = torch.tensor(sizes, dtype=heads.dtype)
            return (heads - lowest) * weights[:, :1], (neurons - lowest) * weights[:, 1:]
        return heads, neurons


def _shares(scores: torch.Tensor) -> torch.Tensor:
    """`[layers, units]` over the sum of their layer."""
    return scores / scores.sum(1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


def _standardised(scores: torch.Tensor) -> torch.Tensor:
    """`[layers, units]` with mean 0 and spread 1 in every layer."""
    spread = scores.std(1, keepdim=True, correction=0).clamp(min=torch.finfo(scores.dtype).tiny)
    return (scores - scores.mean(1, keepdim=True)) / spread


def _choices(kept: tuple[int, ...], losses: list[float], each: int) -> Choices:
    return Choices(kept, np.array(losses)[:, None], np.array([[count * each] for count in kept], dtype=np.int64))
