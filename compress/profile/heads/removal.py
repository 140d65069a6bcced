"""What the loss of the model changes, to first order, where a query head is removed: slope . (0 - O)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch

from compress.models.outputs import Alternatives, facts_of
from compress.profile.heads.base import HeadStatistic, Table
from compress.profile.passes.tiles import LayerTensors
from compress.profile.statistic import Item, Sums
from compress.registry import statistics
from compress.targets.pruned import PrunedGroup

if TYPE_CHECKING:
    from compress.plan import ModelShape


@statistics.register("removal")
class RemovalEffect(HeadStatistic):
    """Loss that removing each query head, or head group, costs to first order (needs a backward pass).

    The sum of sizes over rows, as `effect.absolute` of the target `pruned`, and for single query heads besides: what
    ranks the heads that routed layers keep on.
    """

    needs_gradient: ClassVar[bool] = True
    tiled: ClassVar[bool] = False
    unit: ClassVar[str] = "change of the mean answer cross-entropy, nats"
    gives: ClassVar[Mapping[str, str]] = {"removal": "groups"}

    def tables(self, shape: ModelShape, length: int) -> dict[str, Table]:
        """(layer, group), and the part `heads` (layer, group, query head of the group)."""
        return {"": Table(self.unit), "heads": Table(self.unit, query=shape.group_size)}

    def add_layer(self, sums: Sums, layer: LayerTensors, item: Item) -> None:
        slope = layer.output_gradient
        assert slope is not None
        query, key, value = (tensor[None].float() for tensor in (layer.query, layer.key, layer.value))
        groups = key.shape[1]
        facts = facts_of(layer.layer, query, key, layer.window)
        removed = Alternatives(facts, [[PrunedGroup()] * groups])
        (change,) = removed.changes(query, key, value, layer.scaling, scores=layer.scores)
        rows = torch.einsum("htd,htd->ht", slope.float(), change[0]).abs().sum(1, dtype=torch.float64)
        sums["heads"][layer.layer] += rows.view(groups, -1)
        sums[""][layer.layer] += rows.view(groups, -1).sum(1)
