"""Removes head groups, query heads and MLP neurons from a model: the slices of its projections that stay.

What is removed is whole: a key/value head goes with the query heads that share it, a neuron with its gate. So a pruned
model computes what the dense one computes with those outputs at zero. With one width in all layers it has the stock
classes of its family; with several, the runtime's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress.errors import UserError
from compress.models.families import attention_modules, check_pruning, family_of
from compress.runtime.widths import INPUTS, OUTPUTS, Width, declare, projections, width_of
from compress.targets.unit import LayerParameters


@dataclass(frozen=True)
class Kept:
    """What stays of one layer.

    Attributes:
        groups: indices of the head groups that stay, ascending.
        neurons: indices of the MLP neurons that stay, ascending.
        queries: indices of the query heads that stay, ascending, the same number in every group that stays; None keeps
            all of these groups.
    """

    groups: tuple[int, ...]
    neurons: tuple[int, ...]
    queries: tuple[int, ...] | None = None

    def query_heads(self, share: int) -> tuple[int, ...]:
        """Indices of the query heads that stay, `share` of them a group in the dense layer."""
        if self.queries is not None:
            return self.queries
        return tuple(group * share + head for group in self.groups for head in range(share))

    def widths(self, share: int) -> tuple[int, int, int]:
        """Numbers of head groups, query heads and neurons."""
        return len(self.groups), len(self.query_heads(share)), len(self.neurons)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, in order."""
    body: Any = getattr(model, "model", model)
    return list(body.layers)


def widths(config: Any, kept: Sequence[Kept]) -> list[Width]:
    """The width of every layer after `prune`, from the dense configuration."""
    share = config.num_attention_heads // config.num_key_value_heads
    return [Width(len(layer.query_heads(share)), len(layer.groups), len(layer.neurons)) for layer in kept]


def is_uniform(config: Any, kept: Sequence[Kept]) -> bool:
    """Whether the configuration can say the widths: all layers have one, and the architecture takes it."""
    found = widths(config, kept)
    return len(set(found)) == 1 and (found[0] == Width.of(config) or _narrowed(config, found[0]) is not None)


def projections_of(layer: nn.Module) -> dict[str, nn.Linear]:
    """The linear projections of a layer that heads or neurons sit in, by the names of `OUTPUTS` and `INPUTS`."""
    return {name: module for _, name, module in projections(layer)}


