"""The width of a layer: how many heads and neurons it has, where they sit in its projections, and how to build it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .families import groups_of, head_size_of, neurons_of, row_of


@dataclass(frozen=True)
class Width:
    """Heads and neurons of one layer.

    Attributes:
        query_heads: a multiple of `groups`.
        groups: key/value heads.
        neurons: of the MLP.
    """

    query_heads: int
    groups: int
    neurons: int

    @property
    def queries(self) -> int:
        """Query heads of a group."""
        return self.query_heads // self.groups

    @staticmethod
    def of(config: Any) -> Width:
        """The width that a configuration gives a layer."""
        return Width(config.num_attention_heads, groups_of(config), neurons_of(config))

    @staticmethod
    def of_plan(layer: dict[str, Any], config: Any) -> Width:
        """The width of a plan's layer, `{"groups": [...], "query_heads": n, "mlp": {"kept": n}}`.

        Without `query_heads` every group has as many as in the configuration; without `kept` the neurons are all there.
        With `experts` of the MLP, the layer may have the heads of as many models side by side.

        Raises:
            ValueError: wider than the configuration, empty, or query heads that do not divide among the groups.
        """
        whole, groups = Width.of(config), len(layer["groups"])
        group_size = whole.query_heads // whole.groups
        mlp = layer.get("mlp") or {}
        neurons, models = mlp.get("kept", whole.neurons), mlp.get("experts", 1)
        query_heads = layer.get("query_heads")
        width = Width(groups * group_size if query_heads is None else query_heads, groups, neurons)
        for word, kept, most in (
            ("key/value heads", width.groups, whole.groups * models),
            ("query heads", width.query_heads, groups * group_size * models),
            ("neurons", width.neurons, whole.neurons),
        ):
            if not 0 < kept <= most:
                raise ValueError(f"{word}: expected 1 to {most}, the plan has {kept}")
        if width.query_heads % groups:
            raise ValueError(f"query heads: {width.query_heads} do not divide among {groups} key/value heads")
        return width

    def fields(self, config: Any) -> dict[str, int]:
        """Under the names that a configuration and its stock modules use."""
        row = row_of(config)
        return {
            row.groups: self.groups,
            "num_attention_heads": self.query_heads,
            row.neurons: self.neurons,
        }

    def size(self, parts: tuple[str, ...], head_dim: int) -> int:
        """Rows or columns of one side of a projection."""
        sizes = {"query": self.query_heads * head_dim, "key_value": self.groups * head_dim, "neuron": self.neurons}
        return sum(sizes[part] for part in parts)


class LayerConfig:
    """A model's configuration with one layer's own width; all else is read from the model's when it is asked for.

    Stock attention may read its sizes from the configuration in every forward pass, and the attention implementation
    may change at any time, so a copy would not do.
    """

    def __init__(self, shared: Any, width: Width) -> None:
        self.shared = shared
        vars(self).update(width.fields(shared))

    def __getattr__(self, name: str) -> Any:
        # Copying and unpickling ask an object that has no `shared` yet.
        if name == "shared" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.shared, name)


class Experts:
    """One projection of all experts of a layer: its weights `[experts, outputs, inputs]`, as a linear module's."""

    bias = None

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.owner, self.name = owner, name

    @property
    def weight(self) -> nn.Parameter:
        """The weights, which may be set."""
        return self.owner.get_parameter(self.name)

    @weight.setter
    def weight(self, weight: nn.Parameter) -> None:
        setattr(self.owner, self.name, weight)


def projections(layer: nn.Module, config: Any) -> dict[str, Any]:
    """The projections of a layer that heads or neurons sit in, linear modules or `Experts`, by their names in it."""
    modules = {}
    for name in row_of(config).projections:
        path, _, last = name.rpartition(".")
        owner = layer.get_submodule(path)
        there = getattr(owner, last)
        modules[name] = Experts(owner, last) if isinstance(there, nn.Parameter) else there
    return modules


def width_of(layer: nn.Module, config: Any) -> Width:
    """The width of a decoder layer as its attention has it."""
    return Width.of(row_of(config).attention_of(layer).config)


def build(layer: nn.Module, width: Width, config: Any) -> None:
    """Put new projections of another width into a decoder layer, on the same device; none where it has that width."""
    if width == width_of(layer, config):
        return
    rows, head_dim = row_of(config).projections, head_size_of(config)
    for path, old in projections(layer, config).items():
        shape = list(old.weight.shape)
        shape[rows[path].axis] = width.size(rows[path].parts, head_dim)
        like = {"device": old.weight.device, "dtype": old.weight.dtype}
        if isinstance(old, Experts):
            old.weight = nn.Parameter(torch.empty(shape, **like))
        else:
            layer.set_submodule(path, nn.Linear(shape[1], shape[0], bias=old.bias is not None, **like))
    declare(layer, width, config)


def declare(layer: nn.Module, width: Width, config: Any) -> None:
    """Tell the modules of a decoder layer its width, wherever they keep it."""
    fields = {
        **width.fields(config),
        "intermediate_dim": width.neurons,
        "num_heads": width.query_heads,
        "num_key_value_groups": width.query_heads // width.groups,
    }
    for module in layer.modules():
        for name, value in fields.items():
            if name in vars(module):
                setattr(module, name, value)
        known = vars(module).get("config")
        if known is not None and Width.of(known) != width:
            module.config = LayerConfig(getattr(known, "shared", known), width)  # type: ignore[assignment]
