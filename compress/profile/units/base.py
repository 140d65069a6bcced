"""What a statistic of heads and neurons is: sums over tokens of what a layer's output projections read, and scores.

A statistic that is one expression over sums is a function with `of_columns` or `of_weights` before it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch

from compress.models.units import LayerUnits
from compress.profile.key import CORPORA, Key
from compress.profile.statistic import Item, Reads, Result, Results, Subject, SummedStatistic, Sums, not_finite
from compress.registry import statistics

AXES: Mapping[str, tuple[str, ...]] = {
    "heads": ("layer", "group", "query"),
    "neurons": ("layer", "neuron"),
    "head_means": ("layer", "group", "query", "dim"),
    "neuron_means": ("layer", "neuron"),
}
SCORES = ("heads", "neurons")
KINDS = ("query", "neuron")  # what an output projection reads: heads behind each other, or neurons


class UnitStatistic(SummedStatistic):
    """Base of the importance statistics: `<name>.heads` (layer, group, query) and `<name>.neurons` (layer, neuron).

    A higher score is a more important unit. Sums are over tokens, so that a long sample weighs more than a short one.
    A subclass sees one layer at a time.

    Attributes:
        dtype: of the sums.
    """

    reads: ClassVar[Reads] = "projections"
    dtype: ClassVar[torch.dtype] = torch.float64

    def sizes(self, layer: LayerUnits) -> Mapping[str, tuple[int, ...]]:
        """Shapes of what is summed in a layer, by name."""
        return {}

    def add(self, sums: Sums, layer: LayerUnits, kind: str, inputs: torch.Tensor) -> None:
        """Take what an output projection reads at some tokens; no sum may be replaced, only added to.

        Args:
            kind: one of `KINDS`.
            inputs: `[tokens, columns]` float32, read only.
        """

    def add_gradient(self, sums: Sums, name: str, gradient: torch.Tensor) -> None:
        """Take dLoss/dWeight of a projection for one sample; only called with `needs_gradient`.

        Args:
            name: of the projection.
            gradient: `[out, in]` float32, of the sum of -ln p over the answer's tokens.
        """

    @abstractmethod
    def scores(self, sums: Sums, counts: Mapping[str, int], layer: LayerUnits) -> dict[str, torch.Tensor]:
        """Tensors of one layer, keys of `AXES` without the layer's axis.

        Args:
            counts: how much the sums are over: `tokens` of the samples, and those of the `answers`, which the loss is
                taken on.
        """

    def unit_of(self, part: str) -> str:
        """What one number of a tensor counts."""
        return self.unit

    def begin(self, subject: Subject, lengths: Sequence[int]) -> dict[int, Sums]:
        """See `SummedStatistic.begin`; the same for every length."""
        return {
            layer.index: {
                name: torch.zeros(size, dtype=self.dtype, device=layer.output("neuron").weight.device)
                for name, size in self.sizes(layer).items()
            }
            for layer in subject.units
        }

    def count(self, item: Item) -> Mapping[str, int]:
        """Tokens and answer tokens."""
        start, end = item.sample.answer
        return {"tokens": item.sample.length, "answers": end - start}

    def bad_place(self, place: int, name: str, total: torch.Tensor) -> tuple[str, int]:
        """See `SummedStatistic.bad_place`."""
        return name, place

    def results(self, totals: Sequence[tuple[dict[int, Sums], Counter[str]]], subject: Subject) -> Results:
        """Scores over all samples; with two corpora, those of each by itself besides.

        Raises:
            UserError: a score that is NaN or infinite.
        """
        found = {Key(self.name, part): values for part, values in self._scores(totals, subject).items()}
        if len(totals) > 1:
            for corpus, total in zip(CORPORA, totals, strict=True):
                scores = self._scores([total], subject)
                found |= {Key(self.name, part, corpus=corpus): scores[part] for part in SCORES}
        return {key: Result(values, AXES[key.part], self.unit_of(key.part)) for key, values in found.items()}

    def _scores(
        self, totals: Sequence[tuple[dict[int, Sums], Counter[str]]], subject: Subject
    ) -> dict[str, torch.Tensor]:
        """Tensors with all layers, over some corpora together."""
        counts: Counter[str] = sum((counts for _, counts in totals), Counter())
        layers: list[dict[str, torch.Tensor]] = []
        for layer in subject.units:
            first, *others = [sums[layer.index] for sums, _ in totals]
            whole = {name: sum((other[name] for other in others), start=total) for name, total in first.items()}
            scores = {part: values.float().cpu() for part, values in self.scores(whole, counts, layer).items()}
            for part, values in scores.items():
                if not bool(torch.isfinite(values).all()):
                    raise not_finite(self.name, part, layer.index, "all documents")
            layers.append(scores)
        return {part: torch.stack([layer[part] for layer in layers]) for part in layers[0]}


def by_head(columns: torch.Tensor, layer: LayerUnits) -> torch.Tensor:
    """`[groups, queries, head_dim]` of the columns of the output projection of attention."""
    return columns.view(layer.groups, layer.queries, layer.head_dim)


def columns_of(layer: LayerUnits) -> dict[str, tuple[int, ...]]:
    """Shapes of one number for every column of both output projections, by kind."""
    return {kind: (layer.output(kind).in_features,) for kind in KINDS}


Expression = Callable[..., torch.Tensor]
Register = Callable[[Expression], type[UnitStatistic]]


def of_columns(name: str, unit: str, each: Callable[[torch.Tensor], torch.Tensor]) -> Register:
    """Registers `score(mean, weight)` as a statistic: sum `each` of the inputs, and make a score of the mean.

    The function gets, of an output projection, the mean of `each` over tokens, `[columns]` float64, and the weight,
    `[out, columns]`; it gives a score of every column. A head's score is the sum over its columns.

    Args:
        name: of the statistic.
        unit: what a score counts.
        each: of inputs `[tokens, columns]` float64.
    """

    def register(score: Expression) -> type[UnitStatistic]:
        class OfColumns(UnitStatistic):
            def sizes(self, layer: LayerUnits) -> Mapping[str, tuple[int, ...]]:
                return columns_of(layer)

            def add(self, sums: Sums, layer: LayerUnits, kind: str, inputs: torch.Tensor) -> None:
                sums[kind] += each(inputs.double()).sum(0)

            def scores(self, sums: Sums, counts: Mapping[str, int], layer: LayerUnits) -> dict[str, torch.Tensor]:
                heads, neurons = (
                    score(sums[kind] / counts["tokens"], layer.output(kind).weight.detach()) for kind in KINDS
                )
                return {"heads": by_head(heads, layer).sum(-1), "neurons": neurons}

        return _registered(OfColumns, name, unit, score)

    return register


def of_weights(name: str, unit: str, *, then: Expression | None = None, gradient: bool = False) -> Register:
    """Registers `number(weight)`, or `number(weight, gradient, answers)`, as a statistic: a sum over a unit's weights.

    The function gets the weight of a projection, `[out, in]`, with `gradient` also dLoss/dWeight summed over samples,
    float32, and the number of answer tokens that the loss is over. Which weights a unit has: `LayerUnits.sums`.

    Args:
        name: of the statistic.
        unit: what a score counts.
        then: of the sums over a unit's weights.
        gradient: whether gradients are needed; without them no sample is read.
    """

    def register(number: Expression) -> type[UnitStatistic]:
        class OfWeights(UnitStatistic):
            reads: ClassVar[Reads] = "projections" if gradient else "weights"
            needs_gradient: ClassVar[bool] = gradient
            dtype: ClassVar[torch.dtype] = torch.float32

            def sizes(self, layer: LayerUnits) -> Mapping[str, tuple[int, ...]]:
                modules = layer.projections if gradient else {}
                return {part: tuple(module.weight.shape) for part, module in modules.items()}

            def add_gradient(self, sums: Sums, part: str, slope: torch.Tensor) -> None:
                sums[part] += slope  # with its sign: what one sample gains another one may lose

            def scores(self, sums: Sums, counts: Mapping[str, int], layer: LayerUnits) -> dict[str, torch.Tensor]:
                def numbers(part: str) -> torch.Tensor:
                    weight = layer.projections[part].weight.detach()
                    return number(weight, sums[part], counts["answers"]) if gradient else number(weight)

                heads, neurons = layer.sums(numbers)
                return (
                    {"heads": heads, "neurons": neurons}
                    if then is None
                    else {
                        "heads": then(heads),
                        "neurons": then(neurons),
                    }
                )

        return _registered(OfWeights, name, unit, number)

    return register


def _registered(made: type[UnitStatistic], name: str, unit: str, function: Expression) -> type[UnitStatistic]:
    """The class under the name and docstring of the function that it was made of."""
    made.__name__ = made.__qualname__ = "".join(word.title() for word in name.split("_"))
    made.__module__, made.__doc__ = function.__module__, function.__doc__
    made.unit, made.gives = unit, {name: "units"}
    return statistics.register(name)(made)
