"""Removing head groups, query heads and neurons: which go first by a statistic, and what that costs and loses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from compress.errors import UserError
from compress.limits import LONGEST
from compress.plan import LayerPlan, Mlp
from compress.profile.key import Key
from compress.registry import Method
from compress.runtime.widths import Width
from compress.search.choice.options import Options
from compress.search.problem import Layers, Place, Problem
from compress.targets.pruned import PrunedGroup

TOLERANCE = 0.005  # share of its budget that a plan may stay below it, where that is for widths to decide
MULTIPLES = (128, 64, 32, 16, 8, 4, 2, 1)
PRUNED = PrunedGroup()


def whole_width(problem: Problem, layer: int) -> Width:
    """The width of the dense layer."""
    return Width(problem.shape.query_heads, problem.shape.kv_heads, problem.sizes[layer].neurons)


def widths_of(problem: Problem, layers: Sequence[LayerPlan]) -> list[Width]:
    """What a plan leaves of every layer."""
    widths = []
    for number, layer in enumerate(layers):
        groups = len(layer.kept_groups)
        queries = groups * problem.queries if layer.queries is None else len(layer.queries)
        neurons = problem.sizes[number].neurons if layer.mlp is None else layer.mlp.kept
        widths.append(Width(queries, groups, neurons))
    return widths


@dataclass(frozen=True)
class Neurons:
    """The neurons of one layer; a choice is how many stay, those of the highest scores.

    Attributes:
        place: of the layer; it has one MLP.
        order: indices by descending score.
    """

    place: Place
    order: tuple[int, ...]
    joint: ClassVar[bool] = False
    decides_groups: ClassVar[bool] = False

    def put(self, draft: dict[str, Any], choice: int) -> None:
        """The neurons that stay; nothing where all do."""
        draft["mlp"] = None if choice == len(self.order) else Mlp.of(self.order[:choice])

    def targets(self, choice: int) -> tuple[()]:
        """See `Decided.targets`."""
        return ()

    def read(self, layer: LayerPlan) -> int:
        """How many stay."""
        return len(self.order) if layer.mlp is None else layer.mlp.kept


class Removal(Method):
    """What may be removed, and which goes first: fields that solvers share."""

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

    def protected(self, layers: int) -> set[int]:
        """Indices of the protected layers.

        Raises:
            UserError: there is no such layer.
        """
        wrong = [number for number in self.protect if not -layers <= number < layers]
        if wrong:
            raise UserError(
                "`protect` names a layer that does not exist",
                where="search.solver.protect",
                expected=f"-{layers} to {layers - 1}",
                found=", ".join(map(str, wrong)),
            )
        return {number % layers for number in self.protect}

    def least_neurons(self, problem: Problem, neurons: int) -> int:
        """Neurons that stay in a layer of so many, in whole steps of the architecture."""
        step = problem.dense.neuron_step
        return min(neurons, -(-max(1, round(self.floor * neurons)) // step) * step)

    def multiples(self, problem: Problem) -> tuple[int, ...]:
        """What the neurons that stay may be multiples of, the largest first: the one asked for, or powers of two.

        Raises:
            UserError: the architecture holds neurons in steps that the one asked for is no multiple of.
        """
        step = problem.dense.neuron_step
        if self.multiple is None:
            return tuple(multiple for multiple in MULTIPLES if multiple % step == 0)
        if self.multiple % step:
            raise UserError(
                "this architecture cannot have such numbers of neurons",
                where="search.solver.multiple",
                expected=f"a multiple of {step}: PyTorch multiplies by experts in rows of 16 bytes",
                found=f"{self.multiple}",
            )
        return (self.multiple,)

    def neuron_multiple(self, problem: Problem) -> int:
        """The one asked for, or the largest whose single step is within the tolerance of the budget."""
        multiples = self.multiples(problem)
        step, row = max(size.neuron for size in problem.sizes), problem.row("parameters")
        most = row.limit if row is not None else problem.dense.parameters
        return next((multiple for multiple in multiples if multiple * step <= TOLERANCE * most), multiples[-1])

    def least(self, problem: Problem, layers: Layers) -> Layers:
        """Layers with all removed that may be: of each the first group and the least neurons stay."""
        alone, rows = self.protected(problem.shape.layers), []
        for number, (layer, size) in enumerate(zip(layers, problem.sizes, strict=True)):
            groups = (layer.groups[0], *(PRUNED,) * (len(layer.groups) - 1))
            mlp = Mlp.of(range(self.least_neurons(problem, size.neurons)))
            rows.append(layer if number in alone else layer.model_copy(update={"groups": groups, "mlp": mlp}))
        return tuple(rows)

    def scores(self, name: str, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of query heads `[layers, groups, query heads a group]` and of neurons `[layers, neurons]`, float64.

        Raises:
            UserError: the profile has no such scores, or they do not fit the model.
        """
        heads, neurons = (problem.profile.tensor(Key(name, part)).double() for part in ("heads", "neurons"))
        expected = problem.score_shapes
        if (tuple(heads.shape), tuple(neurons.shape)) != expected:
            raise UserError(
                f"the scores of `{name}` do not fit the model",
                where="search.solver.importance",
                expected=f"{expected[0]} heads and {expected[1]} neurons",
                found=f"{tuple(heads.shape)} and {tuple(neurons.shape)}",
            )
        return heads, neurons

    def neuron_options(self, problem: Problem, scores: torch.Tensor) -> list[Options]:
        """How many neurons of every layer stay, with the summed scores of the others as the loss.

        Args:
            scores: of neurons, `[layers, neurons]`.
        """
        alone, multiple = self.protected(problem.shape.layers), self.neuron_multiple(problem)
        options = []
        for layer, size in enumerate(problem.sizes):
            count = size.neurons
            least = -(-self.least_neurons(problem, count) // multiple) * multiple
            steps = (count,) if layer in alone else (*range(least, count, multiple), count)
            ranked = scores[layer].sort(descending=True, stable=True)
            behind = torch.cat([ranked.values.cumsum(0).flip(0), scores.new_zeros(1)])
            losses = [float(behind[0]) - (float(behind[count - kept]) if kept else 0.0) for kept in steps]
            unit = Neurons((layer, 0), tuple(ranked.indices.tolist()))
            options.append(counted(problem, unit, steps, losses, size.neuron))
        return options


def counted(problem: Problem, unit: Any, steps: Sequence[int], losses: Sequence[float], parameters: int) -> Options:
    """How many of equal things stay, where each has so many parameters: one loss, and the costs of the parameters."""
    costs: NDArray[np.int64] = np.stack([problem.parameters_cost(kept * parameters) for kept in steps])
    return Options(unit, tuple(steps), np.array(losses)[:, None], costs)


def pick(
    problem: Problem,
    widths: Sequence[Width],
    groups: torch.Tensor,
    heads: torch.Tensor,
    neurons: torch.Tensor,
) -> Layers:
    """The layers of a problem with the units of the highest scores; of equal ones the first.

    Args:
        widths: how many, by layer.
        groups: scores `[layers, groups]`.
        heads: scores `[layers, groups, query heads a group]`.
        neurons: scores `[layers, neurons]`.
    """
    layers = []
    for number, (width, layer) in enumerate(zip(widths, problem.start, strict=True)):
        stay = top(groups[number], width.groups)
        queries = None
        if width.queries < problem.queries:
            queries = tuple(
                group * problem.queries + head for group in stay for head in top(heads[number, group], width.queries)
            )
        whole = width.neurons == problem.sizes[number].neurons
        layers.append(
            LayerPlan(
                groups=tuple(group if index in stay else PRUNED for index, group in enumerate(layer.groups)),
                queries=queries,
                mlp=None if whole else Mlp.of(top(neurons[number], width.neurons)),
            )
        )
    return tuple(layers)


def top(scores: torch.Tensor, count: int) -> tuple[int, ...]:
    """Indices of the highest of `[n]` scores, ascending; of equal ones the first."""
    order = torch.argsort(scores, descending=True, stable=True)
    return tuple(sorted(order[:count].tolist()))


def drawn(problem: Problem, widths: Sequence[Width], seed: int) -> Layers:
    """A plan of some widths whose units are drawn: what scores have to beat."""
    generator = torch.Generator().manual_seed(seed)
    shape = problem.shape

    def draw(*size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64)

    heads = draw(shape.layers, shape.kv_heads, problem.queries)
    return pick(
        problem, widths, draw(shape.layers, shape.kv_heads), heads, draw(shape.layers, problem.sizes[0].neurons)
    )
