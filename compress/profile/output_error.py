"""How wrong a head group's output is when it sees sink and window alone: measured, not estimated to first order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from compress.limits import LONGEST
from compress.profile.statistic import Accumulator, Measure, Statistic, per_length
from compress.profile.tiles import Tile
from compress.registry import statistics
from compress.runtime.span import Span

if TYPE_CHECKING:
    from compress.data.sample import TextSample as Document
    from compress.models.shape import ModelShape

UNIT = "squared error over squared length of the output"


@statistics.register("output_error")
class OutputError(Statistic):
    """Relative squared error of the attention output under one sink and window (no gradient needed)."""

    sink: int = Field(64, ge=0, le=LONGEST, description="tokens at the start that stay visible")
    window: int = Field(256, ge=1, le=LONGEST, description="tokens of the window")

    needs_gradient: ClassVar[bool] = False
    unit: ClassVar[str] = UNIT
    gives: ClassVar[Mapping[str, str]] = {"output_error": "groups"}

    def begin(
        self, shape: ModelShape, lengths: Sequence[int], device: torch.device | str = "cpu"
    ) -> OutputErrorAccumulator:
        """`output_error.<length>` (layer, group): |O_window - O|^2 over |O|^2, both summed over the rows and the
        query heads of the group, mean over documents. O is the output before the output projection.
        """
        measures = per_length(shape, lengths, {"output_error": UNIT})
        return OutputErrorAccumulator(Span(self.sink, self.window, 0.0), measures, device)


class OutputErrorAccumulator(Accumulator):
    """Sums the squares of a document, and divides when it ends."""

    def __init__(self, span: Span, measures: dict[str, Measure], device: torch.device | str) -> None:
        super().__init__(measures, device)
        self.span = span
        self._squares = torch.zeros(0)

    def open(self, length: int, document: Document) -> None:
        """Start a document: no squares yet, `[2 (error, output), layers, groups]`."""
        super().open(length, document)
        total = self.sums[f"output_error.{length}"]
        self._squares = torch.zeros(2, *total.shape, dtype=torch.float64, device=total.device)

    def add(self, tile: Tile) -> None:
        """Add the rows of a tile."""
        groups, queries, rows, columns = tile.attention.shape
        keys = torch.arange(tile.key_start, tile.row_end, device=tile.attention.device)
        seen = self.span.visible(tile.positions[:, None], keys)
        kept = tile.workspace.take("output_error.kept", tuple(tile.attention.shape))
        torch.mul(tile.attention, seen, out=kept)
        values = tile.value.repeat_interleave(queries, 0)
        flat = (groups * queries, rows, columns)
        output = torch.bmm(tile.attention.reshape(flat), values)
        windowed = torch.bmm(kept.view(flat), values) / kept.view(flat).sum(-1, keepdim=True)
        for number, difference in enumerate((windowed - output, output)):
            squares = difference.double().square().sum((1, 2)).view(groups, queries).sum(1)
            self._squares[number, tile.layer] += squares

    def close(self) -> None:
        """End the document: its relative error counts once."""
        error, output = self._squares
        self.sums[f"output_error.{self.length}"] += error / output.clamp(min=torch.finfo(torch.float64).tiny)
        super().close()
