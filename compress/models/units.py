"""Sums over the weights of each query head and each MLP neuron of a layer, wherever its projections hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress.errors import UserError
from compress.models.families import check_pruning, family_of, layers_of
from compress.runtime.families import Family, head_size_of
from compress.runtime.widths import Width, projections


@dataclass(frozen=True)
class LayerUnits:
    """The heads and neurons of one layer.

    Attributes:
        index: of the layer.
        family: the row that says what the projections are made of.
        projections: by their names in the row.
        width: how many heads and neurons they are; query head h belongs to group h // queries.
        head_dim: rows of one head in its projections.
    """

    index: int
    family: Family
    projections: Mapping[str, Any]
    width: Width
    head_dim: int

    @property
    def groups(self) -> int:
        """Key/value heads."""
        return self.width.groups

    @property
    def queries(self) -> int:
        """Query heads of a group."""
        return self.width.queries

    @property
    def neurons(self) -> int:
        """Number of neurons of the MLP."""
        return self.width.neurons

    def output(self, kind: str) -> Any:
        """What reads the outputs of all units of a kind, `query` or `neuron`: a linear module or `Experts`."""
        return self.projections[self.family.reader(kind)]

    def sums(self, values: Callable[[str], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of one number a weight over the weights of each unit.

        A query head has its rows of the query projection, its columns of the output projection, and an equal share
        of its group's key and value rows. A neuron has its gate and up rows and its down column. Biases do not count.

        Args:
            values: name of a projection -> numbers in the shape of its weight.

        Returns:
            Heads `[groups, queries]` and neurons `[neurons]`, float64.
        """
        units = {"query": self.width.query_heads, "key_value": self.groups, "neuron": self.neurons}
        totals: dict[str, Any] = dict.fromkeys(units, 0)
        for name in self.projections:
            row = self.family.projections[name]
            numbers = values(name)
            others = [axis for axis in range(-numbers.dim(), 0) if axis != row.axis]
            lines = numbers.sum(others, dtype=torch.float64).view(self.groups if row.by_group else 1, -1)
            sizes = [units[part] * (1 if part == "neuron" else self.head_dim) // len(lines) for part in row.parts]
            for part, places in zip(row.parts, lines.split(sizes, dim=1), strict=True):
                totals[part] = totals[part] + places.reshape(units[part], -1).sum(1)
        of_group = totals["key_value"][:, None] / self.queries
        return totals["query"].view(self.groups, self.queries) + of_group, totals["neuron"]


def units_of(model: nn.Module) -> list[LayerUnits]:
    """Heads and neurons of every decoder layer, in order.

    Raises:
        UserError: the architecture cannot be pruned, or a layer's projections are not those of the configuration's
            heads and neurons.
    """
    check_pruning(model.config)
    config: Any = model.config
    family, width, head_dim = family_of(config), Width.of(config), head_size_of(config)
    units = [
        LayerUnits(index, family, projections(layer, config), width, head_dim)
        for index, layer in enumerate(layers_of(model))
    ]
    for layer in units:
        expected = {
            family.reader("query"): width.query_heads * head_dim,
            family.reader("neuron"): width.neurons,
        }
        widths = {name: layer.projections[name].weight.shape[-1] for name in expected}
        if widths != expected:
            raise UserError(
                "the output projections do not hold the configuration's heads and neurons",
                where=f"layer {layer.index}",
                expected=", ".join(f"{name} with {width} inputs" for name, width in expected.items()),
                found=", ".join(f"{name} with {width} inputs" for name, width in widths.items()),
            )
    return units
