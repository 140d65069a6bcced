"""What an importance statistic is: sums over tokens of what the output projections of a layer read, and its scores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from compress.models.units import LayerUnits
from compress.profile.statistic import AnyStatistic, Reads

AXES: Mapping[str, tuple[str, ...]] = {
    "heads": ("layer", "group", "query"),
    "neurons": ("layer", "neuron"),
    "head_means": ("layer", "group", "query", "dim"),
    "neuron_means": ("layer", "neuron"),
}
SCORES = ("heads", "neurons")

Sums = dict[str, torch.Tensor]


@dataclass
class Seen:
    """How many tokens the sums are over.

    Attributes:
        tokens: all tokens of the documents.
        answers: tokens of the answers, which the loss is taken on.
    """

    tokens: int = 0
    answers: int = 0


class Importance(AnyStatistic):
    """Base of the importance statistics: `<name>.heads` (layer, group, query) and `<name>.neurons` (layer, neuron).

    A higher score is a more important unit. Sums are over tokens, so that a long document weighs more than a short
    one. A subclass sees one layer at a time.
    """

    needs_gradient: ClassVar[bool] = False
    reads: ClassVar[Reads] = "projections"
    dtype: ClassVar[torch.dtype] = torch.float64

    def sizes(self, layer: LayerUnits) -> dict[str, tuple[int, ...]]:
        """Shapes of what is summed in a layer, by name."""
        return {}

    def add(self, sums: Sums, layer: LayerUnits, kind: str, inputs: torch.Tensor) -> None:
        """Take what an output projection reads at some tokens; no sum may be replaced, only added to.

        Args:
            kind: `query`, the columns are heads behind each other, or `neuron`.
            inputs: `[tokens, columns]` float32, read only.
        """

    def add_gradient(self, sums: Sums, name: str, gradient: torch.Tensor) -> None:
        """Take dLoss/dWeight of a projection for one document; only called with `needs_gradient`.

        Args:
            name: of the projection.
            gradient: `[out, in]` float32, of the sum of -ln p over the answer's tokens.
        """

    @abstractmethod
    def scores(self, sums: Sums, seen: Seen, layer: LayerUnits) -> dict[str, torch.Tensor]:
        """Tensors of one layer, keys of `AXES` without the layer's axis."""

    def unit_of(self, tensor: str) -> str:
        """What one number of a tensor counts."""
        return self.unit


def by_head(columns: torch.Tensor, layer: LayerUnits) -> torch.Tensor:
    """`[groups, queries, head_dim]` of the columns of the output projection of attention."""
    return columns.view(layer.groups, layer.queries, layer.head_dim)


def both(layer: LayerUnits) -> dict[str, tuple[int, ...]]:
    """Shapes of one number for every column of both output projections."""
    return {kind: (layer.output(kind).in_features,) for kind in ("query", "neuron")}
