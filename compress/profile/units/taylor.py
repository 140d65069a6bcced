"""Importance by the loss that removal costs to first order (LLM-Pruner, arXiv 2305.11627)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from compress.profile.statistic import Reads
from compress.profile.units.base import WeightStatistic
from compress.registry import statistics


@statistics.register("taylor")
class Taylor(WeightStatistic):
    """Sum of |weight x dLoss/dWeight| over a unit's weights (needs a backward pass a document, and holds gradients).

    The loss is the mean of -ln p over the answer tokens of all documents; `LayerUnits.sums` says which a unit has.
    """

    reads: ClassVar[Reads] = "projections"
    needs_gradient: ClassVar[bool] = True
    unit: ClassVar[str] = "nats per answer token"
    gives: ClassVar[Mapping[str, str]] = {"taylor": "units"}

    def number(self, weight: torch.Tensor, gradient: torch.Tensor | None, answers: int) -> torch.Tensor:
        """See the class."""
        assert gradient is not None
        return (weight.float() * gradient / answers).abs()
