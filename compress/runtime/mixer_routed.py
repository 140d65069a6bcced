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

    chooses = True
    needs_inputs = True  # of most routers; a mixer knows whether its own reads them

    def __init__(self, groups: Sequence[Mapping[str, Any]], facts: LayerFacts) -> None:
        wrong = disagreement(groups, facts.group_size)
        if wrong is not None:
            raise ValueError(f"layer {facts.index}: {wrong[0]}: expected {wrong[1]}, found {wrong[2]}")
        super().__init__(groups, facts)
        self.router = Router(groups, facts)
        self.needs_inputs = self.router.reads_inputs
        self.learns = self.router.kind != "random"
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
        """As `Mixer.prefill`; where attention takes gradients, or drops weights, all heads are computed."""
        choice = self.choose(query, step)
        trained = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        active = None if trained or dropout else self.active(choice)
        out = self.prefill_active(active, query, key, value, state, step, scale=scale, dropout=dropout)
        return self.gated(out, choice, active is not None)

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
        active = self.active(choice)
        on = None if active is None else active[..., 0]
        out = self.decode_active(on, query, key, value, state, step, scale=scale)
        return self.gated(out, choice, on is not None)

    def active(self, choice: Choice) -> torch.Tensor | None:
        """Which groups are on, `[B, G, T]`, or which heads, `[B, H, T]`; None where all always are."""
        router = self.router
        if router.active == len(router.routed):
            return None
        share = self.facts.group_size
        copies = 1 if router.heads < share else router.heads // share
        on = choice.on.transpose(1, 2)
        return on if copies == 1 else on.repeat_interleave(copies, dim=1)

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

    def gated(self, out: torch.Tensor, choice: Choice, left_out: bool) -> torch.Tensor:
        """Outputs `[B, T, H, D]` times the gates of their units; zero where they are off.

        Args:
            left_out: they are zero there already.
        """
        gates = self.by_head(choice.gates)[..., None]
        if left_out and self.router.quantised and not gates.requires_grad:
            return out
        out = (out * gates).to(out.dtype)
        return out if left_out else out.masked_fill(~self.by_head(choice.on)[..., None], 0)

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
        batch, columns = choice.on.shape[:2]
        tokens = [columns] * batch if absent is None else (~absent).sum(1).tolist()
        routing = Routing(
            logits,
            probs,
            chosen,
            tuple(heads[unit] for unit in router.routed),
            tuple(heads[unit] for unit in router.shared),
            tuple(tokens),
        )
        step.record.add_routing(self.facts.index, routing)
        step.record.add_gate(self.facts.index, self.by_head(choice.gates))
