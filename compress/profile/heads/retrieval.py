"""Which head groups look up the evidence, and which span rules hide it from them.

Attention influence prices a masked key by the gradient of the loss. A model that is sure of a looked-up answer has
almost no gradient there, and the sum of |E| over thousands of rows buries what is left. So recall documents are
priced directly, by the attention mass that the answer's rows put on the evidence.

What a rule loses of it is taken as if the evidence could lie anywhere before the row: the mass times the share of the
row's keys that the rule masks. Pricing the few places where the evidence of a few documents happens to lie instead
makes a search cut its windows right behind them, and the rest of the input is lost (profiles/README.md, "Objectives").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch

from compress.profile.heads.base import Table
from compress.profile.heads.rule_table import RuleStatistic, masked_keys
from compress.profile.passes.tiles import Tile
from compress.profile.statistic import Item, Sums
from compress.registry import statistics

if TYPE_CHECKING:
    from compress.plan import ModelShape


@statistics.register("retrieval")
class Retrieval(RuleStatistic):
    """Attention mass from the answer's rows onto its evidence, and what span rules cost of it (no gradient needed)."""

    of_evidence: ClassVar[bool] = True
    unit: ClassVar[str] = "share of a row's attention"
    gives: ClassVar[Mapping[str, str]] = {"retrieval": "groups", "retrieval.lost": "rules"}

    def tables(self, shape: ModelShape, length: int) -> dict[str, Table]:
        """(layer, group), and what each rule is expected to hide of it, `lost` (layer, group, sink, beta, alpha): means
        over answer rows, query heads and samples with evidence.

        The rows are `Sample.rows`, of text those whose logits predict the answer tokens. A length
        none of whose samples has evidence gives no tensor.
        """
        return {"": Table(self.unit), "lost": self.rule_table(length)}

    def counted(self, item: Item) -> list[str] | None:
        return None if item.sample.evidence else []

    def add(self, sums: Sums, tile: Tile, item: Item) -> None:
        """Add the answer rows of a tile to the mean evidence mass of the sample."""
        sample = item.sample
        if not sample.evidence:
            return
        first_answer, end_answer = sample.rows
        first, end = max(first_answer, tile.row_start), min(end_answer, tile.row_end)
        if first >= end:
            return
        rows = slice(first - tile.row_start, end - tile.row_start)
        weight = 1 / ((end_answer - first_answer) * tile.attention.shape[1])
        mass = torch.zeros(tile.attention.shape[0], end - first, dtype=torch.float64, device=tile.attention.device)
        for start, stop in sample.evidence:
            columns = slice(int(tile.column(start)), int(tile.column(stop)))
            mass += tile.attention[:, :, rows, columns].sum((1, 3), dtype=torch.float64) * weight
        sums[""][tile.layer] += mass.sum(-1)
        positions = tile.positions[rows]
        for keys in masked_keys(self.grid, tile, positions, item.length):
            hidden = (keys.high - keys.low).clamp(min=0) / (positions[:, None] + 1).double()
            keys.add_to(sums["lost"][tile.layer], mass @ hidden)
