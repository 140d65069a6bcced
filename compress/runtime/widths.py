"""The width of a layer: how many heads and neurons it has, where they sit in its projections, and how to build it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

# Projection -> what its sides are made of, part behind part: a part is all heads or neurons of one kind.
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

    @staticmethod
    def of(config: Any) -> Width:
        """The width that a configuration gives a layer."""
        return Width(config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)

    @staticmethod
    def of_plan(layer: dict[str, Any], config: Any) -> Width:
        """The width of a plan's layer, `{"groups": [...], "query_heads": n, "mlp": {"kept": n}}`.

        Without `query_heads` every group has as many as in the configuration; without `mlp` the neurons are all there.

        Raises:
            ValueError: wider than the configuration, empty, or query heads that do not divide among the groups.
        """
        whole, groups = Width.of(config), len(layer["groups"])
        share = whole.query_heads // whole.groups
        neurons = (layer.get("mlp") or {}).get("kept", whole.neurons)
        query_heads = layer.get("query_heads")
        width = Width(groups * share if query_heads is None else query_heads, groups, neurons)
        for word, found, most in (
            ("key/value heads", width.groups, whole.groups),
            ("query heads", width.query_heads, groups * share),
            ("neurons", width.neurons, whole.neurons),
        ):
            if not 0 < found <= most:
                raise ValueError(f"{word}: expected 1 to {most}, the plan has {found}")
        if width.query_heads % groups:
            raise ValueError(f"query heads: {width.query_heads} do not divide among {groups} key/value heads")
        return width

    def in_plan(self) -> dict[str, Any]:
        """What a plan's layer says of it beside its `groups`."""
        return {"query_heads": self.query_heads, "mlp": {"kept": self.neurons}}

    def fields(self) -> dict[str, int]:
        """Under the names that configurations and stock modules use."""
        return {
            "num_attention_heads": self.query_heads,
            "num_key_value_heads": self.groups,
            "intermediate_size": self.neurons,
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
        vars(self).update(width.fields())

    def __getattr__(self, name: str) -> Any:
        # Copying and unpickling ask an object that has no `shared` yet.
        if name == "shared" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.shared, name)


def projections(layer: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Owner, name and module of every linear projection of a layer that heads or neurons sit in."""
    return [
        (owner, name, module)
        for owner in layer.modules()
        for name, module in owner.named_children()
        if isinstance(module, nn.Linear) and name in {**OUTPUTS, **INPUTS}
    ]


def width_of(layer: Any) -> Width:
    """The width of a decoder layer as its attention has it."""
    return Width.of(layer.self_attn.config)


def build(layer: Any, width: Width) -> None:
    """Put new projections of another width into a decoder layer, on the same device; none where it has that width."""
    if width == width_of(layer):
        return
    head_dim = layer.self_attn.head_dim
    for owner, name, old in projections(layer):
        inputs = width.size(INPUTS[name], head_dim) if name in INPUTS else old.in_features
        outputs = width.size(OUTPUTS[name], head_dim) if name in OUTPUTS else old.out_features
        has_bias = old.bias is not None
        setattr(
            owner, name, nn.Linear(inputs, outputs, bias=has_bias, device=old.weight.device, dtype=old.weight.dtype)
        )
    declare(layer, width)


def declare(layer: Any, width: Width) -> None:
    """Tell the modules of a decoder layer its width, wherever they keep it."""
    own = {
        **width.fields(),
        "num_heads": width.query_heads,
        "num_key_value_groups": width.query_heads // width.groups,
    }
    for module in layer.modules():
        for name, value in own.items():
            if name in vars(module):
                setattr(module, name, value)
        config = vars(module).get("config")
        if config is not None and Width.of(config) != width:
            module.config = LayerConfig(getattr(config, "shared", config), width)
