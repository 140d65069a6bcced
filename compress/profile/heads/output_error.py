"""How wrong a head group's output is when it sees sink and window alone: measured, not estimated to first order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from compress.limits import LONGEST
from compress.profile.heads.base import HeadStatistic, Table
from compress.profile.key import Key
from compress.profile.passes.tiles import Tile
from compress.profile.statistic import Item, Results, Sums
from compress.registry import statistics
from compress.runtime.span import Span

if TYPE_CHECKING:
    from compress.plan import ModelShape


@statistics.register("output_error")
class OutputError(HeadStatistic):
    """Relative squared error of the attention output under one sink and window (no gradient needed)."""

    sink: int = Field(64, ge=0, le=LONGEST, description="tokens at the start that stay visible")
    window: int = Field(256, ge=1, le=LONGEST, description="tokens of the window")

    by_rows: ClassVar[bool] = True
    unit: ClassVar[str] = "squared error over squared length of the output"
    gives: ClassVar[Mapping[str, str]] = {"output_error": "groups"}

    def tables(self, shape: ModelShape, length: int) -> dict[str, Table]:
        """(layer, group): |O_window - O|^2 over |O|^2, both summed over the rows and the query heads of the group,
        mean over samples. O is the output before the output projection. The part `output` only holds |O|^2 while a
        sample is read.
        """
        return {"": Table(self.unit), "output": Table(self.unit)}

    def add(self, sums: Sums, tile: Tile, item: Item) -> None:
        groups, queries, rows, columns = tile.attention.shape
        keys = torch.arange(tile.key_start, tile.row_end, device=tile.attention.device)
        seen = Span(self.sink, self.window, 0.0).visible(tile.positions[:, None], keys)
        kept = tile.workspace.take("output_error.kept", tuple(tile.attention.shape))
        torch.mul(tile.attention, seen, out=kept)
        values = tile.value.repeat_interleave(queries, 0)
        flat = (groups * queries, rows, columns)
        output = torch.bmm(tile.attention.reshape(flat), values)
        windowed = torch.bmm(kept.view(flat), values) / kept.view(flat).sum(-1, keepdim=True)
        for part, difference in (("", windowed - output), ("output", output)):
            squares = difference.double().square().sum((1, 2)).view(groups, queries).sum(1)
            sums[part][tile.layer] += squares

    def close(self, sums: dict[int, Sums], item: Item) -> None:
        squares = sums[item.length]
        squares[""] /= squares["output"].clamp(min=torch.finfo(torch.float64).tiny)
        squares["output"].zero_()

    def named(self, key: Key, table: Table, values: torch.Tensor) -> Results:
        return {} if key.part else super().named(key, table, values)
