"""What a pruning solver gets and gives: scores of heads and neurons, a budget of parameters, what stays."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field

from compress.errors import UserError
from compress.limits import LONGEST
from compress.models.pruning import Kept
from compress.plan import LayerPlan, Mlp, OutputBias, Plan, Predicted, plan_of_layers
from compress.registry import Method
from compress.targets.cost import dense_kv_bytes
from compress.targets.full import FullGroup
from compress.targets.pruned import PrunedGroup
from compress.targets.unit import LayerParameters

if TYPE_CHECKING:
    from compress.plan import ModelShape

TOLERANCE = 0.005  # share of its budget that a plan may stay below it, where that is for widths to decide
MULTIPLES = (128, 64, 32, 16, 8, 4, 2, 1)


@dataclass(frozen=True)
class PruningProblem:
    """One model, what its profile measured, and how many parameters may stay.

    Attributes:
        sizes: parameters of one head group, query head and neuron, by layer.
        biased_sizes: the same where every projection has a bias.
        neurons: of one MLP.
        block: parameters of all decoder layers of the dense model.
        missing_biases: how many more they are where every projection has a bias.
        most: how many parameters the decoder layers may have.
        tensor: reads a tensor of the profile by key, for instance `amp.heads`.
        itemsize: bytes of one number of the KV cache.
        lengths: profiled lengths in tokens, at which the KV bytes are told.
        outputs: what o_proj and down_proj of a layer make of inputs `[groups, query heads a group, head_dim]` and
            `[neurons]`, `hidden_size` numbers each.
        added: parameters that every plan has beside what stays of the dense model.
    """

    shape: ModelShape
    sizes: tuple[LayerParameters, ...]
    biased_sizes: tuple[LayerParameters, ...]
    neurons: int
    block: int
    missing_biases: int
    most: int
    tensor: Callable[[str], torch.Tensor]
    itemsize: int
    lengths: tuple[int, ...]
    outputs: Callable[[int, torch.Tensor, torch.Tensor], tuple[list[float], list[float]]]
    added: int = 0

    def compensated(self) -> PruningProblem:
        """The same for plans whose projections all get biases, which the budget has to hold, too."""
        return replace(self, sizes=self.biased_sizes, added=self.missing_biases)

    @property
    def whole(self) -> int:
        """Parameters of the decoder layers with nothing removed."""
        return self.block + self.added

    @property
    def share(self) -> int:
        """Query heads of a group."""
        return self.shape.query_heads // self.shape.kv_heads

    def parameters(self, kept: Sequence[Kept]) -> int:
        """Parameters of the decoder layers, of which that much stays."""
        left = self.whole
        for sizes, layer in zip(self.sizes, kept, strict=True):
            groups, queries, neurons = layer.widths(self.share)
            left -= sizes.removed(self.shape.kv_heads - groups, groups * self.share - queries, self.neurons - neurons)
        return left


@dataclass(frozen=True)
class Widths:
    """How many units of a layer stay: head groups, query heads of each, neurons."""

    groups: int
    queries: int
    neurons: int


@dataclass(frozen=True)
class PrunedCandidate:
    """One decision of a pruning solver.

    Attributes:
        kept: what stays, by layer.
        note: which of the solver's questions this answers.
        loss: sum of the scores that are removed, in the solver's unit.
        gap: how far that sum is from the proven smallest at most, relative; None where it was not minimised.
        bias: by layer, what is added behind o_proj and down_proj in place of what is removed.
        importance: the statistic that ranked the units; None for a drawn plan.
    """

    kept: tuple[Kept, ...]
    note: str = ""
    loss: float | None = None
    gap: float | None = None
    bias: tuple[OutputBias, ...] | None = None
    importance: str | None = None

    def to_plan(self, problem: PruningProblem, provenance: dict[str, Any]) -> Plan:
        """The plan file of this decision."""
        rows = []
        for number, layer in enumerate(self.kept):
            stays = set(layer.groups)
            rows.append(
                LayerPlan(
                    groups=tuple(
                        FullGroup() if group in stays else PrunedGroup() for group in range(problem.shape.kv_heads)
                    ),
                    queries=layer.queries,
                    mlp=None if len(layer.neurons) == problem.neurons else Mlp.of(layer.neurons),
                    bias=None if self.bias is None else self.bias[number],
                )
            )
        sizes = {"head_dim": problem.shape.head_dim, "itemsize": problem.itemsize}
        groups = sum(len(layer.groups) for layer in self.kept)
        whole = problem.shape.layers * problem.shape.kv_heads
        predicted = Predicted(
            kv_bytes={length: dense_kv_bytes(groups, length, **sizes) for length in problem.lengths},
            dense_kv_bytes={length: dense_kv_bytes(whole, length, **sizes) for length in problem.lengths},
            loss=self.loss,
            parameters=(problem if self.bias is None else problem.compensated()).parameters(self.kept),
            dense_parameters=problem.block,
        )
        return plan_of_layers(problem.shape, rows, predicted=predicted, provenance=provenance)


class PruningSolver(Method):
    """Base of every solver that removes head groups and neurons; its fields are recipe keys."""

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
    multiple: Annotated[
        int | None,
        Field(
            ge=1,
            le=LONGEST,
            description="neurons that stay are a multiple of it; null takes the largest power of two up to "
            "128 that meets the budget to within 0.5%",
        ),
    ] = None
    floor: Annotated[float, Field(gt=0, le=1, description="least share of a layer's neurons that stays")] = 0.1
    protect: Annotated[
        tuple[int, ...], Field(description="layers that are left as they are; negative ones count from the end")
    ] = ()
    compensate: Annotated[
        bool,
        Field(
            description="add the mean of what is removed as biases (FLAP); needs a statistic with means, and an "
            "architecture with biases behind o_proj and down_proj"
        ),
    ] = False

    def statistics_read(self) -> tuple[str, ...]:
        """The statistics that rank."""
        return (self.importance,) if isinstance(self.importance, str) else self.importance

    def scores_read(self) -> dict[str, str]:
        """Those that rank, and the mean inputs that compensate."""
        means = {f"{name}.head_means": "means" for name in self.statistics_read() if self.compensate}
        return dict.fromkeys(self.statistics_read(), "units") | means

    def solve(self, problem: PruningProblem) -> list[PrunedCandidate]:
        """One or more decisions whose parameters are within the budget. The same problem gives the same ones.

        Raises:
            UserError: the budget cannot be met, or the profile lacks the scores.
        """
        names = self.statistics_read()
        if len(names) == 1:
            return self.ranked_by(names[0], problem)
        return [
            replace(candidate, note=f"{name}: {candidate.note}")
            for name in names
            for candidate in self.ranked_by(name, problem)
        ]

    @abstractmethod
    def ranked_by(self, name: str, problem: PruningProblem) -> list[PrunedCandidate]:
        """The decisions by the scores of one statistic; see `solve`."""

    def counted(self, problem: PruningProblem) -> PruningProblem:
        """The problem with all that this solver's plans have counted."""
        return problem.compensated() if self.compensate else problem

    def protected(self, layers: int) -> set[int]:
        """Indices of the protected layers.

        Raises:
            UserError: there is no such layer.
        """
        wrong = [number for number in self.protect if not -layers <= number < layers]
        if wrong:
            raise UserError(
                "there is no such layer to protect",
                where="search.solver.protect",
                expected=f"-{layers} to {layers - 1}",
                found=", ".join(map(str, wrong)),
            )
        return {number % layers for number in self.protect}

    def least_neurons(self, problem: PruningProblem) -> int:
        """Neurons that stay in every layer."""
        return max(1, round(self.floor * problem.neurons))

    def scores(self, name: str, problem: PruningProblem) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of query heads `[layers, groups, query heads a group]` and of neurons `[layers, neurons]`, float64."""
        heads = problem.tensor(f"{name}.heads").double()
        neurons = problem.tensor(f"{name}.neurons").double()
        shape = problem.shape
        expected = (shape.layers, shape.kv_heads, problem.share), (shape.layers, problem.neurons)
        if (tuple(heads.shape), tuple(neurons.shape)) != expected:
            raise UserError(
                f"the scores of `{name}` do not fit the model",
                where="search.solver.importance",
                expected=f"{expected[0]} heads and {expected[1]} neurons",
                found=f"{tuple(heads.shape)} and {tuple(neurons.shape)}",
            )
        return heads, neurons

    def group_scores(self, heads: torch.Tensor) -> torch.Tensor:
        """`[..., query heads a group]` to `[...]`."""
        reduced: torch.Tensor = {"sum": heads.sum(-1), "mean": heads.mean(-1), "max": heads.amax(-1)}[self.group_score]
        return reduced

    def candidate(
        self,
        name: str,
        problem: PruningProblem,
        widths: Sequence[Widths],
        note: str,
        gap: float | None = None,
        loss: float | None = None,
    ) -> PrunedCandidate:
        """The units of the highest scores of `name` in these widths; compensated where that is asked for."""
        heads, neurons = self.scores(name, problem)
        kept = pick(problem, widths, self.group_scores(heads), heads, neurons)
        bias = self._compensation(name, problem, kept) if self.compensate else None
        return PrunedCandidate(kept, note, loss, gap, bias, name)

    def _compensation(self, name: str, problem: PruningProblem, kept: Sequence[Kept]) -> tuple[OutputBias, ...]:
        """What the removed units gave in the mean, behind both projections (arXiv 2312.11983)."""
        heads = problem.tensor(f"{name}.head_means").double().clone()
        neurons = problem.tensor(f"{name}.neuron_means").double().clone()
        biases = []
        for layer, stays in enumerate(kept):
            heads[layer].flatten(0, 1)[list(stays.query_heads(problem.share))] = 0
            neurons[layer, list(stays.neurons)] = 0
            biases.append(OutputBias.of(*problem.outputs(layer, heads[layer], neurons[layer])))
        return tuple(biases)


def pick(
    problem: PruningProblem,
    widths: Sequence[Widths],
    groups: torch.Tensor,
    heads: torch.Tensor,
    neurons: torch.Tensor,
) -> tuple[Kept, ...]:
    """The units of the highest scores; of equal ones the first.

    Args:
        widths: how many, by layer.
        groups: scores `[layers, groups]`.
        heads: scores `[layers, groups, query heads a group]`.
        neurons: scores `[layers, neurons]`.
    """
    rows = []
    for layer, width in enumerate(widths):
        chosen = top(groups[layer], width.groups)
        queries = None
        if width.queries < problem.share:
            queries = tuple(
                group * problem.share + head for group in chosen for head in top(heads[layer, group], width.queries)
            )
        rows.append(Kept(chosen, top(neurons[layer], width.neurons), queries))
    return tuple(rows)


def top(scores: torch.Tensor, count: int) -> tuple[int, ...]:
    """Indices of the highest of `[n]` scores, ascending; of equal ones the first."""
    order = torch.argsort(scores, descending=True, stable=True)
    return tuple(sorted(order[:count].tolist()))
