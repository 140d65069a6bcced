"""The mixer of `routed` groups: softmax attention over spans, of which every token uses the units that it chooses.

With gradients all heads are computed and multiplied by their gates, which is the specification. Without, what is off is
not computed: a prefill leaves out its rows, and a decode step reads no key for a group without a head that is on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from .impl import choose_impl
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
        self.skips = self.router.active < len(self.router.routed)
        self.block = groups[0]["block"]
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
        if dropout > 0 or not self.skips or self._trained(query, key, value, step):
            choice = self.choose(query, step)
            out = super().prefill(query, key, value, state, step, scale=scale, dropout=dropout)
            return self.gated(out, choice)
        active, gates = self._flags(query, step)
        attend = partial(choose_impl(step.impl, query).routed_prefill, active=active, gates=gates)
        return self.prefill_by(attend, query, key, value, state, step, scale=scale)

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
        if not self.skips:
            choice = self.choose(query, step)
            return self.gated(super().decode(query, key, value, state, step, scale=scale), choice)
        active, gates = (None if flags is None else flags[..., 0] for flags in self._flags(query, step))
        attend = partial(choose_impl(step.impl, query).decode, active=active, gates=gates)
        return self.decode_by(attend, query, key, value, state, step, scale=scale)

    def _trained(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: Step) -> bool:
        """Whether gradients are taken for anything that the outputs depend on."""
        given = (query, key, value, *([] if step.hidden is None else [step.hidden]), *self.parameters())
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)

    @torch.no_grad()
    def _flags(self, query: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the pass's columns choose, as `active` and `gates` of `reference.routed_prefill`.

        There what is on are groups or heads, of which a unit may be several.
        """
        fast = choose_impl(step.impl, query).router
        gates: torch.Tensor | None
        if fast is not None and step.record is None and fast.takes(self.router):
            on, gates = fast.route(self.router, query, step.hidden)
        else:
            choice = self.choose(query, step)
            on, gates = choice.on, None if self.router.quantised else choice.gates
        return self._by_unit(on), None if gates is None else self._by_unit(gates)

    def _by_unit(self, flags: torch.Tensor) -> torch.Tensor:
        """Of units `[B, T, units]` as of groups or heads `[B, G or H, T]`."""
        flags = flags.transpose(1, 2)
        return flags if self.block == 1 else flags.repeat_interleave(self.block, dim=1)

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
