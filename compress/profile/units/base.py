"""What a statistic of heads and neurons is: sums over tokens of what a layer's output projections read, and scores.

A statistic that is one expression over sums has `ColumnStatistic` or `WeightStatistic` as its base.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from compress.models.stream import holding
from compress.models.units import LayerUnits
from compress.profile.key import CORPORA, Key
from compress.profile.statistic import Item, Reads, Result, Results, Subject, SummedStatistic, Sums, not_finite

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
    by_rows: ClassVar[bool] = True
    dtype: ClassVar[torch.dtype] = torch.float64

    @property
    def reads_inputs(self) -> bool:
        return type(self).add is not UnitStatistic.add

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
                name: torch.zeros(size, dtype=self.dtype, device=subject.places[layer.index])
                for name, size in self.sizes(layer).items()
            }
            for layer in subject.units
        }

    def count(self, item: Item) -> Mapping[str, int]:
        start, end = item.sample.rows
        return {"tokens": item.sample.length, "answers": end - start}

    def bad_place(self, place: int, name: str, total: torch.Tensor) -> tuple[str, int]:
        return name, place

    def results(self, totals: Sequence[tuple[dict[int, Sums], Counter[str]]], subject: Subject) -> Results:
        """Scores over all samples; with two corpora, those of each by itself besides.

        Raises:
            UserError: a score that is NaN or infinite.
        """
        tensors = {Key(self.registered, part): values for part, values in self._scores(totals, subject).items()}
        if len(totals) > 1:
            for corpus, total in zip(CORPORA, totals, strict=True):
                scores = self._scores([total], subject)
                tensors |= {Key(self.registered, part, corpus=corpus): scores[part] for part in SCORES}
        return {key: Result(values, AXES[key.part], self.unit_of(key.part)) for key, values in tensors.items()}

    def _scores(
        self, totals: Sequence[tuple[dict[int, Sums], Counter[str]]], subject: Subject
    ) -> dict[str, torch.Tensor]:
        """Tensors with all layers, over some corpora together."""
        counts: Counter[str] = sum((counts for _, counts in totals), Counter())
        layers: list[dict[str, torch.Tensor]] = []
        for layer in subject.units:
            first, *others = [sums[layer.index] for sums, _ in totals]
            whole = {name: sum((other[name] for other in others), start=total) for name, total in first.items()}
            with holding(subject.model, layer.index):
                scores = {part: values.float().cpu() for part, values in self.scores(whole, counts, layer).items()}
            for part, values in scores.items():
                if not bool(torch.isfinite(values).all()):
                    raise not_finite(self.registered, part, layer.index, "all documents")
            layers.append(scores)
        return {part: torch.stack([layer[part] for layer in layers]) for part in layers[0]}


def by_head(columns: torch.Tensor, layer: LayerUnits) -> torch.Tensor:
    """`[groups, queries, head_dim]` of the columns of the output projection of attention."""
    return columns.view(layer.groups, layer.queries, layer.head_dim)


def columns_of(layer: LayerUnits) -> dict[str, tuple[int, ...]]:
    """Shapes of one number for every column of both output projections, by kind."""
    return {kind: (layer.output(kind).weight.shape[-1],) for kind in KINDS}


class ColumnStatistic(UnitStatistic):
    """Base of statistics that score every column of an output projection by the mean of one expression over tokens.

    The score of a head is the sum over its columns.
    """

    @abstractmethod
    def term(self, inputs: torch.Tensor) -> torch.Tensor:
        """The expression whose mean over tokens is taken, of inputs `[tokens, columns]` float64."""

    @abstractmethod
    def score(self, mean: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`[columns]` float64, from means `[columns]` and the projection's weight `[out, columns]`."""

    def sizes(self, layer: LayerUnits) -> Mapping[str, tuple[int, ...]]:
        return columns_of(layer)

    def add(self, sums: Sums, layer: LayerUnits, kind: str, inputs: torch.Tensor) -> None:
        sums[kind] += self.term(inputs.double()).sum(0)

    def scores(self, sums: Sums, counts: Mapping[str, int], layer: LayerUnits) -> dict[str, torch.Tensor]:
        heads, neurons = (
            self.score(sums[kind] / counts["tokens"], layer.output(kind).weight.detach()) for kind in KINDS
        )
        return {"heads": by_head(heads, layer).sum(-1), "neurons": neurons}


class WeightStatistic(UnitStatistic):
    """Base of statistics that are a sum of one number a weight; which weights a unit has: `LayerUnits.sums`.

    With `needs_gradient` the gradients of all projections are held in float32, once for each corpus and once for the
    sample that is read.
    """

    reads: ClassVar[Reads] = "weights"
    dtype: ClassVar[torch.dtype] = torch.float32

    @abstractmethod
    def number(self, weight: torch.Tensor, gradient: torch.Tensor | None, answers: int) -> torch.Tensor:
        """The numbers of a projection, in the shape of its weight.

        Args:
            gradient: float32, of the sum of -ln p over the answer tokens of all samples; None without `needs_gradient`.
            answers: how many answer tokens these are.
        """

    def finish(self, total: torch.Tensor) -> torch.Tensor:
        """Scores, from sums over the weights of units, float64."""
        return total

    def sizes(self, layer: LayerUnits) -> Mapping[str, tuple[int, ...]]:
        modules = layer.projections if self.needs_gradient else {}
        return {name: tuple(module.weight.shape) for name, module in modules.items()}

    def add_gradient(self, sums: Sums, name: str, gradient: torch.Tensor) -> None:
        """Gradients with their signs: what one sample gains another one may lose."""
        sums[name] += gradient

    def scores(self, sums: Sums, counts: Mapping[str, int], layer: LayerUnits) -> dict[str, torch.Tensor]:

        def numbers(name: str) -> torch.Tensor:
            return self.number(layer.projections[name].weight.detach(), sums.get(name), counts["answers"])

        heads, neurons = map(self.finish, layer.sums(numbers))
        return {"heads": heads, "neurons": neurons}
