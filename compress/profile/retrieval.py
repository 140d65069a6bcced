"""Which head groups look up the evidence, and which span rules hide it from them.

Attention influence prices a masked key by the gradient of the loss. A model that is sure of a looked-up answer has
almost no gradient there, and the sum of |E| over thousands of rows buries what is left. So recall documents are
priced directly, by the attention mass that the answer's rows put on the evidence.

What a rule loses of it is taken as if the evidence could lie anywhere before the row: the mass times the share of the
row's keys that the rule masks. Pricing the few places where the evidence of a few documents happens to lie instead
makes a search cut its windows right behind them, and the rest of the input is lost (profiles/README.md, "Objectives").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from compress.profile.rule_table import RuleBoundaries, table_measure
from compress.profile.statistic import Accumulator, Measure, Statistic, per_length
from compress.profile.tiles import Tile
from compress.registry import statistics
from compress.targets.window import SpanGrid

if TYPE_CHECKING:
    from compress.plan import ModelShape

UNIT = "share of a row's attention"


@statistics.register("retrieval")
class Retrieval(Statistic):
    """Attention mass from the answer's rows onto its evidence, and what span rules cost of it (no gradient needed)."""

    grid: SpanGrid = Field(
        default_factory=SpanGrid, description="span rules that `retrieval.lost` prices; the same grid as influence's"
    )

    needs_gradient: ClassVar[bool] = False
    unit: ClassVar[str] = UNIT
    gives: ClassVar[Mapping[str, str]] = {"retrieval": "groups", "retrieval.lost": "rules"}

    def begin(
        self, shape: ModelShape, lengths: Sequence[int], device: torch.device | str = "cpu"
    ) -> RetrievalAccumulator:
        """`retrieval.<length>` (layer, group) and what each rule is expected to hide of it, `retrieval.lost.<length>`
        (layer, group, sink, beta, alpha): means over answer rows, query heads and documents with evidence.

        The rows are answer_start - 1 to answer_end - 2, those whose logits predict the answer tokens. A length
        none of whose documents has evidence gives no tensor.
        """
        measures = per_length(shape, lengths, {"retrieval": UNIT})
        for length in lengths:
            measures[f"retrieval.lost.{length}"] = table_measure(shape, self.grid, length, UNIT)
        return RetrievalAccumulator(self.grid, measures, device)


class RetrievalAccumulator(Accumulator):
    """Sums the mean evidence mass of each document that has evidence."""

    def __init__(self, grid: SpanGrid, measures: dict[str, Measure], device: torch.device | str) -> None:
        super().__init__(measures, device)
        self.boundaries = RuleBoundaries(grid, (measure.length for measure in measures.values()), device)

    def counted(self) -> list[str]:
        """The keys of the length when the open document has evidence."""
        return super().counted() if self.document is not None and self.document.evidence else []

    def add(self, tile: Tile) -> None:
        """Add the answer rows of a tile."""
        document = self.document
        if document is None or not document.evidence:
            return
        answer_start, answer_end = document.answer
        first = max(answer_start - 1, tile.row_start)
        end = min(answer_end - 1, tile.row_end)
        if first >= end:
            return
        rows = slice(first - tile.row_start, end - tile.row_start)
        share = 1 / ((answer_end - answer_start) * tile.attention.shape[1])
        mass = torch.zeros(tile.attention.shape[0], end - first, dtype=torch.float64, device=tile.attention.device)
        for start, stop in document.evidence:
            columns = slice(int(tile.column(start)), int(tile.column(stop)))
            mass += tile.attention[:, :, rows, columns].sum((1, 3), dtype=torch.float64) * share
        self.sums[f"retrieval.{self.length}"][tile.layer] += mass.sum(-1)
        lost = self.sums[f"retrieval.lost.{self.length}"][tile.layer]
        positions = tile.positions[rows]
        for keys in self.boundaries.masked(tile, positions, self.length):
            hidden = (keys.high - keys.low).clamp(min=0) / (positions[:, None] + 1).double()
            keys.add_to(lost, mass @ hidden)
