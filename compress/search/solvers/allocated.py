"""Widths layer by layer: which layers lose heads and neurons is decided together, by the plan solver's knapsack."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from compress.errors import UserError
from compress.limits import SECONDS
from compress.registry import solvers
from compress.runtime.widths import Width
from compress.search.choice.knapsack import Knapsack
from compress.search.choice.options import Options
from compress.search.choice.removal import counted
from compress.search.problem import Candidate, Problem
from compress.search.solvers.ranked import Ranked


@solvers.register("allocated")
class Allocated(Ranked):
    """Removes the smallest sum of scores over all layers together; widths may differ by layer (patched form)."""

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

    def ranked_by(self, name: str, problem: Problem) -> list[Candidate]:
        heads, neurons = self.scores(name, problem)
        groups = self.group_scores(heads) if self.unit == "group" else heads.flatten(1)
        groups, neurons = self._compared(problem, groups, neurons)
        pairs = zip(self._attention_options(problem, groups), self.neuron_options(problem, neurons), strict=True)
        options = [unit for pair in pairs for unit in pair]
        fixed = problem.parameters - sum(int(unit.costs.max()) for unit in options)
        solution = Knapsack(options, [problem.parameters_limit - fixed]).solve(
            np.ones(1), gap=self.gap, time_limit=self.time_limit
        )
        if solution is None:
            least = self.least_neurons(problem, problem.sizes[0].neurons)
            raise UserError(
                "no widths meet the budget",
                where="search.budget.parameters",
                expected=f"at most {problem.parameters_limit:,} parameters of the decoder layers",
                found=f"one head group and {least} neurons a layer stay at least (`floor`)",
                fix="raise the budget, lower `floor`, or protect fewer layers",
            )
        kept = [unit.choices[index] for unit, index in zip(options, solution.choice.tolist(), strict=True)]
        by_group, count = self.unit == "group", problem.shape.kv_heads
        rows = [
            Width(attention * (problem.queries if by_group else count), attention if by_group else count, mlp)
            for attention, mlp in zip(kept[::2], kept[1::2], strict=True)
        ]
        note = f"widths by layer: {min(r.neurons for r in rows)} to {max(r.neurons for r in rows)} neurons"
        return [self.candidate(name, problem, rows, note, solution.gap, float(solution.losses[0]))]

    def _attention_options(self, problem: Problem, scores: torch.Tensor) -> list[Options]:
        """How many head groups, or query heads of every group, stay in every layer; scores `[layers, units]`."""
        alone, by_group = self.protected(problem.shape.layers), self.unit == "group"
        units = problem.shape.kv_heads if by_group else problem.queries
        options = []
        for layer, sizes in enumerate(problem.sizes):
            steps = (units,) if layer in alone else tuple(range(1, units + 1))
            ranked = scores[layer].view(-1, units).sort(dim=1, descending=True).values
            parameters = sizes.group if by_group else sizes.query * problem.shape.kv_heads
            losses = [float(ranked[:, count:].sum()) for count in steps]
            options.append(counted(problem, None, steps, losses, parameters))
        return options

    def _compared(
        self, problem: Problem, heads: torch.Tensor, neurons: torch.Tensor
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
            sizes = [(size.group if by_group else size.query, size.neuron) for size in problem.sizes]
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
