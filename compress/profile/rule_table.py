"""Prices every rule of a span grid on rows of attention, from prefix sums along the keys; statistics share it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from compress.profile.statistic import Measure
from compress.runtime.span import Span, first_key
from compress.targets.window import SpanGrid

if TYPE_CHECKING:
    from compress.plan import ModelShape
    from compress.profile.tiles import Tile


def table_measure(shape: ModelShape, grid: SpanGrid, length: int, unit: str) -> Measure:
    """Declaration of a table [layers, groups, sinks, betas, alphas] over all rules of a grid."""
    sizes = (shape.layers, shape.kv_heads, len(grid.sinks), len(grid.betas), len(grid.alphas(length)))
    return Measure(sizes, ("layer", "group", "sink", "beta", "alpha"), unit, length)


@dataclass(frozen=True)
class MaskedKeys:
    """What the rules of one sink mask in some rows: the keys from column `low` up to column `high[row, rule]`.

    Attributes:
        sink: index into the grid's sinks.
        rules: `[P]` places of the rules in the flattened (beta, alpha) axes; rules that mask nothing are left out.
    """

    sink: int
    rules: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    def sums(self, prefix: torch.Tensor) -> torch.Tensor:
        """Sums over the masked keys from prefix sums `[..., R, K + 1]` -> `[..., R, P]`."""
        ends = prefix.gather(-1, self.high.expand(*prefix.shape[:-2], *self.high.shape))
        return ends.sub_(prefix[..., self.low, None])

    def add_to(self, table: torch.Tensor, values: torch.Tensor) -> None:
        """Add `[G, P]` values to a layer's table `[G, sinks, betas, alphas]`."""
        own = table[:, self.sink]
        own.view(own.shape[0], -1).index_add_(1, self.rules, values)


class RuleBoundaries:
    """Where the rules of a grid cut the rows of a tile, for tables of several lengths."""

    def __init__(self, grid: SpanGrid, lengths: Iterable[int], device: torch.device | str) -> None:
        self.sinks = list(grid.sinks)
        self.rules: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for length in set(lengths):
            alphas = torch.tensor(grid.alphas(length), dtype=torch.int64)
            units = torch.tensor([Span(beta=beta).beta_units for beta in grid.betas], dtype=torch.int64)
            self.rules[length] = (alphas.repeat(len(units)).to(device), units.repeat_interleave(len(alphas)).to(device))

    def masked(self, tile: Tile, positions: torch.Tensor, length: int) -> Iterator[MaskedKeys]:
        """For every sink, what its rules mask in the rows at `positions`; nothing where no rule masks anything."""
        alphas, units = self.rules[length]
        # The first visible key never moves back, so a rule that masks nothing in the last row masks nothing above.
        active = (first_key(positions[-1], alphas, units) > min(self.sinks)).nonzero().flatten()
        if not len(active):
            return
        first = first_key(positions[:, None], alphas[active], units[active])
        for index, sink in enumerate(self.sinks):
            yield MaskedKeys(index, active, tile.column(sink), tile.column(first.clamp(min=sink)))
