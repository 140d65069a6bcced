"""Importance by the loss that removal costs to first order (LLM-Pruner, arXiv 2305.11627)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from compress.models.units import LayerUnits
from compress.profile.importance import Importance, Seen, Sums
from compress.registry import statistics


@statistics.register("taylor")
class Taylor(Importance):
    """Sum of |weight x dLoss/dWeight| over a unit's weights (needs a backward pass a document, and holds gradients).

    The loss is the mean of -ln p over the answer tokens of all documents. Which weights a unit has:
    `LayerUnits.sums`. Held are gradients of all projections, in float32, once for each corpus and once for the
    document that is read.
    """

    needs_gradient: ClassVar[bool] = True
    unit: ClassVar[str] = "nats per answer token"
    gives: ClassVar[Mapping[str, str]] = {"taylor": "units"}
    dtype: ClassVar[torch.dtype] = torch.float32

    def sizes(self, layer: LayerUnits) -> dict[str, tuple[int, ...]]:
        """The gradients."""
        return {name: tuple(module.weight.shape) for name, module in layer.projections.items()}

    def add_gradient(self, sums: Sums, name: str, gradient: torch.Tensor) -> None:
        """Signs count: what one document gains another one may lose."""
        sums[name] += gradient

    def scores(self, sums: Sums, seen: Seen, layer: LayerUnits) -> dict[str, torch.Tensor]:
        """Mean gradients times weights."""

        def products(name: str) -> torch.Tensor:
            weight = layer.projections[name].weight.detach().float()
            return (weight * sums[name] / seen.answers).abs()

        heads, neurons = layer.sums(products)
        return {"heads": heads, "neurons": neurons}
