"""The mixer of `score` groups: spans of keys in pages, with another score function than the softmax."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .impl import Impl, choose_impl
from .mixer import LayerFacts, heads_of, register, take
from .mixer_span import SpanMixer
from .pages import PagedState, Pages
from .score_functions import ScoreFunction, function_of, is_cosine, row_scale
from .span import AnySpan, Span, kept_table, keys_seen
from .step import Step

EPSILON = 1e-8  # least norm of a query or a key whose cosine is taken
FUNCTION = ("score", "bias", "power", "reference")  # fields of an entry that say what function it is


@register("score")
class ScoreMixer(SpanMixer):
    """Attention over the keys of a span with the scores of `score_functions.py`; its state holds the span's pages.

    All that depends on the row alone, the temperature among it, is a factor on the query, so that SSMax runs as plain
    softmax attention. Where scores are cosines the pages hold normalised keys. Groups with the same function run
    together.

    Attributes:
        log_temperature: `[groups, query heads of one]`, of a factor on the scores: s_h of SSMax is
            exp(log_temperature) / log(reference), so that a head starts as it was at the reference length.
        bias: the same shape, added to the scores of a sigmoid; it starts at 0, which is -log n or -log(reference).
    """

    knows_scores = False

    def __init__(self, groups: Sequence[Mapping[str, Any]], facts: LayerFacts) -> None:
        super().__init__(groups, facts)
        size = (len(groups), facts.group_size)
        self.log_temperature = nn.Parameter(torch.empty(size))
        if any(group["score"] == "sigmoid" for group in groups):
            self.bias = nn.Parameter(torch.empty(size))
        else:
            self.register_parameter("bias", None)
        self.cosine = tuple(is_cosine(group["score"]) for group in groups)
        alike: dict[Hashable, list[int]] = {}
        for number, group in enumerate(groups):
            alike.setdefault(tuple(group[field] for field in FUNCTION), []).append(number)
        self.alike = tuple(map(tuple, alike.values()))
        self.order = [number for members in self.alike for number in members]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Temperature 1, no bias beyond that of the plan."""
        nn.init.zeros_(self.log_temperature)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def span(self, group: Mapping[str, Any]) -> AnySpan:
        """The span beside the score."""
        return Span(group["sink"], group["alpha"], group["beta"])

    def prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        state: PagedState | None,
        step: Step,
        *,
        scale: float | None,
        dropout: float,
    ) -> torch.Tensor:
        """As `Mixer.prefill`."""
        rows = step.rows
        assert rows is not None and step.gains is not None
        t = step.positions(query.device)
        if not rows.is_whole(query.shape[2]):  # what is no token may hold NaN, and its gradients are not to
            padding = (t < 0)[:, None, :, None]
            query, key = query.masked_fill(padding, 0), key.masked_fill(padding, 0)
        key = self._keys(key)
        pages = state.pages() if state is not None and any(rows.past) else None
        outs = []
        for members in self.alike:
            impl = self._impl(members, step, query)
            outs.append(
                impl.prefill(
                    self._queries(query, t, members, scale),
                    take(key, members, 1),
                    take(value, members, 1),
                    [self.fixed[member] for member in members],
                    rows=rows,
                    pages=None if pages is None else self._pages_of(pages, members),
                    scale=1.0,
                    dropout=dropout,
                    scores=self._function(members),
                ).transpose(1, 2)
            )
        if state is not None:
            state.advance(step.gains)
            choose_impl(step.impl, query).store(key, value, state.pages(), rows, self.fixed)
        return self._in_order(outs)

    def decode(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        state: PagedState,
        step: Step,
        *,
        scale: float | None,
    ) -> torch.Tensor:
        """As `Mixer.decode`."""
        if step.gains is not None:
            state.advance(step.gains)
        assert step.lengths is not None
        pages, lengths = state.pages(), step.lengths.to(key.device)
        choose_impl(step.impl, query).store_one(self._keys(key)[:, :, 0], value[:, :, 0], pages, lengths, self.fixed)
        t = step.positions(query.device)
        outs = []
        for members in self.alike:
            impl = self._impl(members, step, query)
            outs.append(
                impl.decode(
                    self._queries(query, t, members, scale)[:, :, 0],
                    self._pages_of(pages, members),
                    lengths,
                    [self.fixed[member] for member in members],
                    scale=1.0,
                    scores=self._function(members),
                )[:, None]
            )
        return self._in_order(outs)

    def _impl(self, members: Sequence[int], step: Step, query: torch.Tensor) -> Impl:
        """What runs some groups: the kernels where they have the function, else plain PyTorch."""
        return choose_impl(step.impl if self.groups[members[0]]["score"] == "ssmax" else "reference", query)

    def _queries(
        self, query: torch.Tensor, t: torch.Tensor, members: Sequence[int], scale: float | None
    ) -> torch.Tensor:
        """Queries of some groups with all that is a factor of the row in them, in their dtype.

        Args:
            query: `[B, H, T, D]` of all groups.
            t: `[B, T]` positions, -1 where there is no token.
        """
        size, group = self.facts.group_size, self.groups[members[0]]
        dtype = torch.promote_types(query.dtype, torch.float32)
        mine = take(query, heads_of(members, size), 1).to(dtype)
        if is_cosine(group["score"]):
            mine = functional.normalize(mine, dim=-1, eps=EPSILON)
        rules = _rules(tuple(self.fixed[member] for member in members), query.device)
        count = keys_seen(t[:, None], *rules).clamp(min=1).to(dtype)  # [B, groups, T]
        scale = self.facts.head_dim**-0.5 if scale is None else scale
        by_row = row_scale(group, count, self.facts.head_dim, scale)
        factor = take(self.log_temperature, members, 0).to(dtype).exp()[None, :, :, None]  # [1, groups, heads, 1]
        factor = factor * (by_row[:, :, None] if isinstance(by_row, torch.Tensor) else by_row)
        return (mine * factor.flatten(1, 2)[..., None]).to(query.dtype)

    def _keys(self, key: torch.Tensor) -> torch.Tensor:
        """Keys `[B, G, T, D]` as they are scored and stored: of unit length where scores are cosines."""
        if not any(self.cosine):
            return key
        unit = functional.normalize(key.to(torch.promote_types(key.dtype, torch.float32)), dim=-1, eps=EPSILON).to(
            key.dtype
        )
        return unit if all(self.cosine) else torch.where(_which(self.cosine, key.device)[:, None, None], unit, key)

    def _function(self, members: Sequence[int]) -> ScoreFunction | None:
        bias = self.log_temperature if self.bias is None else self.bias
        return function_of(self.groups[members[0]], take(bias, members, 0).flatten())

    def _pages_of(self, pages: Pages, members: Sequence[int]) -> Pages:
        if len(self.alike) == 1:
            return pages
        return Pages(pages.keys, pages.values, take(pages.table, members, 1).contiguous())

    def _in_order(self, outs: Sequence[torch.Tensor]) -> torch.Tensor:
        """`[B, T, H, D]` of all groups from those of each function."""
        if len(outs) == 1:
            return outs[0]
        order = heads_of(self.order, self.facts.group_size)
        return take(torch.cat(list(outs), dim=2), sorted(range(len(order)), key=order.__getitem__), 2)


@lru_cache(maxsize=1024)
def _rules(spans: tuple[Span, ...], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Sink, alpha, beta units and granule of spans, `[spans, 1]` each."""
    rules = [(span.sink, span.alpha, span.beta_units, span.granule) for span in spans]
    return kept_table(rules, device, torch.long).T[:, :, None].unbind()


@lru_cache(maxsize=1024)
def _which(marks: tuple[bool, ...], device: torch.device) -> torch.Tensor:
    return kept_table(marks, device, torch.bool)
