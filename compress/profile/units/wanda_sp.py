"""Importance by weights times the size of their inputs (Wanda, arXiv 2306.11695, summed over structures)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from compress.profile.units.base import ColumnStatistic
from compress.registry import statistics


@statistics.register("wanda_sp")
class WandaSp(ColumnStatistic):
    """Sum of |weight| x root mean square of its input, over a unit's columns (forward pass only).

    The structured form of Wanda that FLAP (arXiv 2312.11983) compares with.
    """

    unit: ClassVar[str] = "|weight| x root mean square input"
    gives: ClassVar[Mapping[str, str]] = {"wanda_sp": "units"}

    def term(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.square()

    def score(self, mean: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return mean.sqrt() * weight.abs().sum(0, dtype=torch.float64)
