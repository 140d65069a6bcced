"""How a head group spreads its attention: mass by distance, mass on the first tokens, entropy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from compress.limits import LONGEST
from compress.profile.heads.base import HeadStatistic, Table
from compress.profile.passes.tiles import Tile
from compress.profile.statistic import Item, Sums
from compress.registry import statistics

if TYPE_CHECKING:
    from compress.plan import ModelShape

BIN = 64  # tokens of distance in one bin, a page of the cache


@statistics.register("attention")
class Attention(HeadStatistic):
    """Attention mass by distance, attention mass on the sink tokens and entropy (no gradient needed)."""

    sink: int = Field(
        default=64, ge=1, le=LONGEST, description="tokens at the start of the sequence that count as sink"
    )

    by_rows: ClassVar[bool] = True
    unit: ClassVar[str] = "share of a row's attention; entropy in nats"
    gives: ClassVar[Mapping[str, str]] = {"sink_mass": "groups", "entropy": "groups"}

    def tables(self, shape: ModelShape, length: int) -> dict[str, Table]:
        """`mass` by distance bin of 64 tokens (bin 0 holds distances 0 to 63), `sink_mass` and `entropy`: means over
        rows and the group's query heads.

        `sink_mass` counts the rows at positions >= sink alone, since earlier rows see nothing but sink tokens.
        """
        return {
            "mass": Table("share of attention", distance_bin=-(-length // BIN)),
            "sink_mass": Table("share of attention"),
            "entropy": Table("nats"),
        }

    def counted(self, item: Item) -> list[str]:
        """All parts, but `sink_mass` only where the sample is longer than the sink."""
        return ["mass", "entropy", *(["sink_mass"] if item.sample.length > self.sink else [])]

    def add(self, sums: Sums, tile: Tile, item: Item) -> None:
        """Add row means, so that every sample weighs the same."""
        prefix = tile.prefix()
        length, queries = item.sample.length, prefix.shape[1]
        weight = 1 / (length * queries)
        bins = (tile.row_end - 1) // BIN + 1
        edges = tile.column(tile.positions[:, None] + 1 - BIN * torch.arange(bins + 1, device=prefix.device))
        below = prefix.gather(-1, edges.expand(*prefix.shape[:-2], *edges.shape))
        mass = (below[..., :-1] - below[..., 1:]).sum((1, 2))
        sums["mass"][tile.layer, :, :bins] += mass * weight

        far = max(self.sink - tile.row_start, 0)
        if far < tile.rows:
            on_sink = prefix[:, :, far:, tile.column(self.sink)].sum((1, 2))
            sums["sink_mass"][tile.layer] += on_sink / ((length - self.sink) * queries)

        logs = tile.workspace.take("attention.log", tuple(tile.attention.shape))
        torch.clamp(tile.attention, min=torch.finfo(torch.float32).tiny, out=logs)
        logs.log_().mul_(tile.attention)
        entropy = logs.sum(-1).sum((1, 2), dtype=torch.float64)
        sums["entropy"][tile.layer] -= entropy * weight
