"""Removes head groups, query heads and MLP neurons from a model: the slices of its projections that stay.

What is removed is whole: a key/value head goes with the query heads that share it, a neuron with its gate. So a pruned
model computes what the dense one computes with those outputs at zero. With one width in all layers it has the stock
classes of its family; with several, the runtime's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from compress.errors import UserError
from compress.models.families import check_pruning, family_of, layers_of
from compress.runtime.families import Projection, groups_of, head_size_of
from compress.runtime.widths import Width, declare, projections, width_of
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

    def query_heads(self, group_size: int) -> tuple[int, ...]:
        """Indices of the query heads that stay, `group_size` of them a group in the dense layer."""
        if self.queries is not None:
            return self.queries
        return tuple(group * group_size + head for group in self.groups for head in range(group_size))


def widths(config: Any, kept: Sequence[Kept]) -> list[Width]:
    """The width of every layer after `prune`, from the dense configuration."""
    group_size = config.num_attention_heads // groups_of(config)
    return [Width(len(layer.query_heads(group_size)), len(layer.groups), len(layer.neurons)) for layer in kept]


def is_uniform(config: Any, kept: Sequence[Kept]) -> bool:
    """Whether the configuration can say the widths: all layers have one, and the architecture takes it."""
    first, *others = set(widths(config, kept))
    return not others and (first == Width.of(config) or _narrowed(config, first) is not None)


def output_projections(layer: nn.Module, config: Any) -> tuple[Any, Any]:
    """The projections of a decoder layer that read the outputs of its heads and of its neurons, as `projections`."""
    family, known = family_of(config), projections(layer, config)
    return known[family.reader("query")], known[family.reader("neuron")]


def block_parameters(model: nn.Module) -> int:
    """Parameters of all decoder layers, norms included; embeddings and the head are not among them."""
    return sum(weight.numel() for layer in layers_of(model) for weight in layer.parameters())


def _missing_biases(layer: nn.Module, config: Any) -> int:
    return sum(
        module.weight.shape[:-1].numel() for module in projections(layer, config).values() if module.bias is None
    )


def _parameters_of(layer: nn.Module, config: Any, unit: Mapping[str, int], biased: bool) -> LayerParameters:
    """From the parameters of one head or neuron of every kind."""
    width = width_of(layer, config)
    group = width.query_heads // width.groups * unit["query"] + unit["key_value"]
    whole = sum(weight.numel() for weight in layer.parameters()) + (_missing_biases(layer, config) if biased else 0)
    rest = whole - width.groups * group - width.neurons * unit["neuron"]
    return LayerParameters(group, unit["neuron"], unit["query"], width.neurons, rest)


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
    config: Any = model.config
    check_pruning(config)
    rows, head_dim, layers = family_of(config).projections, head_size_of(config), []
    for number, layer in enumerate(layers_of(model)):
        width = width_of(layer, config)
        parameters = Counter[str]()
        for name, module in projections(layer, config).items():
            row = rows[name]
            lines = module.weight.shape[row.axis]
            if lines != width.size(row.parts, head_dim):
                raise UserError(
                    "a projection is not made of equal heads or neurons",
                    where=f"layer {number}: {name}",
                    expected=f"{width.size(row.parts, head_dim)} rows or columns",
                    found=f"{lines}",
                )
            biases = lines if row.axis == -2 and (biased or module.bias is not None) else 0
            for part in row.parts:
                parameters[part] += (module.weight.numel() + biases) // lines * (1 if part == "neuron" else head_dim)
        layers.append(_parameters_of(layer, config, parameters, biased))
    return layers


@torch.no_grad()
def prune(model: nn.Module, kept: Sequence[Kept]) -> bool:
    """Slice a dense model in place.

    With one width in all layers its configuration follows, and it saves as a stock checkpoint. With several the
    configuration keeps the dense sizes, and the layers carry their own: such a model runs in memory, and is saved by
    way of `with_runtime_plan` with a plan that says the widths.

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
    dense, head_dim = Width.of(config), head_size_of(config)
    group_size = dense.query_heads // dense.groups
    family = family_of(config)
    _check(kept, [width_of(layer, config) for layer in layers_of(model)], dense, family.neuron_step)
    uniform = is_uniform(config, kept)
    after = widths(config, kept)
    rows = family.projections
    for layer, stays in zip(layers_of(model), kept, strict=True):
        units = {"query": stays.query_heads(group_size), "key_value": stays.groups, "neuron": stays.neurons}
        for name, module in projections(layer, config).items():
            take(module, places_of(rows[name], units, dense, head_dim), rows[name].axis)
    if uniform:
        for name, value in {"head_dim": head_dim, **after[0].fields(config)}.items():
            setattr(config, name, value)
    for layer, width in zip(layers_of(model), after, strict=True):
        declare(layer, width, config)
    return uniform


