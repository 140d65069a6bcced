"""Importance by weights times the size of their inputs (Wanda, arXiv 2306.11695, summed over structures)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from compress.models.units import LayerUnits
from compress.profile.importance import Importance, Seen, Sums, both, by_head
from compress.registry import statistics


@statistics.register("wanda_sp")
class WandaSp(Importance):
    """Sum of |weight| x root mean square of its input, over a unit's columns (forward pass only).

    The structured form of Wanda that FLAP (arXiv 2312.11983) compares with.
    """

    unit: ClassVar[str] = "|weight| x root mean square input"
    gives: ClassVar[Mapping[str, str]] = {"wanda_sp": "units"}

    def sizes(self, layer: LayerUnits) -> dict[str, tuple[int, ...]]:
        """One sum a column."""
        return both(layer)

    def add(self, sums: Sums, layer: LayerUnits, kind: str, inputs: torch.Tensor) -> None:
        """Squares of the inputs."""
        sums[kind] += inputs.double().square().sum(0)

    def scores(self, sums: Sums, seen: Seen, layer: LayerUnits) -> dict[str, torch.Tensor]:
        """Sums over the columns of a unit."""
        columns = {
            kind: (total / seen.tokens).sqrt() * layer.output(kind).weight.detach().abs().sum(0, dtype=torch.float64)
            for kind, total in sums.items()
        }
        return {"heads": by_head(columns["query"], layer).sum(-1), "neurons": columns["neuron"]}
