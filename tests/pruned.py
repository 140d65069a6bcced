"""Tiny models whose layers have widths of their own, and the dense models with zeroed outputs that they equal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import torch

from compress.models.families import layers_of
from compress.models.planned import planned_model
from compress.models.pruning import Kept, output_projections
from compress.models.shape import shape_of
from compress.plan import LayerPlan, Mlp, Plan, plan_of_layers
from compress.runtime.families import head_size_of, row_of
from compress.runtime.span import native_windows
from compress.runtime.widths import Width
from compress.targets.full import FullGroup
from compress.targets.pruned import PrunedGroup
from compress.targets.target import Target
from tests.tiny import MIXED, tiny_model

PRUNED = ["gemma3", "llama-gqa", "llama-mha", "ministral", "mistral", "phi3", "qwen2", "qwen3", "gpt_neox"]


def with_biases(family: str) -> Any:
    """A random model whose biases are not zero."""
    model = tiny_model(family)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.25)
    return model


def uneven(config: Any) -> list[Kept]:
    """Three layers: the last group with one query head, everything, and all but the second group or query head."""
    width = Width.of(config)
    groups, share = width.groups, width.query_heads // width.groups
    neurons = tuple(range(width.neurons))
    most = neurons[row_of(config).neuron_step :]
    third = Kept((0, 2, 3), most, (0, 2, 3)) if share == 1 else Kept((0, 1), most, (0, 3))
    return [Kept((groups - 1,), neurons[::2], (groups * share - 1,)), Kept(tuple(range(groups)), neurons), third]


@torch.no_grad()
def zero(model: Any, kept: list[Kept]) -> None:
    """Zero the output of what `kept` leaves out."""
    width, head_dim = Width.of(model.config), head_size_of(model.config)
    for layer, stays in zip(layers_of(model), kept, strict=True):
        heads, neurons = output_projections(layer, model.config)
        for head in set(range(width.query_heads)) - set(stays.query_heads(width.query_heads // width.groups)):
            heads.weight[..., head * head_dim : (head + 1) * head_dim] = 0
        for neuron in set(range(width.neurons)) - set(stays.neurons):
            neurons.weight[..., neuron] = 0


def targets_of(model: Any, targets: Sequence[Target] = MIXED) -> list[list[Target]]:
    """A target for every group of the dense model: mixed, and full in layers that slide by themselves."""
    turn, groups = cycle(targets), Width.of(model.config).groups
    return [
        [next(turn) if native is None else FullGroup() for _ in range(groups)]
        for native in native_windows(model.config, model.config.num_hidden_layers)
    ]


def uneven_plan(model: Any, targets: Sequence[Target] = MIXED) -> Plan:
    """One plan that windows some groups, removes others, and removes query heads and neurons, in every layer others.

    Groups that stay and that the layer itself leaves free cycle through `targets`.
    """
    rows = []
    for layer, stays in zip(targets_of(model, targets), uneven(model.config), strict=True):
        groups = tuple(target if group in stays.groups else PrunedGroup() for group, target in enumerate(layer))
        whole = len(stays.neurons) == Width.of(model.config).neurons
        rows.append(LayerPlan(groups=groups, queries=stays.queries, mlp=None if whole else Mlp.of(stays.neurons)))
    return plan_of_layers(shape_of(model), rows, provenance={"made by": "tests"})


def unevenly_pruned(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model in the patched form with another width in every layer, and windows on the groups that stay."""
    model = with_biases(family).to(dtype)
    return planned_model(model, uneven_plan(model))
