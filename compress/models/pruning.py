"""Removes head groups and MLP neurons from a model: where they sit in its projections, and the slices that stay.

What is removed is whole: a key/value head goes with the query heads that share it, a neuron with its gate. So a pruned
model computes what the dense one computes with those outputs at zero, and has the stock classes of its family.
"""

from __future__ import annotations

from collections import Counter
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
        queries: indices of the query heads that stay, ascending, the same number in every group that stays; None
            keeps all of theirs.
    """

    groups: tuple[int, ...]
    neurons: tuple[int, ...]
    queries: tuple[int, ...] | None = None

    def query_heads(self, share: int) -> tuple[int, ...]:
        """Indices of the query heads that stay, where a group of the dense model has `share` of them."""
        if self.queries is not None:
            return self.queries
        return tuple(group * share + head for group in self.groups for head in range(share))

    def widths(self, share: int) -> tuple[int, int, int]:
        """Numbers of head groups, query heads and neurons."""
        return len(self.groups), len(self.query_heads(share)), len(self.neurons)


@dataclass(frozen=True)
class UnitSizes:
    """Parameters of a layer that go with one unit, biases of the sliced sides included.

    Attributes:
        group: a key/value head and its query heads; (2g + 2) x head_dim x hidden without biases, g query heads a group.
        query: one query head, its rows of Q and columns of O: 2 x head_dim x hidden without biases.
        neuron: 3 x hidden without biases.
    """

    group: int
    query: int
    neuron: int

    def removed(self, groups: int, queries: int, neurons: int) -> int:
        """Parameters that go with whole groups, with `queries` query heads of groups that stay, and with neurons."""
        return groups * self.group + queries * self.query + neurons * self.neuron


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, in order."""
    body: Any = getattr(model, "model", model)
    return list(body.layers)


def projections_of(layer: nn.Module) -> dict[str, nn.Linear]:
    """The linear projections of a layer that heads or neurons sit in, by the names of `OUTPUTS` and `INPUTS`."""
    return dict(_projections(layer))


