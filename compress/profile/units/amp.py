"""Importance by the size of outputs (AMP, arXiv 2504.21174): of a head behind its output projection, of a neuron."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field

from compress.models.units import LayerUnits
from compress.profile.statistic import Sums
from compress.profile.units.base import UnitStatistic
from compress.registry import statistics


@statistics.register("amp")
class Amp(UnitStatistic):
    """L1 norm of what a head adds to the hidden state, and mean size of a neuron's activation (forward pass only).

    The published code takes means over prompts; here every token weighs the same.
    """

    neurons: Literal["activation", "contribution"] = Field(
        "activation",
        description="of a neuron: its mean absolute activation, as published, or that times the L1 norm of its down "
        "column, which is what heads are measured in",
    )

    unit: ClassVar[str] = "absolute output, mean over tokens"
    gives: ClassVar[Mapping[str, str]] = {"amp": "units"}

    def sizes(self, layer: LayerUnits) -> dict[str, tuple[int, ...]]:
        """One number for every head and neuron."""
        return {"query": (layer.groups * layer.queries,), "neuron": (layer.neurons,)}

    def add(self, sums: Sums, layer: LayerUnits, kind: str, inputs: torch.Tensor) -> None:
        """Head after head, since the outputs of all heads at once are as many hidden states a token as heads."""
        if kind == "neuron":
            sums[kind] += inputs.abs().sum(0, dtype=torch.float64)
            return
        width = layer.head_dim
        weight = layer.output(kind).weight.detach()
        for head in range(layer.groups * layer.queries):
            columns = slice(head * width, (head + 1) * width)
            output = inputs[:, columns] @ weight[:, columns].T.float()
            sums[kind][head] += output.abs().sum(dtype=torch.float64)

    def scores(self, sums: Sums, counts: Mapping[str, int], layer: LayerUnits) -> dict[str, torch.Tensor]:
        neurons = sums["neuron"] / counts["tokens"]
        if self.neurons == "contribution":
            neurons = neurons * layer.output("neuron").weight.detach().abs().sum(0, dtype=torch.float64)
        return {"heads": (sums["query"] / counts["tokens"]).view(layer.groups, layer.queries), "neurons": neurons}
