"""Removes head groups and MLP neurons from a model: where they sit in its projections, and the slices that stay.

What is removed is whole: a key/value head goes with the query heads that share it, a neuron with its gate. So a pruned
model computes what the dense one computes with those outputs at zero, and has the stock classes of its family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress.errors import UserError
from compress.models.families import attention_modules

# Projection -> what its sides are made of, part behind part: a part is as many heads or neurons of one kind.
OUTPUTS: Mapping[str, tuple[str, ...]] = {
    "q_proj": ("query",),
    "k_proj": ("key_value",),
    "v_proj": ("key_value",),
    "qkv_proj": ("query", "key_value", "key_value"),
    "gate_proj": ("neuron",),
    "up_proj": ("neuron",),
    "gate_up_proj": ("neuron", "neuron"),
}
INPUTS: Mapping[str, tuple[str, ...]] = {"o_proj": ("query",), "down_proj": ("neuron",)}


@dataclass(frozen=True)
class Kept:
    """What stays of one layer.

    Attributes:
        groups: indices of the head groups that stay, ascending.
        neurons: indices of the MLP neurons that stay, ascending.
    """

    groups: tuple[int, ...]
    neurons: tuple[int, ...]


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, in order."""
    body: Any = getattr(model, "model", model)
    return list(body.layers)


def parameters_per_unit(model: nn.Module) -> list[tuple[int, int]]:
    """Parameters that go with one head group and with one neuron, `[layers]` of (group, neuron), biases included.

    Without biases a group has (2g + 2) x head_dim x hidden of them, g query heads a group, and a neuron 3 x hidden.
    """
    config: Any = model.config
    groups, neurons = config.num_key_value_heads, config.intermediate_size
    found = []
    for layer, attention in zip(layers_of(model), attention_modules(model), strict=True):
        whole = {"group": 0, "neuron": 0}
        for name, module in _projections(layer):
            kinds = OUTPUTS.get(name, ()) + INPUTS.get(name, ())
            unit = "neuron" if "neuron" in kinds else "group"
            whole[unit] += module.weight.numel()
            if module.bias is not None and name in OUTPUTS:
                whole[unit] += module.bias.numel()
        if whole["group"] % groups or whole["neuron"] % neurons:
            raise UserError(
                "projections do not divide into equal head groups and neurons",
                where=f"layer {attention.layer_idx}",
                expected=f"{groups} groups, {neurons} neurons",
                found=f"{whole['group']} and {whole['neuron']} parameters",
            )
        found.append((whole["group"] // groups, whole["neuron"] // neurons))
    return found


@torch.no_grad()
def prune(model: nn.Module, kept: Sequence[Kept]) -> None:
    """Slice a dense model in place; its configuration follows, so that it saves as a stock checkpoint.

    Args:
        model: with one width in all layers, as its configuration says.
        kept: per layer, the same numbers in every layer, which is what a stock configuration can say.

    Raises:
        UserError: an index is missing in the model, nothing would be left of a layer, or layers differ in numbers.
    """
    config: Any = model.config
    attention: Any = attention_modules(model)
    head_dim = attention[0].head_dim
    share = config.num_attention_heads // config.num_key_value_heads
    _check(kept, len(attention), config.num_key_value_heads, config.intermediate_size)
    for layer, stays in zip(layers_of(model), kept, strict=True):
        query_heads = [group * share + head for group in stays.groups for head in range(share)]
        picked = {
            "query": (_rows(query_heads, head_dim), config.num_attention_heads * head_dim),
            "key_value": (_rows(stays.groups, head_dim), config.num_key_value_heads * head_dim),
            "neuron": (_rows(stays.neurons, 1), config.intermediate_size),
        }
        for name, module in _projections(layer):
            _slice(
                module, [picked[kind] for kind in OUTPUTS.get(name, INPUTS.get(name, ()))], 0 if name in OUTPUTS else 1
            )
    groups = len(kept[0].groups)
    sizes = {
        "head_dim": head_dim,
        "num_attention_heads": groups * share,
        "num_key_value_heads": groups,
        "intermediate_size": len(kept[0].neurons),
    }
    for name, value in sizes.items():
        setattr(config, name, value)
    for module in model.modules():
        for name, value in sizes.items():
            if name in vars(module):
                setattr(module, name, value)
        if "num_heads" in vars(module):
            module.num_heads = groups * share


def _projections(layer: nn.Module) -> list[tuple[str, Any]]:
    """Name and module of every linear projection of a layer that heads or neurons sit in."""
    return [
        (name.rsplit(".", 1)[-1], module)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in {**OUTPUTS, **INPUTS}
    ]


def _rows(units: Sequence[int], width: int) -> torch.Tensor:
    """Rows of some units of `width` rows each."""
    return (torch.tensor(units)[:, None] * width + torch.arange(width)).flatten()


def _slice(module: Any, parts: Sequence[tuple[torch.Tensor, int]], axis: int) -> None:
    """Keep some rows (axis 0) or columns (axis 1) of a projection; parts lie behind each other."""
    start, chosen = 0, []
    for rows, size in parts:
        chosen.append(rows + start)
        start += size
    index = torch.cat(chosen).to(module.weight.device)
    module.weight = nn.Parameter(module.weight.index_select(axis, index), module.weight.requires_grad)
    if axis == 0:
        module.out_features = len(index)
        if module.bias is not None:
            module.bias = nn.Parameter(module.bias.index_select(0, index), module.bias.requires_grad)
    else:
        module.in_features = len(index)


def _check(kept: Sequence[Kept], layers: int, groups: int, neurons: int) -> None:
    if len(kept) != layers:
        raise UserError("the wrong number of layers to prune", expected=f"{layers}", found=f"{len(kept)}")
    for number, layer in enumerate(kept):
        for word, units, most in (("head group", layer.groups, groups), ("neuron", layer.neurons, neurons)):
            if not units:
                raise UserError(f"no {word} would stay", where=f"layer {number}", expected="one or more")
            if sorted(set(units)) != list(units) or not 0 <= units[0] <= units[-1] < most:
                raise UserError(
                    f"{word} indices are not ascending numbers below {most}",
                    where=f"layer {number}",
                    found=", ".join(map(str, units[:8])),
                )
    numbers = {(len(layer.groups), len(layer.neurons)) for layer in kept}
    if len(numbers) > 1:
        raise UserError(
            "layers would differ in head groups or neurons, which no stock configuration says",
            expected="the same numbers in every layer",
            found=", ".join(f"{first} groups and {second} neurons" for first, second in sorted(numbers)),
        )
