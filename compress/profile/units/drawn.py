"""Importance at random: the baseline that every other statistic has to beat."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

from compress.limits import SEED
from compress.models.units import LayerUnits
from compress.profile.statistic import Reads, Sums
from compress.profile.units.base import UnitStatistic
from compress.registry import statistics


@statistics.register("random")
class Random(UnitStatistic):
    """Random numbers in 0 to 1 (no data)."""

    seed: int = Field(0, ge=0, le=SEED, description="another seed gives other numbers")

    reads: ClassVar[Reads] = "weights"
    unit: ClassVar[str] = "random number"
    gives: ClassVar[Mapping[str, str]] = {"random": "units"}

    def scores(self, sums: Sums, counts: Mapping[str, int], layer: LayerUnits) -> dict[str, torch.Tensor]:
        """Numbers that depend on the seed and the layer only, not on the device."""
        digest = hashlib.sha256(f"{self.seed}/{layer.index}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        heads = torch.rand(layer.groups, layer.queries, generator=generator, dtype=torch.float64)
        return {"heads": heads, "neurons": torch.rand(layer.neurons, generator=generator, dtype=torch.float64)}
