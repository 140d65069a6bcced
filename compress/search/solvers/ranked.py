"""What the solvers share that only remove: whose scores, of which units, and what is added in their place."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from compress.errors import placed
from compress.models.pruning import check_output_biases
from compress.plan import OutputBias
from compress.profile.key import Key
from compress.runtime.widths import Width
from compress.search.choice.removal import Removal, pick, whole_width
from compress.search.problem import Candidate, Layers, Problem
from compress.search.solver import Solver


class Ranked(Removal, Solver):
    """Base of the solvers that only remove; their budget is one of parameters."""

    stem: ClassVar[str] = "pruned"

    importance: Annotated[
        str | tuple[str, ...],
        Field(
            min_length=1,
            description="the statistic that ranks heads and neurons: amp, wanda_sp, flap, taylor, ...; several are "
            "several plans, of which held-out loss chooses",
        ),
    ] = "amp"
    group_score: Annotated[
        Literal["sum", "mean", "max"],
        Field(description="score of a head group from those of its query heads; mean is MoP's"),
    ] = "mean"
    unit: Annotated[
        Literal["group", "query"],
        Field(
            description="group removes key/value heads with their query heads; query the same number of query heads "
            "from every group, whose keys and values stay"
        ),
    ] = "group"
    compensate: Annotated[
        bool,
        Field(
            description="add the mean of what is removed as biases (FLAP); needs a statistic with means, and an "
            "architecture with biases behind o_proj and down_proj"
        ),
    ] = False

    @property
    def spans(self) -> bool:
        return False

    @property
    def removes(self) -> bool:
        return True

    def statistics_read(self) -> tuple[str, ...]:
        """The statistics that rank."""
        return (self.importance,) if isinstance(self.importance, str) else self.importance

    def most_plans(self, lengths: int) -> int:
        return len(self.statistics_read())

    def scores_read(self) -> dict[str, str]:
        """Those that rank, and the mean inputs that compensate."""
        means = {f"{name}.head_means": "means" for name in self.statistics_read() if self.compensate}
        return dict.fromkeys(self.statistics_read(), "units") | means

    def smallest(self, problem: Problem) -> Layers:
        """One group, or one query head of every group, and the least neurons of each layer; see `Solver.smallest`."""
        if self.unit == "group":
            return self.least(problem, problem.start)
        alone, rows = self.protected(problem.shape.layers), []
        for number, size in enumerate(problem.sizes):
            groups = problem.shape.kv_heads
            least = Width(groups, groups, self.least_neurons(problem, size.neurons))
            rows.append(whole_width(problem, number) if number in alone else least)
        heads, neurons = (torch.zeros(sizes) for sizes in problem.score_shapes)
        return pick(problem, rows, heads.sum(-1), heads, neurons)

    def solve(self, problem: Problem) -> list[Candidate]:
        """The plans of every statistic that ranks; see `Solver.solve`."""
        names = self.statistics_read()
        asked = problem.compensated() if self.compensate else problem
        plans = [(name, candidate) for name in names for candidate in self.ranked_by(name, asked)]
        return [
            replace(candidate, note=f"{name}: {candidate.note}") if len(names) > 1 else candidate
            for name, candidate in plans
        ]

    def written(self, candidate: Candidate) -> dict[str, Any]:
        """Of several scores the one that ranked the plan's units, which its card says."""
        return super().written(candidate) | {"importance": candidate.importance}

    def check(self, problem: Problem) -> list[Candidate]:
        """See `Solver.check`; a model whose architecture has no place for what compensates is refused, too."""
        if self.compensate:
            with placed("search.solver.compensate"):
                check_output_biases(problem.dense.config)
        return super().check(problem)

    def group_scores(self, heads: torch.Tensor) -> torch.Tensor:
        """`[..., query heads a group]` to `[...]`."""
        reduced: torch.Tensor = {"sum": heads.sum(-1), "mean": heads.mean(-1), "max": heads.amax(-1)}[self.group_score]
        return reduced

    @abstractmethod
    def ranked_by(self, name: str, problem: Problem) -> list[Candidate]:
        """The decisions by the scores of one statistic, within the row `parameters`; see `solve`."""

    def candidate(
        self,
        name: str,
        problem: Problem,
        widths: Sequence[Width],
        note: str,
        gap: float | None = None,
        loss: float | None = None,
    ) -> Candidate:
        """The units of the highest scores of `name` in these widths; compensated where that is asked for."""
        heads, neurons = self.scores(name, problem)
        layers = pick(problem, widths, self.group_scores(heads), heads, neurons)
        if self.compensate:
            layers = self._compensated(name, problem, layers)
        return Candidate(layers, {} if loss is None else {"removed": loss}, gap, note, name)

    def _compensated(self, name: str, problem: Problem, layers: Layers) -> Layers:
        """With what the removed units gave in the mean, behind both projections (arXiv 2312.11983)."""
        heads = problem.profile.tensor(Key(name, "head_means")).double().clone()
        neurons = problem.profile.tensor(Key(name, "neuron_means")).double().clone()
        rows = []
        for number, layer in enumerate(layers):
            queries = [group * problem.queries + head for group in layer.kept_groups for head in range(problem.queries)]
            heads[number].flatten(0, 1)[list(layer.queries or queries)] = 0
            neurons[number, slice(None) if layer.mlp is None else list(layer.mlp.indices())] = 0
            bias = OutputBias.of(*problem.dense.outputs(number, heads[number], neurons[number]))
            rows.append(layer.model_copy(update={"bias": bias}))
        return tuple(rows)
