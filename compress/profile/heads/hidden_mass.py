"""Attention mass that a span rule hides: the retained mass of a window, seen from the other side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from compress.profile.heads.base import Table
from compress.profile.heads.rule_table import RuleStatistic, masked_keys
from compress.profile.passes.tiles import Tile
from compress.profile.statistic import Item, Sums
from compress.registry import statistics

if TYPE_CHECKING:
    from compress.plan import ModelShape


@statistics.register("hidden_mass")
class HiddenMass(RuleStatistic):
    """Attention mass that each rule of a span grid hides, mean over rows (no gradient needed)."""

    unit: ClassVar[str] = "share of a row's attention"
    gives: ClassVar[Mapping[str, str]] = {"hidden_mass": "rules"}

    def tables(self, shape: ModelShape, length: int) -> dict[str, Table]:
        """Axes (layer, group, sink, beta, alpha): means over rows, query heads and samples. One minus it is the mass
        that a rule retains.
        """
        return {"": self.rule_table(length)}

    def add(self, sums: Sums, tile: Tile, item: Item) -> None:
        """Add row means, so that every sample weighs the same; rules that mask nothing in the rows cost nothing."""
        weight = 1 / (item.sample.length * tile.attention.shape[1])
        for keys in masked_keys(self.grid, tile, tile.positions, item.length):
            keys.add_to(sums[""][tile.layer], keys.sums(tile.prefix()).sum((1, 2)) * weight)
