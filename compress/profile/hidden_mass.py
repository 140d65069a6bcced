"""Attention mass that a span rule hides: the retained mass of a window, seen from the other side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from compress.profile.rule_table import RuleBoundaries, table_measure
from compress.profile.statistic import Accumulator, Measure, Statistic
from compress.profile.tiles import Tile
from compress.registry import statistics
from compress.targets.window import SpanGrid

if TYPE_CHECKING:
    from compress.data.sample import TextSample as Document
    from compress.models.shape import ModelShape

UNIT = "share of a row's attention"


@statistics.register("hidden_mass")
class HiddenMass(Statistic):
    """Attention mass that each rule of a span grid hides, mean over rows (no gradient needed)."""

    grid: SpanGrid = Field(
        default_factory=SpanGrid, description="span rules that are priced; the same grid as influence's"
    )

    needs_gradient: ClassVar[bool] = False
    unit: ClassVar[str] = UNIT
    gives: ClassVar[Mapping[str, str]] = {"hidden_mass": "rules"}

    def begin(
        self, shape: ModelShape, lengths: Sequence[int], device: torch.device | str = "cpu"
    ) -> HiddenMassAccumulator:
        """Tables `hidden_mass.<length>`, axes (layer, group, sink, beta, alpha): means over rows, query heads and
        documents. One minus it is the mass that a rule retains.
        """
        measures = {f"hidden_mass.{length}": table_measure(shape, self.grid, length, UNIT) for length in lengths}
        return HiddenMassAccumulator(self.grid, measures, device)


class HiddenMassAccumulator(Accumulator):
    """Sums row means, so that every document weighs the same."""

    def __init__(self, grid: SpanGrid, measures: dict[str, Measure], device: torch.device | str) -> None:
        super().__init__(measures, device)
        self.boundaries = RuleBoundaries(grid, (measure.length for measure in measures.values()), device)
        self._rows = 1

    def open(self, length: int, document: Document) -> None:
        """Start a document; its number of rows is the divisor of the means."""
        super().open(length, document)
        self._rows = document.length

    def add(self, tile: Tile) -> None:
        """Add the rows of a tile; rules that mask nothing there cost nothing."""
        table = self.sums[f"hidden_mass.{self.length}"][tile.layer]
        share = 1 / (self._rows * tile.attention.shape[1])
        for keys in self.boundaries.masked(tile, tile.positions, self.length):
            keys.add_to(table, keys.sums(tile.prefix()).sum((1, 2)) * share)
