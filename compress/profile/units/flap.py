"""Importance by how much an input fluctuates (FLAP, arXiv 2312.11983), and the mean inputs for bias compensation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from compress.models.units import LayerUnits
from compress.profile.statistic import Sums
from compress.profile.units.base import UnitStatistic, by_head, columns_of
from compress.registry import statistics


@statistics.register("flap")
class Flap(UnitStatistic):
    """Variance of a column's input x squared L2 norm of the column, mean over a head's columns (forward pass only).

    `flap.head_means` (layer, group, query, dim) and `flap.neuron_means` (layer, neuron) are the mean inputs: what is
    removed adds `weight @ mean` to the hidden state on average. Scores are not standardised across layers here.
    """

    unit: ClassVar[str] = "variance of the output"
    gives: ClassVar[Mapping[str, str]] = {"flap": "units", "flap.head_means": "means"}

    def sizes(self, layer: LayerUnits) -> dict[str, tuple[int, ...]]:
        """The sum of the inputs of every column and that of their squares."""
        return {f"{kind}{power}": size for kind, size in columns_of(layer).items() for power in (1, 2)}

    def add(self, sums: Sums, layer: LayerUnits, kind: str, inputs: torch.Tensor) -> None:
        """Inputs and their squares, in float64: their difference has to be of use where a mean is large."""
        inputs = inputs.double()
        sums[f"{kind}1"] += inputs.sum(0)
        sums[f"{kind}2"] += inputs.square().sum(0)

    def scores(self, sums: Sums, counts: Mapping[str, int], layer: LayerUnits) -> dict[str, torch.Tensor]:
        """Variances over all tokens, with the number of tokens as divisor."""
        means, scores = {}, {}
        for kind in columns_of(layer):
            means[kind] = sums[f"{kind}1"] / counts["tokens"]
            variance = (sums[f"{kind}2"] / counts["tokens"] - means[kind].square()).clamp(min=0)
            scores[kind] = variance * layer.output(kind).weight.detach().double().square().sum(0)
        return {
            "heads": by_head(scores["query"], layer).mean(-1),
            "neurons": scores["neuron"],
            "head_means": by_head(means["query"], layer),
            "neuron_means": means["neuron"],
        }

    def unit_of(self, tensor: str) -> str:
        return "activation" if tensor.endswith("means") else self.unit
