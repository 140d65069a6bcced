"""A checkpoint's plan as vLLM needs it: of every layer the rules of its head groups and its width, or why it cannot be.

Plain Python: what is decided here is tested without vLLM.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from compress_vllm.families import Row
from compress_vllm.rule import BETA_UNIT, Rule

# Targets that vLLM cannot serve by this plugin, and what each would need.
REFUSED = {
    "aaren": "a state per head in place of a cache: a spec like those of Mamba layers, and a kernel that reads it",
    "blocks": "a backend that chooses blocks by the query; nothing of the cache is freed, so only reads are saved",
    "expert": "gates on the heads of several models side by side, and their MLPs, in the model class",
    "linear": "a state of features per head beside its window: a second spec, and a kernel that reads both",
    "lowrank": "a spec with heads as long as the rank, and attention that applies the factors",
    "retain": "a manager that frees single tokens: vLLM's cache frees whole blocks, and kept tokens would have to move",
    "routed": "the routers in the model class, and kernels that leave out the heads that a token does not choose",
    "score": "attention with another function of the scores than a softmax",
}


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        rules: of its head groups; None for a group that sees what it sees in the original model.
        query_heads: in all groups together.
        neurons: of its MLP, or of each of its experts.
    """

    rules: tuple[Rule | None, ...]
    query_heads: int
    neurons: int


@dataclass(frozen=True)
class Part:
    """Head groups of a layer with one rule, which are one attention module of the engine."""

    rule: Rule | None
    groups: tuple[int, ...]


def read_layers(plan: Mapping[str, Any], row: Row, config: Any) -> list[Layer]:
    """The layers of `compress_plan` in a checkpoint's configuration.

    Args:
        config: the stock configuration; layers that the plan does not narrow have its sizes.

    Raises:
        ValueError: a head group that cannot be served, with its place and what it would need.
    """
    groups, query_heads = getattr(config, row.groups), config.num_attention_heads
    neurons = getattr(config, row.neurons, None) or 4 * config.hidden_size
    layers = []
    for number, entry in enumerate(plan["layers"]):
        mlp = entry.get("mlp") or {}
        if "experts" in mlp:
            raise ValueError(
                f"layer {number}: vLLM cannot serve several models as one, which needs {REFUSED['expert']}"
            )
        rules = tuple(_rule(group, f"layer {number} group {place}") for place, group in enumerate(entry["groups"]))
        own = entry.get("query_heads") or len(rules) * query_heads // groups
        layers.append(Layer(rules, own, mlp.get("kept", neurons)))
    return layers


def _rule(group: Mapping[str, Any], where: str) -> Rule | None:
    target = group["target"]
    if target == "full":
        return None
    if target != "window":
        needs = REFUSED.get(target, "an implementation in this plugin")
        raise ValueError(f"{where}: vLLM cannot serve the target `{target}`, which needs {needs}")
    if group.get("rule", "position") != "position":
        raise ValueError(
            f"{where}: vLLM cannot serve windows by the length of the input (`rule: length`): it computes prompts in "
            "chunks and keeps prefixes for other prompts, and such a window differs for each. Take `rule: position`"
        )
    granule = group.get("granule") or 1
    sink = -(-group["sink"] // granule) * granule
    rule = Rule(sink, group["alpha"], int(group["beta"] * BETA_UNIT), granule)
    return None if rule.is_full else rule


def of_rank(rules: Sequence[Rule | None], rank: int, ranks: int) -> tuple[Rule | None, ...]:
    """The rules of the head groups that one rank of tensor parallelism has, in its order; groups are repeated where
    there are fewer than ranks, as vLLM does."""
    count = len(rules)
    if count < ranks:
        return (rules[rank * count // ranks],)
    share = count // ranks
    return tuple(rules[rank * share : (rank + 1) * share])


def check_ranks(layers: Sequence[Layer], ranks: int) -> None:
    """Raise ValueError, with the layer, where ranks would have different rules: vLLM gives them one block table."""
    for number, layer in enumerate(layers):
        if max(len(layer.rules), ranks) % min(len(layer.rules), ranks):
            raise ValueError(
                f"layer {number}: {len(layer.rules)} head groups do not divide among {ranks} ranks of tensor "
                "parallelism; take fewer"
            )
        counts = [Counter(of_rank(layer.rules, rank, ranks)) for rank in range(ranks)]
        if any(other != counts[0] for other in counts):
            raise ValueError(
                f"layer {number}: the head groups of the ranks of tensor parallelism have different spans, and vLLM "
                f"frees the same blocks on all of them; take one rank, or a plan whose {ranks} shares of every layer "
                "have the same spans"
            )


def check_attention(name: str, layer: int, head_size: int, window: int | None, config: Any) -> None:
    """Raise ValueError where vLLM's class of a model made a layer's attention otherwise than the configuration says.

    Some of its classes work the size of a head out from the number of heads, which is wrong where heads were removed,
    some know no layers that slide by themselves, and some which slide by their numbers alone.
    """
    wanted = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_size != wanted:
        raise ValueError(
            f"{name}: heads have {wanted} numbers, and vLLM's class of this model takes {head_size}, which it works "
            "out from the number of heads; such a model without some heads cannot be served"
        )
    types, slides = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    slides = slides if types is None or types[layer] == "sliding_attention" else None
    if slides is not None and slides < config.max_position_embeddings and window is None:
        raise ValueError(
            f"{name}: the layer slides over {slides} tokens by itself, and vLLM's class of this model does not know it"
        )
    if types is not None and slides is None and window is not None:
        raise ValueError(
            f"{name}: the layer sees everything, and vLLM's class of this model lets it slide over {window} tokens, "
            "whatever config.json says"
        )


def slot_of(layers: Sequence[Layer], ranks: int) -> int:
    """Head groups of each attention module: the most that all modules of the model can have.

    vLLM gives all modules pages of equal bytes, and pads those of modules with fewer heads or lets their blocks hold
    more tokens; with as many heads in each module nothing is lost, whatever the plan.
    """
    sizes = [size for layer in layers for size in Counter(of_rank(layer.rules, 0, ranks)).values()]
    return gcd(*sizes)


def parts_of(rules: Sequence[Rule | None], slot: int) -> list[Part]:
    """The attention modules of a layer (of a rank's share of it), `slot` head groups each, in an order that depends on
    the rules alone, so that it is the same on all ranks."""
    places: dict[Rule | None, list[int]] = {}
    for place, rule in enumerate(rules):
        places.setdefault(rule, []).append(place)
    ordered = sorted(places, key=lambda rule: (rule is not None, rule))  # those of the model first
    return [
        Part(rule, tuple(places[rule][start : start + slot]))
        for rule in ordered
        for start in range(0, len(places[rule]), slot)
    ]
