"""Tiny models whose layers have widths of their own, and the dense models with zeroed outputs that they equal."""

from __future__ import annotations

from typing import Any

import torch

from compress.models.planned import with_runtime_plan
from compress.models.pruning import Kept, layers_of, prune, widths
from compress.runtime.span import native_windows
from tests.tiny import MIXED, tiny_model

PRUNED = ["gemma3", "llama-gqa", "llama-mha", "ministral", "mistral", "phi3", "qwen2", "qwen3"]


def with_biases(family: str) -> Any:
    """A random model whose biases are not zero."""
    model = tiny_model(family)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    return model


def uneven(config: Any) -> list[Kept]:
    """Three layers: the last group with one query head, everything, and all but the second group or query head."""
    groups, share = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    neurons = tuple(range(config.intermediate_size))
    third = Kept((0, 2, 3), neurons[1:], (0, 2, 3)) if share == 1 else Kept((0, 1), neurons[1:], (0, 3))
    return [Kept((groups - 1,), neurons[::2], (groups * share - 1,)), Kept(tuple(range(groups)), neurons), third]


@torch.no_grad()
def zero(model: Any, kept: list[Kept]) -> None:
    """Zero the output of what `kept` leaves out."""
    config = model.config
    share = config.num_attention_heads // config.num_key_value_heads
    layers: list[Any] = layers_of(model)
    for layer, stays in zip(layers, kept, strict=True):
        head_dim = layer.self_attn.head_dim
        for head in set(range(config.num_attention_heads)) - set(stays.query_heads(share)):
            layer.self_attn.o_proj.weight[:, head * head_dim : (head + 1) * head_dim] = 0
        for neuron in set(range(config.intermediate_size)) - set(stays.neurons):
            layer.mlp.down_proj.weight[:, neuron] = 0


def groups_of(model: Any) -> list[list[dict[str, Any]]]:
    """A plan's entry for every group of the dense model: mixed, and full in layers that slide by themselves."""
    cycle = iter(range(10_000))
    mixed = [target.model_dump(mode="json") for target in MIXED]
    return [
        [
            mixed[next(cycle) % len(mixed)] if native is None else {"target": "full"}
            for _ in range(model.config.num_key_value_heads)
        ]
        for native in native_windows(model.config, model.config.num_hidden_layers)
    ]


def plan_of(model: Any, kept: list[Kept]) -> dict[str, Any]:
    """The runtime's plan for a dense model that keeps that much: windows on the groups that stay."""
    rows = zip(groups_of(model), kept, widths(model.config, kept), strict=True)
    return {
        "schema": 1,
        "layers": [{"groups": [row[group] for group in stays.groups], **width.in_plan()} for row, stays, width in rows],
    }


def unevenly_pruned(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model in the patched form with another width in every layer, and windows on the groups that stay."""
    model = with_biases(family).to(dtype)
    kept = uneven(model.config)
    plan = plan_of(model, kept)
    prune(model, kept)
    return with_runtime_plan(model, plan)
