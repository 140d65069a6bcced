"""Puts the head groups of layers in another order: rows and columns of their projections, and what each head has of its
own.

Attention adds up what its heads give through the output projection, so their order means nothing: the outputs are the
same up to the rounding of sums in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from compress.models.families import check_reordering, family_of, layers_of
from compress.models.pruning import places_of, take
from compress.runtime.families import Family, head_size_of
from compress.runtime.widths import Width, width_of

Order = Sequence[int]  # of each head group, in the new order, its number in the old one


@torch.no_grad()
def reorder(model: nn.Module, orders: Sequence[Order | None]) -> None:
    """Reorder the head groups of a stock model in place, with the query heads that share each, by layer.

    Tensors that are changed are new ones; the others stay.

    Args:
        orders: by layer; None leaves it as it is.

    Raises:
        UserError: heads of the architecture cannot change places.
        ValueError: an order is not one of all head groups of its layer.
    """
    if all(order is None for order in orders):
        return
    config: Any = model.config
    check_reordering(config, "plan: layers.order", "leave `order` out of the plan")
    for number, (layer, order) in enumerate(zip(layers_of(model), orders, strict=True)):
        if order is not None:
            width = width_of(layer, config)
            if sorted(order) != list(range(width.groups)):
                raise ValueError(f"layer {number}: {list(order)} is no order of {width.groups} head groups")
            _reorder(layer, order, width, family_of(config), head_size_of(config))


def _reorder(layer: nn.Module, order: Order, width: Width, family: Family, head_dim: int) -> None:
    """The head groups of one layer."""
    queries = [group * width.queries + head for group in order for head in range(width.queries)]
    units = {"query": queries, "key_value": order}
    for name, row in family.projections.items():
        if "neuron" not in row.parts:
            take(layer.get_submodule(name), places_of(row, units, width, head_dim), row.axis)
    for name, part in family.by_head.items():
        path, _, last = name.rpartition(".")
        owner: Any = _at(layer, path)
        own = getattr(owner, last, None)
        if isinstance(own, nn.ModuleList):
            setattr(owner, last, nn.ModuleList(own[unit] for unit in units[part]))
        elif own is not None:
            index = torch.tensor(units[part], device=own.device)
            setattr(owner, last, nn.Parameter(_by_head(own, index), own.requires_grad))


def _at(layer: nn.Module, path: str) -> Any:
    """A module of a layer; None where it lacks that, as without norms of queries."""
    owner: Any = layer
    for name in path.split("."):
        owner = getattr(owner, name, None)
    return owner


def _by_head(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Numbers that lie head behind head, with the heads of an index, in its order."""
    return values.reshape(len(index), -1).index_select(0, index).reshape(values.shape)
