"""How a head group spreads its attention: mass by distance, mass on the first tokens, entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from compress.limits import LONGEST
from compress.profile.statistic import Accumulator, Measure, Statistic, per_length
from compress.profile.tiles import Tile
from compress.registry import statistics

if TYPE_CHECKING:
    from compress.data.sample import TextSample as Document
    from compress.models.shape import ModelShape

BIN = 64  # tokens of distance in one bin, a page of the cache


@statistics.register("attention")
class Attention(Statistic):
    """Attention mass by distance, attention mass on the sink tokens and entropy (no gradient needed)."""

    sink: int = Field(
        default=64, ge=1, le=LONGEST, description="tokens at the start of the sequence that count as sink"
    )

    needs_gradient: ClassVar[bool] = False
    unit: ClassVar[str] = "share of a row's attention; entropy in nats"
    gives: ClassVar[Mapping[str, str]] = {"sink_mass": "groups", "entropy": "groups"}

    def begin(
        self, shape: ModelShape, lengths: Sequence[int], device: torch.device | str = "cpu"
    ) -> AttentionAccumulator:
        """`mass.<length>` (layer, group, distance bin of 64 tokens, bin 0 holds distances 0 to 63),
        `sink_mass.<length>` and `entropy.<length>` (layer, group): means over rows and the group's query heads.

        `sink_mass` counts the rows at positions >= sink alone, since earlier rows see nothing but sink tokens.
        """
        measures: dict[str, Measure] = {}
        for length in lengths:
            measures |= per_length(shape, [length], {"mass": "share of attention"}, {"distance_bin": -(-length // BIN)})
        measures |= per_length(shape, lengths, {"sink_mass": "share of attention", "entropy": "nats"})
        return AttentionAccumulator(self.sink, measures, device)


class AttentionAccumulator(Accumulator):
    """Sums row means, so that every document weighs the same."""

    def __init__(self, sink: int, measures: dict[str, Measure], device: torch.device | str) -> None:
        super().__init__(measures, device)
        self.sink = sink
        self._rows = 0

    def open(self, length: int, document: Document) -> None:
        """Start a document; its number of rows is the divisor of the means."""
        super().open(length, document)
        self._rows = document.length

    def counted(self) -> list[str]:
        """All keys of the length, but `sink_mass` only where the document is longer than the sink."""
        keys = super().counted()
        return keys if self._rows > self.sink else [key for key in keys if not key.startswith("sink_mass.")]

    def add(self, tile: Tile) -> None:
        """Add the rows of a tile."""
        prefix = tile.prefix()
        queries = prefix.shape[1]
        share = 1 / (self._rows * queries)
        bins = (tile.row_end - 1) // BIN + 1
        edges = tile.column(tile.positions[:, None] + 1 - BIN * torch.arange(bins + 1, device=prefix.device))
        below = prefix.gather(-1, edges.expand(*prefix.shape[:-2], *edges.shape))
        mass = (below[..., :-1] - below[..., 1:]).sum((1, 2))
        self.sums[f"mass.{self.length}"][tile.layer, :, :bins] += mass * share

        far = max(self.sink - tile.row_start, 0)
        if far < tile.rows:
            on_sink = prefix[:, :, far:, tile.column(self.sink)].sum((1, 2))
            self.sums[f"sink_mass.{self.length}"][tile.layer] += on_sink / ((self._rows - self.sink) * queries)

        logs = tile.workspace.take("attention.log", tuple(tile.attention.shape))
        torch.clamp(tile.attention, min=torch.finfo(torch.float32).tiny, out=logs)
        logs.log_().mul_(tile.attention)
        entropy = logs.sum(-1).sum((1, 2), dtype=torch.float64)
        self.sums[f"entropy.{self.length}"][tile.layer] -= entropy * share
