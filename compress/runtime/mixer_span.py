"""The mixer of `full` and `window` groups: softmax attention over spans of keys, which lie in pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch

from .impl import Impl, choose_impl
from .mixer import LayerFacts, Mixer, register
from .pages import PagedState
from .reference import Rows
from .shard import Shard, View
from .span import AnySpan, Span, has_length_rule, span_of, spans_at
from .step import Step


def attend_view(impl: str, query: torch.Tensor, view: View, both: torch.Tensor, **options: Any) -> Any:
    """Softmax attention of a segment's queries `[B, H, T, D]` over the keys and values of its view, side by side.

    Args:
        both: `[B, G, columns, D + DV]`.
        options: of `reference.prefill`, whose results it gives.
    """
    key, value = both.split([query.shape[-1], both.shape[-1] - query.shape[-1]], dim=-1)
    rows = Rows.whole(len(query), query.shape[2], view.before)
    return choose_impl(impl, query).prefill(query, key, value, view.spans, rows=rows, **options)


@register("full", "window")
class SpanMixer(Mixer):
    """Every group sees the keys of its span, and its state holds the pages of that span."""

    knows_scores = True
    one_place: ClassVar[str | None] = None

    def __init__(self, groups: Sequence[Mapping[str, Any]], facts: LayerFacts) -> None:
        super().__init__(groups, facts)
        self.rules: tuple[AnySpan, ...] = tuple(self.span(group) for group in groups)
        self.by_length = has_length_rule([self.rules])
        self.fixed = () if self.by_length else spans_at([self.rules], 1)[0]

    def span(self, group: Mapping[str, Any]) -> AnySpan:
        """The keys that a group may ever need; the pages of all others are freed."""
        return span_of(group, self.facts.native_window)

    def state(self, max_length: int | None) -> PagedState:
        """Pages, as `PagedState`."""
        return PagedState(self.rules, max_length)

    def spans(self, state: PagedState | None, step: Step) -> Sequence[Span]:
        """The spans of this pass; those by length are the same from the first pass into a state on."""
        if state is not None:
            return state.spans
        return self.fixed if step.input_length is None else spans_at([self.rules], step.input_length)[0]

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
        if step.shard is not None:
            return self._on_shard(query, key, value, step.shard, step, scale=scale, dropout=dropout)
        impl = choose_impl(step.impl, query)
        attend = partial(impl.prefill, dropout=dropout)
        return self.prefill_by(attend, impl, query, key, value, state, step, scale=scale)

    def _on_shard(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        shard: Shard,
        step: Step,
        *,
        scale: float | None,
        dropout: float,
    ) -> torch.Tensor:
        """`prefill` of the segments of a sequence that are here: each is the end of the sequence of what it sees."""
        options: dict[str, Any] = {"scale": scale, "dropout": dropout, "scores": self.scores(step)}
        views = shard.views(torch.cat([key, value], dim=-1), tuple(self.spans(None, step)))
        parts = zip(shard.split(query, 2), views, strict=True)
        outs = [attend_view(step.impl, part, view, both, **options) for part, (view, both) in parts]
        return torch.cat(outs, dim=2).transpose(1, 2)

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
        return self.decode_active(None, query, key, value, state, step, scale=scale)

    def prefill_by(
        self,
        attend: Callable[..., torch.Tensor],
        impl: Impl,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        state: PagedState | None,
        step: Step,
        *,
        scale: float | None,
    ) -> torch.Tensor:
        """`prefill` by `attend`, which takes arguments of `reference.prefill`; `impl` stores the tokens."""
        rows, spans = step.rows, self.spans(state, step)
        assert rows is not None and step.gains is not None
        pages = state.pages() if state is not None and any(rows.past) else None
        out = attend(query, key, value, spans, rows=rows, pages=pages, scale=scale, scores=self.scores(step))
        if state is not None:
            state.advance(step.gains)
            impl.store(key, value, state.pages(), rows, spans, state.slack)
        return out.transpose(1, 2)

    def decode_active(
        self,
        active: torch.Tensor | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        state: PagedState,
        step: Step,
        *,
        scale: float | None,
        gates: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`decode` of the groups or heads that `active` `[B, G or H]` says are on, times `gates` of the same shape; no
        key of the others is read."""
        impl = choose_impl(step.impl, query)
        if step.gains is not None:
            state.advance(step.gains)
        assert step.lengths is not None
        pages, lengths = state.pages(), step.on("lengths", key.device)
        impl.store_one(key[:, :, 0], value[:, :, 0], pages, lengths, state.spans)
        options: dict[str, Any] = {} if active is None else {"active": active, "gates": gates}
        scores = self.scores(step)
        return impl.decode(query[:, :, 0], pages, lengths, state.spans, scale=scale, scores=scores, **options)[:, None]