def output_projections(layer: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """`o_proj` and `down_proj` of a decoder layer."""
    found = projections_of(layer)
    return found["o_proj"], found["down_proj"]


def block_parameters(model: nn.Module) -> int:
    """Parameters of all decoder layers, norms included; embeddings and the head are not among them."""
    return sum(weight.numel() for layer in layers_of(model) for weight in layer.parameters())


def parameters_per_unit(model: nn.Module) -> list[UnitSizes]:
    """What one head group, one query head and one neuron of each layer have, `[layers]`.

    Raises:
        UserError: the projections of a layer do not divide into equal units.
    """
    config: Any = model.config
    numbers = {
        "query": config.num_attention_heads,
        "key_value": config.num_key_value_heads,
        "neuron": config.intermediate_size,
    }
    share = numbers["query"] // numbers["key_value"]
    found = []
    for layer, attention in zip(layers_of(model), attention_modules(model), strict=True):
        whole = dict.fromkeys(numbers, 0)
        for name, module in _projections(layer):
            kinds = OUTPUTS.get(name) or INPUTS[name]
            heads = sum(numbers[kind] for kind in kinds)
            biased = module.bias is not None and name in OUTPUTS
            for kind in kinds:
                share_of_rows = numbers[kind] * (module.weight.numel() + (module.bias.numel() if biased else 0))
                whole[kind] += share_of_rows // heads
        uneven = [kind for kind, number in numbers.items() if whole[kind] % number]
        if uneven:
            raise UserError(
                "projections do not divide into equal heads and neurons",
                where=f"layer {attention.layer_idx}",
                expected=", ".join(f"{numbers[kind]} times as many as one {kind}" for kind in uneven),
                found=", ".join(f"{whole[kind]} parameters" for kind in uneven),
            )
        one = {kind: whole[kind] // number for kind, number in numbers.items()}
        found.append(UnitSizes(one["key_value"] + share * one["query"], one["query"], one["neuron"]))
    return found


def is_uniform(kept: Sequence[Kept], share: int) -> bool:
    """Whether all layers keep the same numbers, which is what a stock configuration can say."""
    return len({layer.widths(share) for layer in kept}) == 1


@torch.no_grad()
def prune(model: nn.Module, kept: Sequence[Kept]) -> None:
    """Slice a dense model in place.

    Where all layers keep the same numbers the configuration follows, and the model saves as a stock checkpoint. Where
    they differ the configuration stays the dense model's, and only the patched form can run what is left.

    Args:
        model: with one width in all layers, as its configuration says.
        kept: what stays, per layer.

    Raises:
        UserError: an index is missing in the model, nothing would be left of a layer, or query heads are not the same
            number in every group.
    """
    config: Any = model.config
    attention: Any = attention_modules(model)
    head_dim = attention[0].head_dim
    share = config.num_attention_heads // config.num_key_value_heads
    _check(kept, len(attention), config.num_key_value_heads, share, config.intermediate_size)
    for layer, stays in zip(layers_of(model), kept, strict=True):
        picked = {
            "query": (_rows(stays.query_heads(share), head_dim), config.num_attention_heads * head_dim),
            "key_value": (_rows(stays.groups, head_dim), config.num_key_value_heads * head_dim),
            "neuron": (_rows(stays.neurons, 1), config.intermediate_size),
        }
        for name, module in _projections(layer):
            _slice(
                module, [picked[kind] for kind in OUTPUTS.get(name, INPUTS.get(name, ()))], 0 if name in OUTPUTS else 1
            )
        groups, queries, neurons = stays.widths(share)
        _resize(layer, {"num_key_value_heads": groups, "num_attention_heads": queries, "num_heads": queries})
        _resize(layer, {"num_key_value_groups": queries // groups, "intermediate_size": neurons})
    if is_uniform(kept, share):
        groups, queries, neurons = kept[0].widths(share)
        sizes = {"num_key_value_heads": groups, "num_attention_heads": queries, "intermediate_size": neurons}
        for name, value in {**sizes, "head_dim": head_dim}.items():
            setattr(config, name, value)


@torch.no_grad()
def add_output_biases(model: nn.Module, biases: Sequence[tuple[Sequence[float], Sequence[float]]]) -> None:
    """Give o_proj and down_proj of every layer a bias, in place, in a form that the stock configuration knows.

    The other projections get biases of zero where the configuration has one switch for all of an attention or MLP.

    Args:
        biases: per layer, `hidden_size` numbers behind o_proj and as many behind down_proj.

    Raises:
        UserError: the architecture has no such biases.
    """
    config: Any = model.config
    if not (hasattr(config, "attention_bias") and hasattr(config, "mlp_bias")):
        raise UserError(
            "this architecture has no biases behind o_proj and down_proj",
            where=f"model_type {config.model_type}",
            expected="`attention_bias` and `mlp_bias` in its configuration",
            fix="write `compensate: false` in the solver",
        )
    config.attention_bias = config.mlp_bias = True
    for layer, (attention, mlp) in zip(layers_of(model), biases, strict=True):
        added = {"o_proj": attention, "down_proj": mlp}
        for name, module in _projections(layer):
            before = module.bias if module.bias is not None else module.weight.new_zeros(module.out_features)
            extra = torch.tensor(added.get(name, 0.0), dtype=torch.float32, device=before.device)
            module.bias = nn.Parameter((before.float() + extra).to(before.dtype))


def _resize(layer: nn.Module, sizes: Mapping[str, int]) -> None:
    """Write sizes into the modules of a layer that keep a number of their own."""
    for module in layer.modules():
        for name, value in sizes.items():
            if name in vars(module):
                setattr(module, name, value)


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


def _check(kept: Sequence[Kept], layers: int, groups: int, share: int, neurons: int) -> None:
    if len(kept) != layers:
        raise UserError("the wrong number of layers to prune", expected=f"{layers}", found=f"{len(kept)}")
    for number, layer in enumerate(kept):
        queries = layer.query_heads(share)
        for word, units, most in (
            ("head group", layer.groups, groups),
            ("query head", queries, groups * share),
            ("neuron", layer.neurons, neurons),
        ):
            if not units:
                raise UserError(f"no {word} would stay", where=f"layer {number}", expected="one or more")
            if sorted(set(units)) != list(units) or not 0 <= units[0] <= units[-1] < most:
                raise UserError(
                    f"{word} indices are not ascending numbers below {most}",
                    where=f"layer {number}",
                    found=", ".join(map(str, units[:8])),
                )
        counts = Counter(query // share for query in queries)
        if set(counts) != set(layer.groups) or len(set(counts.values())) > 1:
            raise UserError(
                "query heads would not divide evenly among the groups that stay",
                where=f"layer {number}",
                expected=f"the same number of query heads of each of the groups {list(layer.groups)}, and no other",
                found=f"query heads {list(queries)}",
            )
