"""How much the normaliser of a head's softmax moves: whether a score without a sum over the row can stand in for it.

A softmax weight is e^(s - lse), that of a sigmoid with the bias b is about e^(s + b) where it is small. With
b = -log n, which is free, the two differ by the factor e^(lse - log n), the same for all keys of a row. Where that is
constant over rows a bias and a temperature make up for it; heads with a strong sink, or one dominant key, move it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch

from compress.profile.heads.base import HeadStatistic, Table
from compress.profile.key import Key
from compress.profile.passes.tiles import Tile
from compress.profile.statistic import Item, Results, Sums
from compress.registry import statistics

if TYPE_CHECKING:
    from compress.plan import ModelShape


@statistics.register("lse_spread")
class LseSpread(HeadStatistic):
    """Standard deviation over rows of log-sum-exp minus log of the number of keys (no gradient needed)."""

    by_rows: ClassVar[bool] = True
    unit: ClassVar[str] = "nats"
    needs_lse: ClassVar[bool] = True
    gives: ClassVar[Mapping[str, str]] = {"lse_spread": "groups"}

    def tables(self, shape: ModelShape, length: int) -> dict[str, Table]:
        """(layer, group): root mean square over the query heads of the group of std_t(lse_t - log n_t), n_t the keys
        that row t sees; mean over samples. The parts `first` and `second` only hold the sums of each query head while a
        sample is read.
        """
        query = shape.query_heads // shape.kv_heads
        return {part: Table(self.unit, query=query) for part in ("first", "second")} | {"": Table(self.unit)}

    def add(self, sums: Sums, tile: Tile, item: Item) -> None:
        """Add the rows of a tile and their squares, each over the rows of the sample."""
        assert tile.lse is not None
        level = (tile.lse.double() - tile.seen.double().log()) / item.sample.length**0.5
        sums["first"][tile.layer] += level.sum(-1) / item.sample.length**0.5
        sums["second"][tile.layer] += level.square().sum(-1)

    def close(self, sums: dict[int, Sums], item: Item) -> None:
        parts = sums[item.length]
        variance = (parts["second"] - parts["first"].square()).clamp(min=0)
        parts[""] += variance.mean(-1).sqrt()
        parts["first"].zero_()
        parts["second"].zero_()

    def named(self, key: Key, table: Table, values: torch.Tensor) -> Results:
        return {} if key.part else super().named(key, table, values)
