"""Attention alone, prefill and decode: a plan's spans beside the fastest dense attention, in one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from compress.bench.dense import dense_attention
from compress.bench.measure import Time, graphed_times, times_in_turn
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


def mix(name: str, groups: int, length: int) -> list[SpanTarget]:
    """A named plan for one layer: A (half of the groups sink 64 + window 256), B (windows 512, 2048, N/4, N/2)."""
    if name == "full":
        return [FullGroup()] * groups
    if name == "A":
        half: list[SpanTarget] = [WindowGroup(sink=64, alpha=256, beta=0.0)] * (groups // 2)
        return half + [FullGroup()] * (groups - groups // 2)
    if name == "B":
        windows = (512, 2048, length // 4, length // 2)
        return [WindowGroup(sink=0, alpha=windows[group * 4 // groups], beta=0.0) for group in range(groups)]
    raise ValueError(f"mix: expected A, B or full, got {name!r}")


def with_mix(dense: Any, name: str, length: int) -> Any:
    """The dense model's twin in which every layer has the named plan of `mix`."""
    config = dense.config
    groups = [group.model_dump(mode="json") for group in mix(name, groups_of(config), length)]
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
