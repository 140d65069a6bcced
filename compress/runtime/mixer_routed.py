"""The mixer of `routed` groups: softmax attention over spans, of which every token uses the units that it chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .mixer import LayerFacts, register
from .mixer_span import SpanMixer
from .pages import PagedState
from .routers import Choice, Router, disagreement
from .span import AnySpan, Span, own_span
from .step import Routing, Step


@register("routed")
class RoutedMixer(SpanMixer):
    """Mixture-of-Head (arXiv 2410.11842): attention of all heads, times the gates of `routers.Router`.

    The output of a head that is off is zero. Keys and values of every token are stored in every group, on or off, as
    later tokens may choose the group.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], facts: LayerFacts) -> None:
        wrong = disagreement(groups, facts.group_size)
        if wrong is not None:
            raise ValueError(f"layer {facts.index}: {wrong[0]}: expected {wrong[1]}, found {wrong[2]}")
        super().__init__(groups, facts)
        self.router = Router(groups, facts)
        self.needs_inputs = self.router.reads_inputs
        self.by_query = ("router.route", "router.phase") if groups[0]["unit"] == "head" else ()

    def span(self, group: Mapping[str, Any]) -> AnySpan:
        """The window beside the routing; without one, what the layer itself sees."""
        span = Span(group["sink"], group["alpha"], group["beta"])
        return own_span(self.facts.native_window) if span.is_full else span

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
        choice = self.choose(query, step)
        out = super().prefill(query, key, value, state, step, scale=scale, dropout=dropout)
        return self.gated(out, choice)

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
        choice = self.choose(query, step)
        return self.gated(super().decode(query, key, value, state, step, scale=scale), choice)

    def choose(self, query: torch.Tensor, step: Step) -> Choice:
        """What the pass's columns choose, `[B, T, units]`, from queries `[B, H, T, D]`; in columns that are no token
        nothing means anything."""
        absent = None
        if step.rows is None or not step.rows.is_whole(query.shape[2]):
            absent = step.positions(query.device) < 0
        hidden = step.hidden if self.needs_inputs else None
        if absent is not None:  # they may hold NaN
            query = query.masked_fill(absent[:, None, :, None], 0)
            hidden = None if hidden is None else hidden.masked_fill(absent[..., None], 0)
        choice = self.router(query, hidden)
        if step.record is not None:
            self._report(choice, absent, step)
        return choice

    def gated(self, out: torch.Tensor, choice: Choice) -> torch.Tensor:
        """Outputs `[B, T, H, D]` times the gates of their units; zero where they are off."""
        gates, on = (self.by_head(each)[..., None] for each in (choice.gates, choice.on))
        return (out * gates).to(out.dtype).masked_fill(~on, 0)

    def by_head(self, units: torch.Tensor) -> torch.Tensor:
        """Of every query head of the mixer what its unit has: `[..., units]` to `[..., H]`."""
        return units if self.router.heads == 1 else units.repeat_interleave(self.router.heads, dim=-1)

    def _report(self, choice: Choice, absent: torch.Tensor | None, step: Step) -> None:
        """Tell the record of the pass what its tokens chose."""
        assert step.record is not None
        router = self.router
        parts = (choice.logits, choice.probs, choice.chosen)
        logits, probs, chosen = (x.flatten(0, 1) if absent is None else x[~absent] for x in parts)
        heads = tuple(self.heads[unit * router.heads : (unit + 1) * router.heads] for unit in range(router.units))
        step.record.routing[self.facts.index] = Routing(
            logits,
            probs,
            chosen,
            tuple(heads[unit] for unit in router.routed),
            tuple(heads[unit] for unit in router.shared),
        )
        step.record.add_gate(self.facts.index, self.by_head(choice.gates))
