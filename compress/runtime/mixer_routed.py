"""The mixer of `routed` groups: softmax attention over spans, of which every token uses the units that it chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from .impl import choose_impl
from .impl_routed import ROUTED_IMPLS
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
    left: float = 0.0
    one_place = "how evenly its tokens choose is measured over all of a sequence"
    needs_inputs = True  # of most routers; a mixer knows whether its own reads them

    def __init__(self, groups: Sequence[Mapping[str, Any]], facts: LayerFacts) -> None:
        wrong = disagreement(groups, facts.group_size)
        if wrong is not None:
            raise ValueError(f"layer {facts.index}: {wrong[0]}: expected {wrong[1]}, found {wrong[2]}")
        super().__init__(groups, facts)
        self.router = Router(groups, facts)
        self.needs_inputs = self.router.reads_inputs
        self.all_on = self.router.active == len(self.router.routed)
        self.learns = self.router.kind != "random"
        self.by_query = ("router.route", "router.phase") if groups[0]["unit"] == "head" else ()

    @torch.no_grad()
    def untie(self) -> bool:
        """As `Mixer.untie`: where all units have the same score, they get random ones."""
        if self.router.kind != "two_stage" or bool(self.router.route.any()):
            return False
        self.router.route.normal_(std=self.facts.hidden_size**-0.5)
        return True

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
        trained = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        on, gates = self.flags(query, step)
        if self.all_on or trained or dropout > 0:
            out = super().prefill(query, key, value, state, step, scale=scale, dropout=dropout)
            return self.gated(out, None if self.all_on else on, gates, left=self.left if trained else 0.0)
        inside = None if gates is None or gates.requires_grad else self.by_unit(gates)
        impl = choose_impl(step.impl, query)
        attend = partial(ROUTED_IMPLS[impl.name].prefill, active=self.by_unit(on), gates=inside)
        out = self.prefill_by(attend, impl, query, key, value, state, step, scale=scale)
        return out if inside is not None else self.gated(out, None, gates)

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
        on, gates = (None if x is None else self.by_unit(x)[..., 0] for x in self.flags(query, step))
        return self.decode_active(on, query, key, value, state, step, scale=scale, gates=gates)

    def flags(self, query: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the pass's columns choose: which units are on, `[B, T, units]`, and their gates; None where they are 1.

        In columns that are no token nothing means anything. Where nobody asks for gradients or a report, a kernel may
        do it in one launch.
        """
        hidden = step.hidden if self.needs_inputs else None
        given = (query, *([] if hidden is None else [hidden]), *self.router.parameters())
        trained = torch.is_grad_enabled() and any(x.requires_grad for x in given)
        fast = ROUTED_IMPLS[choose_impl(step.impl, query).name].router
        if fast is not None and not trained and step.record is None and fast.takes(self.router):
            return fast.route(self.router, query, hidden)
        choice = self.choose(query, step)
        return choice.on, None if self.router.quantised and not choice.gates.requires_grad else choice.gates

    def by_unit(self, flags: torch.Tensor) -> torch.Tensor:
        """What units `[B, T, units]` have as groups or heads have it, `[B, G or H, T]`."""
        return flags.transpose(1, 2)

    def choose(self, query: torch.Tensor, step: Step) -> Choice:
        """What the pass's columns choose, `[B, T, units]`, from queries `[B, H, T, D]`; in columns that are no token
        nothing means anything."""
        absent = None if step.is_whole else step.positions(query.device) < 0
        hidden = step.hidden if self.needs_inputs else None
        if absent is not None:  # they may hold NaN
            if hidden is None:
                query = query.masked_fill(absent[:, None, :, None], 0)
            else:
                hidden = hidden.masked_fill(absent[..., None], 0)
        choice = self.router(query, hidden)
        if step.record is not None:
            self._report(choice, absent, step)
        return choice

    def gated(
        self, out: torch.Tensor, on: torch.Tensor | None, gates: torch.Tensor | None, *, left: float = 0.0
    ) -> torch.Tensor:
        """Outputs `[B, T, H, D]` times the gates of their units, `[B, T, units]`; times `left` where they are off.

        Args:
            on: None where they are on, or zero already.
            gates: None where they are 1.
        """
        if left and on is not None:
            factors = (on.to(out.dtype) if gates is None else gates) + left * ~on
            return (out * self.by_head(factors)[..., None]).to(out.dtype)
        if gates is not None:
            out = (out * self.by_head(gates)[..., None]).to(out.dtype)
        return out if on is None else out.masked_fill(~self.by_head(on)[..., None], 0)

    def by_head(self, units: torch.Tensor) -> torch.Tensor:
        """Of every query head of the mixer what its unit has: `[..., units]` to `[..., H]`."""
        return units if self.router.heads == 1 else units.repeat_interleave(self.router.heads, dim=-1)

    def _report(self, choice: Choice, absent: torch.Tensor | None, step: Step) -> None:
        """Tell the record of the pass what its tokens chose, where there is anything to choose."""
        assert step.record is not None
        router = self.router
        step.record.add_gate(self.facts.index, self.by_head(choice.gates))
        if not router.routed:
            return
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
