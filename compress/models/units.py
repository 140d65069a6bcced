"""Sums over the weights of each query head and each MLP neuron of a layer, wherever its projections hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress.errors import UserError
from compress.models.families import attention_modules, check_pruning
from compress.models.pruning import layers_of, projections_of
from compress.runtime.widths import INPUTS, OUTPUTS


@dataclass(frozen=True)
class LayerUnits:
    """The heads and neurons of one layer.

    Attributes:
        index: of the layer.
        projections: by the names of `pruning.OUTPUTS` and `pruning.INPUTS`.
        groups: number of key/value heads.
        queries: query heads a group; head h belongs to group h // queries.
        head_dim: rows of one head in its projections.
        neurons: width of the MLP.
    """

    index: int
    projections: Mapping[str, nn.Linear]
    groups: int
    queries: int
    head_dim: int
    neurons: int

    def output(self, kind: str) -> nn.Linear:
        """The projection that reads the outputs of all units of a kind: `query` or `neuron`."""
        return self.projections[next(name for name, kinds in INPUTS.items() if kinds == (kind,))]

    def sums(self, values: Callable[[str], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of one number a weight over the weights of each unit.

        A query head has its rows of the query projection, its columns of the output projection, and an equal share
        of its group's key and value rows. A neuron has its gate and up rows and its down column. Biases do not count.

        Args:
            values: name of a projection -> numbers in the shape of its weight.

        Returns:
            Heads `[groups, queries]` and neurons `[neurons]`, float64.
        """
        units = {"query": self.groups * self.queries, "key_value": self.groups, "neuron": self.neurons}
        totals: dict[str, Any] = dict.fromkeys(units, 0)
        for name in self.projections:
            axis, kinds = (0, OUTPUTS[name]) if name in OUTPUTS else (1, INPUTS[name])
            lines = values(name).sum(1 - axis, dtype=torch.float64)
            widths = [units[kind] * (1 if kind == "neuron" else self.head_dim) for kind in kinds]
            for kind, part in zip(kinds, lines.split(widths), strict=True):
                totals[kind] = totals[kind] + part.view(units[kind], -1).sum(1)
        share = totals["key_value"][:, None] / self.queries
        return totals["query"].view(self.groups, self.queries) + share, totals["neuron"]


def units_of(model: nn.Module) -> list[LayerUnits]:
    """Heads and neurons of every decoder layer, in order.

    Raises:
        UserError: the architecture cannot be pruned, or a layer's projections are not those of the configuration's
            heads and neurons.
    """
    check_pruning(model.config)
    config: Any = model.config
    groups, heads = config.num_key_value_heads, config.num_attention_heads
    attention: Any = attention_modules(model)
    found = [
        LayerUnits(index, projections_of(layer), groups, heads // groups, module.head_dim, config.intermediate_size)
        for index, (layer, module) in enumerate(zip(layers_of(model), attention, strict=True))
    ]
    for layer in found:
        expected = {"o_proj": heads * layer.head_dim, "down_proj": layer.neurons}
        widths = {name: layer.projections[name].in_features for name in INPUTS if name in layer.projections}
        if widths != expected:
            raise UserError(
                "the output projections do not hold the configuration's heads and neurons",
                where=f"layer {layer.index}",
                expected=", ".join(f"{name} with {width} inputs" for name, width in expected.items()),
                found=", ".join(f"{name} with {width} inputs" for name, width in widths.items()) or "neither",
            )
    return found