def output_projections(layer: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """`o_proj` and `down_proj` of a decoder layer."""
    found = projections_of(layer)
    return found["o_proj"], found["down_proj"]


def block_parameters(model: nn.Module) -> int:
    """Parameters of all decoder layers, norms included; embeddings and the head are not among them."""
    return sum(weight.numel() for layer in layers_of(model) for weight in layer.parameters())


def missing_biases(model: nn.Module) -> int:
    """Parameters that the decoder layers gain when every projection has a bias (`add_output_biases`)."""
    return sum(map(_missing_biases, layers_of(model)))


def _missing_biases(layer: nn.Module) -> int:
    return sum(module.out_features for module in projections_of(layer).values() if module.bias is None)


def _parameters_of(layer: nn.Module, width: Width, each: Mapping[str, int], biased: bool) -> LayerParameters:
    """From the parameters of one head or neuron of every kind."""
    group = width.query_heads // width.groups * each["query"] + each["key_value"]
    whole = sum(weight.numel() for weight in layer.parameters()) + (_missing_biases(layer) if biased else 0)
    rest = whole - width.groups * group - width.neurons * each["neuron"]
    return LayerParameters(group, each["neuron"], each["query"], width.neurons, rest)


def parameters_per_unit(model: nn.Module, *, biased: bool = False) -> list[LayerParameters]:
    """Parameters that go with one unit, per layer.

    Args:
        biased: count as if every projection had a bias.

    Without biases a query head has 2 x head_dim x hidden of them, its rows of q and columns of o; a group of g query
    heads (2g + 2) x head_dim x hidden; and a neuron 3 x hidden.

    Raises:
        UserError: the architecture cannot be pruned (`Family.whole`), or a projection is not made of the heads or
            neurons that the layer has.
    """
    check_pruning(model.config)
    found = []
    for number, (layer, attention) in enumerate(zip(layers_of(model), attention_modules(model), strict=True)):
        width, head_dim = width_of(layer), int(attention.head_dim)  # type: ignore[arg-type]
        each = Counter[str]()
        for _, name, module in projections(layer):
            parts = OUTPUTS.get(name) or INPUTS[name]
            rows = module.weight.shape[0 if name in OUTPUTS else 1]
            if rows != width.size(parts, head_dim):
                raise UserError(
                    "a projection is not made of equal heads or neurons",
                    where=f"layer {number}: {name}",
                    expected=f"{width.size(parts, head_dim)} rows or columns",
                    found=f"{rows}",
                )
            biases = module.out_features if name in OUTPUTS and (biased or module.bias is not None) else 0
            for part in parts:
                each[part] += (module.weight.numel() + biases) // rows * (1 if part == "neuron" else head_dim)
        found.append(_parameters_of(layer, width, each, biased))
    return found


@torch.no_grad()
def prune(model: nn.Module, kept: Sequence[Kept]) -> bool:
    """Slice a dense model in place.

    With one width in all layers its configuration follows, and it saves as a stock checkpoint. With several the
    configuration keeps the dense sizes, and the layers carry their own: such a model runs in memory, and is saved by
    way of `with_runtime_plan` with a plan that says the widths (`Width.in_plan`).

    Args:
        model: with one width in all layers, as its configuration says.

    Returns:
        Whether the configuration follows (`is_uniform`).

    Raises:
        UserError: the architecture cannot be pruned, an index is missing in the model, nothing would be left of a
            layer, query heads do not divide evenly among the groups, or the layers differ in width already.
    """
    config: Any = model.config
    check_pruning(config)
    attention: Any = attention_modules(model)
    dense, head_dim = Width.of(config), attention[0].head_dim
    share = dense.query_heads // dense.groups
    _check(kept, [width_of(layer) for layer in layers_of(model)], dense)
    uniform = is_uniform(config, kept)
    after = widths(config, kept)
    for layer, stays in zip(layers_of(model), kept, strict=True):
        picked = {
            "query": (_rows(stays.query_heads(share), head_dim), dense.query_heads * head_dim),
            "key_value": (_rows(stays.groups, head_dim), dense.groups * head_dim),
            "neuron": (_rows(stays.neurons, 1), dense.neurons),
        }
        for _, name, module in projections(layer):
            parts = OUTPUTS.get(name) or INPUTS[name]
            _slice(module, [picked[part] for part in parts], 0 if name in OUTPUTS else 1)
    if uniform:
        for name, value in {"head_dim": head_dim, **after[0].fields()}.items():
            setattr(config, name, value)
    for layer, width in zip(layers_of(model), after, strict=True):
        declare(layer, width)
    return uniform


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
        for _, name, module in projections(layer):
            before = module.bias if module.bias is not None else module.weight.new_zeros(module.out_features)
            extra = torch.tensor(added.get(name, 0.0), dtype=torch.float32, device=before.device)
            module.bias = nn.Parameter((before.float() + extra).to(before.dtype))


def _narrowed(config: Any, width: Width) -> Any | None:
    """The configuration with another width; None where the architecture's own checks refuse it.

    Llama and Gemma 3 want a hidden size that is a multiple of the number of heads, and Phi-3 derives the length of its
    RoPE factors from the two, whatever `head_dim` says. Others take the width, and build something else from it
    (`Family.narrows`).
    """
    if not family_of(config).narrows and width.query_heads != Width.of(config).query_heads:
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    try:
        return type(config).from_dict({**config.to_dict(), **width.fields(), "head_dim": head_dim})
    except Exception:  # the checks of a configuration raise whatever their authors chose
        return None


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


def _check(kept: Sequence[Kept], found: Sequence[Width], dense: Width) -> None:
    if len(kept) != len(found):
        raise UserError("the wrong number of layers to prune", expected=f"{len(found)}", found=f"{len(kept)}")
    for number, width in enumerate(found):
        if width != dense:
            raise UserError(
                "this model is pruned already, with other widths than its configuration says",
                where=f"layer {number}",
                expected=str(dense),
                found=str(width),
                fix="prune the dense model once, with everything that goes",
            )
    for number, layer in enumerate(kept):
        units = [("head group", layer.groups, dense.groups), ("neuron", layer.neurons, dense.neurons)]
        if layer.queries is not None:
            units.append(("query head", layer.queries, dense.query_heads))
        for word, chosen, most in units:
            if not chosen:
                raise UserError(f"no {word} would stay", where=f"layer {number}", expected="one or more")
            if sorted(set(chosen)) != list(chosen) or not 0 <= chosen[0] <= chosen[-1] < most:
                raise UserError(
                    f"{word} indices are not ascending numbers below {most}",
                    where=f"layer {number}",
                    found=", ".join(map(str, chosen[:8])),
                )
        share = dense.query_heads // dense.groups
        each = Counter(head // share for head in layer.query_heads(share))
        if set(each) != set(layer.groups) or len(set(each.values())) > 1:
            raise UserError(
                "query heads do not divide evenly among the head groups that stay",
                where=f"layer {number}",
                expected=f"the same number in each of the groups {', '.join(map(str, layer.groups))}",
                found=", ".join(f"{each[group]} in group {group}" for group in sorted(each)),
                fix="keep equally many query heads in every group that stays, and none of the others",
            )
