"""Prices every rule of a span grid on rows of attention, from prefix sums along the keys; statistics share it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from compress.profile.heads.base import HeadStatistic, Table
from compress.runtime.span import Span, first_key
from compress.targets.window import SpanGrid

if TYPE_CHECKING:
    from compress.profile.passes.tiles import Tile


class RuleStatistic(HeadStatistic):
    """Base of the statistics that price all rules of a span grid."""

    grid: SpanGrid = Field(
        default_factory=SpanGrid,
        description="span rules (sinks, betas, alphas) that are priced exactly; one grid for all statistics that do",
    )

    by_rows: ClassVar[bool] = True

    @property
    def span_grid(self) -> SpanGrid:
        return self.grid

    def rule_table(self, length: int) -> Table:
        """A table [layers, groups, sinks, betas, alphas] over all rules."""
        grid = self.grid
        return Table(self.unit, sink=len(grid.sinks), beta=len(grid.betas), alpha=len(grid.alphas(length)))


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
        rules = table[:, self.sink]
        rules.view(rules.shape[0], -1).index_add_(1, self.rules, values)


def masked_keys(grid: SpanGrid, tile: Tile, positions: torch.Tensor, length: int) -> Iterator[MaskedKeys]:
    """For every sink of a grid, what its rules at a length mask in the rows at `positions` of a tile; nothing where no
    rule masks anything."""
    alphas, units = _rules(grid, length, positions.device)
    # The first visible key never moves back, so a rule that masks nothing in the last row masks nothing above.
    active = (first_key(positions[-1], alphas, units) > min(grid.sinks)).nonzero().flatten()
    if not len(active):
        return
    first = first_key(positions[:, None], alphas[active], units[active])
    for index, sink in enumerate(grid.sinks):
        yield MaskedKeys(index, active, tile.column(sink), tile.column(first.clamp(min=sink)))


@lru_cache(maxsize=16)
def _rules(grid: SpanGrid, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha and beta (in units of 1/1024) of every rule of one sink, each `[betas * alphas]`."""
    alphas = torch.tensor(grid.alphas(length), dtype=torch.int64)
    units = torch.tensor([Span(beta=beta).beta_units for beta in grid.betas], dtype=torch.int64)
    return alphas.repeat(len(units)).to(device), units.repeat_interleave(len(alphas)).to(device)
