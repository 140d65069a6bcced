"""Importance by the size of weights: the baseline that needs no data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from compress.models.units import LayerUnits
from compress.profile.importance import Importance, Seen, Sums
from compress.profile.statistic import Reads
from compress.registry import statistics


@statistics.register("magnitude")
class Magnitude(Importance):
    """L2 norm of a unit's weights (no data); which these are: `LayerUnits.sums`."""

    reads: ClassVar[Reads] = "weights"
    unit: ClassVar[str] = "L2 norm of weights"
    gives: ClassVar[Mapping[str, str]] = {"magnitude": "units"}

    def scores(self, sums: Sums, seen: Seen, layer: LayerUnits) -> dict[str, torch.Tensor]:
        """Square roots of the sums of squares."""
        heads, neurons = layer.sums(lambda name: layer.projections[name].weight.detach().double().square())
        return {"heads": heads.sqrt(), "neurons": neurons.sqrt()}
