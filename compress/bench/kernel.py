"""Attention alone, prefill and decode: a plan's spans beside the fastest dense attention, in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from typing import Any

import torch

from compress.bench.dense import dense_attention
from compress.bench.measure import Time, graphed_times, times_in_turn
from compress.bench.routed import ROUTED, RoutedCache, RoutedLayer, routed_groups
from compress.models.planned import with_runtime_plan
from compress.runtime.families import groups_of, head_size_of
from compress.runtime.impl import choose_impl
from compress.runtime.pages import Pages
from compress.runtime.span import PAGE, Span
from compress.targets.full import FullGroup
from compress.targets.span import SpanTarget
from compress.targets.target import Target
from compress.targets.unit import Unit
from compress.targets.window import WindowGroup


@dataclass(frozen=True)
class Shape:
    """Heads of one layer."""

    name: str
    query_heads: int
    groups: int
    head_dim: int

    @classmethod
    def of(cls, name: str, config: Any) -> Shape:
        """From a model's configuration."""
        return cls(name, config.num_attention_heads, groups_of(config), head_size_of(config))


def mix(name: str, groups: int, length: int, query_heads: int | None = None) -> list[SpanTarget]:
    """A named plan for one layer: A (half of the groups sink 64 + window 256), B (windows 512, 2048, N/4, N/2), or one
    of `ROUTED`, for which the layer's query heads are asked for."""
    if name == "full":
        return [FullGroup()] * groups
    if name == "A":
        half: list[SpanTarget] = [WindowGroup(sink=64, alpha=256, beta=0.0)] * (groups // 2)
        return half + [FullGroup()] * (groups - groups // 2)
    if name == "B":
        windows = (512, 2048, length // 4, length // 2)
        return [WindowGroup(sink=0, alpha=windows[group * 4 // groups], beta=0.0) for group in range(groups)]
    if name in ROUTED:
        return list(routed_groups(name, groups, query_heads or groups))
    raise ValueError(f"mix: expected A, B, full, {', '.join(ROUTED)}, got {name!r}")


def with_mix(dense: Any, name: str, length: int) -> Any:
    """The dense model's twin in which every layer has the named plan of `mix`."""
    config = dense.config
    named = mix(name, groups_of(config), length, config.num_attention_heads)
    groups = [group.model_dump(mode="json") for group in named]
    return with_runtime_plan(dense, {"schema": 1, "layers": [{"groups": groups}] * config.num_hidden_layers})


def spans_of(groups: Sequence[SpanTarget], length: int) -> list[Span]:
    """What the kernels take, for an input of `length` tokens."""
    return [group.span().at_length(length) for group in groups]


def visible_share(groups: Sequence[Target], length: int) -> float:
    """Visible pairs of query and key over causal pairs in a prefill, all head groups together."""
    pairs = sum(group.cost(Unit(1, 1), length).flops for group in groups)
    return pairs / sum(FullGroup().cost(Unit(1, 1), length).flops for _ in groups)


@dataclass(frozen=True)
class Row:
    """One measurement of a plan beside dense attention; `dense` names the back end that was fastest."""

    what: str
    shape: str
    mix: str
    batch: int
    length: int
    impl: str
    plan: Time
    dense: dict[str, Time]
    fraction: float  # prefill: visible pairs; decode: bytes of keys and values read, of those of dense attention
    kept_bytes: int | None = None
    all_on: Time | None = None  # of a plan by which tokens choose heads: with all of them on

    @property
    def fastest(self) -> str:
        """The fastest dense back end."""
        return min(self.dense, key=lambda name: self.dense[name].median)

    @property
    def speedup(self) -> float:
        """Time of the fastest dense attention over the plan's."""
        return self.dense[self.fastest].median / self.plan.median

    def values(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "fastest": self.fastest, "speedup": self.speedup}


def prefill_row(shape: Shape, name: str, batch: int, length: int, impl: str, device: torch.device, dtype: Any) -> Row:
    """Causal prefill of random tokens, `[B, T, H, D]` in memory as a model has them."""
    if name in ROUTED:
        return routed_prefill_rows(shape, [name], batch, length, impl, device, dtype)[0]
    query, key, value = random_qkv(shape, batch, length, device, dtype)
    groups = mix(name, shape.groups, length)
    spans = spans_of(groups, length)
    attend = choose_impl(impl, query).prefill
    calls = {"": lambda: attend(query, key, value, spans), **dense_attention(query, key, value)}
    dense = times_in_turn(calls, device)
    plan = dense.pop("")
    return Row("prefill", shape.name, name, batch, length, impl, plan, dense, visible_share(groups, length))


def decode_row(shape: Shape, name: str, batch: int, length: int, impl: str, device: torch.device, dtype: Any) -> Row:
    """One token a sequence over random pages, inside a CUDA graph for both sides."""
    if name in ROUTED:
        return routed_decode_rows(shape, [name], batch, length, impl, device, dtype)[0]
    spans = spans_of(mix(name, shape.groups, length), length)
    pages = random_pages(spans, batch, length, shape.head_dim, device, dtype)
    query = torch.randn(batch, shape.query_heads, shape.head_dim, device=device, dtype=dtype)
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    attend = choose_impl(impl, query).decode
    plan = graphed_times(lambda: attend(query, pages, lengths, spans), device)
    kept = 2 * pages.keys.numel() * pages.keys.itemsize
    key = torch.randn(batch, shape.groups, length, shape.head_dim, device=device, dtype=dtype)
    value = torch.randn_like(key)
    dense = {
        other: graphed_times(call, device) for other, call in dense_attention(query[:, :, None], key, value).items()
    }
    fraction = kept / (2 * key.numel() * key.itemsize)
    return Row("decode", shape.name, name, batch, length, impl, plan, dense, fraction, kept)


@torch.inference_mode()
def routed_prefill_rows(
    shape: Shape, names: Sequence[str], batch: int, length: int, impl: str, device: torch.device, dtype: Any
) -> list[Row]:
    """Prefill under several plans of `ROUTED`, routers included, in turn with dense attention and all heads on.

    `fraction` is that of the pairs that are computed for what the random tokens choose.
    """
    qkv = random_qkv(shape, batch, length, device, dtype)
    hidden = torch.randn(batch, length, shape.query_heads * shape.head_dim, device=device, dtype=dtype)
    layers = {name: RoutedLayer(name, shape, device, dtype) for name in names}
    first = layers[names[0]]
    calls = {name: layer.prefill(layer.chosen, qkv, hidden, impl) for name, layer in layers.items()}
    calls["all on"] = first.prefill(first.whole, qkv, hidden, impl)
    query, key, value = qkv
    dense = times_in_turn({**calls, **dense_attention(query, key, value)}, device)
    spent = {name: dense.pop(name) for name in calls}
    return [
        Row(
            "prefill", shape.name, name, batch, length, impl, spent[name], dense,
            layer.computed_share(qkv, hidden, impl), all_on=spent["all on"],
        )
        for name, layer in layers.items()
    ]  # fmt: skip


@torch.inference_mode()
def routed_decode_rows(
    shape: Shape,
    names: Sequence[str],
    batch: int,
    length: int,
    impl: str,
    device: torch.device,
    dtype: Any,
    copies: int = 1,
) -> list[Row]:
    """A decode step under several plans of `ROUTED`, routers and the store of the new key included, in CUDA graphs.

    `fraction` is that of keys and values that are read for what the random tokens choose.

    Args:
        copies: caches that are read in turn on both sides, each with tokens of its own, so that none is in the chip's.
    """
    layers = {name: RoutedLayer(name, shape, device, dtype) for name in names}
    caches = [RoutedCache(shape, batch, length, device, dtype) for _ in range(copies)]
    mixers: dict[str, Any] = {name: layer.chosen for name, layer in layers.items()}
    spent = {
        name: _each([partial(cache.decode, mixer, impl) for cache in caches], device)
        for name, mixer in {**mixers, "all on": layers[names[0]].whole}.items()
    }
    reads = {name: sum(cache.read_share(mixer, impl) for cache in caches) / copies for name, mixer in mixers.items()}
    caches.clear()
    query = torch.randn(batch, shape.query_heads, 1, shape.head_dim, device=device, dtype=dtype)
    size = (2, batch, shape.groups, length, shape.head_dim)
    backends = [dense_attention(query, *torch.randn(size, device=device, dtype=dtype)) for _ in range(copies)]
    dense = {name: _each([calls[name] for calls in backends], device) for name in backends[0]}
    of_all = prod(size) * dtype.itemsize
    return [
        Row(
            "decode", shape.name, name, batch, length, impl, spent[name], dense, reads[name],
            round(of_all * reads[name]), spent["all on"],
        )
        for name in names
    ]  # fmt: skip


def _each(calls: Sequence[Callable[[], Any]], device: torch.device) -> Time:
    """The mean time of one of several calls, all of them inside a CUDA graph."""
    count = len(calls)
    time = graphed_times(lambda: [call() for call in calls], device, calls=max(1, 20 // count))
    return Time(time.median / count, time.lower / count, time.upper / count, time.repeats)


def random_qkv(shape: Shape, batch: int, length: int, device: torch.device, dtype: Any) -> list[torch.Tensor]:
    """Queries `[B, H, T, D]`, keys and values `[B, G, T, D]`, as transposed views of `[B, T, heads, D]`."""
    heads = (shape.query_heads, shape.groups, shape.groups)
    return [torch.randn(batch, length, h, shape.head_dim, device=device, dtype=dtype).transpose(1, 2) for h in heads]


def random_pages(
    spans: Sequence[Span], batch: int, length: int, head_dim: int, device: torch.device, dtype: Any
) -> Pages:
    """A filled cache of random numbers, its pages in random places."""
    held = [span.pages(length) for span in spans]
    total = batch * sum(map(len, held))
    order = torch.randperm(total).to(torch.int32)
    table = torch.full((batch, len(spans), -(-length // PAGE)), -1, dtype=torch.int32)
    taken = 0
    for row in range(batch):
        for group, numbers in enumerate(held):
            table[row, group, numbers] = order[taken : taken + len(numbers)]
            taken += len(numbers)
    keys = torch.randn(total, PAGE, head_dim, device=device, dtype=dtype)
    return Pages(keys, torch.randn_like(keys), table.to(device))
