"""Importance by the size of weights: the baseline that needs no data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from compress.profile.units.base import WeightStatistic
from compress.registry import statistics


@statistics.register("magnitude")
class Magnitude(WeightStatistic):
    """L2 norm of a unit's weights (no data); `LayerUnits.sums` says which weights a unit has."""

    unit: ClassVar[str] = "L2 norm of weights"
    gives: ClassVar[Mapping[str, str]] = {"magnitude": "units"}

    def number(self, weight: torch.Tensor, gradient: torch.Tensor | None, answers: int) -> torch.Tensor:
        return weight.double().square()

    def finish(self, total: torch.Tensor) -> torch.Tensor:
        return total.sqrt()