def check_output_biases(config: Any) -> None:
    """Raise UserError where the configuration of an architecture knows no biases behind o_proj and down_proj."""
    if not (hasattr(config, "attention_bias") and hasattr(config, "mlp_bias")):
        raise UserError(
            "this architecture has no biases behind o_proj and down_proj, which compensation needs",
            where=f"model_type {config.model_type}",
            expected="a configuration with `attention_bias` and `mlp_bias`",
            fix="write `compensate: false` in the solver",
        )


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
    check_output_biases(config)
    config.attention_bias = config.mlp_bias = True
    family = family_of(config)
    for layer, (attention, mlp) in zip(layers_of(model), biases, strict=True):
        added = {family.reader("query"): attention, family.reader("neuron"): mlp}
        for name, module in projections(layer, config).items():
            before = module.bias if module.bias is not None else module.weight.new_zeros(module.out_features)
            extra = torch.tensor(added.get(name, 0.0), dtype=torch.float32, device=before.device)
            module.bias = nn.Parameter((before.float() + extra).to(before.dtype))


def _narrowed(config: Any, width: Width) -> Any | None:
    """The configuration with another width; None where the architecture's own checks refuse it.

    Llama and Gemma 3 want a hidden size that is a multiple of the number of heads, and Phi-3 derives the length of its
    RoPE factors from the two, whatever `head_dim` says. Others take the width, and build something else from it
    (`Family.narrows`).
    """
    narrows, dense = family_of(config).narrows, Width.of(config)
    if width.query_heads != dense.query_heads and "query" not in narrows:
        return None
    if width.neurons != dense.neurons and "neuron" not in narrows:
        return None
    try:
        return type(config).from_dict({**config.to_dict(), **width.fields(config), "head_dim": head_size_of(config)})
    except Exception:  # the checks of a configuration raise whatever their authors chose
        return None


def places_of(row: Projection, units: Mapping[str, Sequence[int]], dense: Width, head_dim: int) -> torch.Tensor:
    """Rows or columns of a projection of the dense width that hold some units, `[n]`, in these units' order by part."""
    group_size, chosen, start = dense.query_heads // dense.groups, [], 0
    if row.by_group:
        alone, one = replace(row, by_group=False), Width(group_size, 1, dense.neurons)
        for group in units["key_value"]:
            heads = [head - group * group_size for head in units["query"] if head // group_size == group]
            places = places_of(alone, {"query": heads, "key_value": (0,)}, one, head_dim)
            chosen.append(places + group * one.size(row.parts, head_dim))
        return torch.cat(chosen)
    for part in row.parts:
        lines = 1 if part == "neuron" else head_dim
        chosen.append((torch.tensor(units[part])[:, None] * lines + torch.arange(lines)).flatten() + start)
        start += dense.size((part,), head_dim)
    return torch.cat(chosen)


def take(module: Any, places: torch.Tensor, axis: int) -> None:
    """Keep some rows (axis -2) or columns (axis -1) of a projection, in this order."""
    index = places.to(module.weight.device)
    module.weight = nn.Parameter(module.weight.index_select(axis, index), module.weight.requires_grad)
    if axis == -2 and module.bias is not None:
        module.bias = nn.Parameter(module.bias.index_select(0, index), module.bias.requires_grad)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape


def _check(kept: Sequence[Kept], there: Sequence[Width], dense: Width, step: int) -> None:
    if len(kept) != len(there):
        raise UserError("the wrong number of layers to prune", expected=f"{len(there)}", found=f"{len(kept)}")
    for number, width in enumerate(there):
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
        if len(layer.neurons) % step:
            raise UserError(
                "PyTorch multiplies by experts in rows of 16 bytes, which this number of neurons does not fill",
                where=f"layer {number}",
                expected=f"a multiple of {step} neurons",
                found=f"{len(layer.neurons)}",
                fix=f"write `multiple: {step}` in the solver, or a multiple of it",
            )
        group_size = dense.query_heads // dense.groups
        counts = Counter(head // group_size for head in layer.query_heads(group_size))
        if set(counts) != set(layer.groups) or len(set(counts.values())) > 1:
            raise UserError(
                "query heads do not divide evenly among the head groups that stay",
                where=f"layer {number}",
                expected=f"the same number in each of the groups {', '.join(map(str, layer.groups))}",
                found=", ".join(f"{counts[group]} in group {group}" for group in sorted(counts)),
                fix="keep equally many query heads in every group that stays, and none of the others",
            )
