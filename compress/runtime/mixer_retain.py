"""The mixer of `retain` groups: softmax over a window, sinks, and those older tokens that a scorer says to keep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from .impl import choose_impl
from .impl_retain import RETAIN_IMPLS, Retain
from .mixer import LayerFacts, Mixer, register
from .retain_state import RetainState
from .retain_training import Decisions
from .scorer_gate import Gate
from .scorer_key_norm import KeyNorm
from .scorer_mlp import Mlp
from .scorer_ridge import Ridge
from .scorer_value_norm import ValueNorm
from .scorers import SCORERS, Scorer
from .span import BETA_UNIT, PAGE, Span, cached_table
from .step import Keeping, Step

KNOWN = (Gate, KeyNorm, Mlp, Ridge, ValueNorm)
NO_CAP = 1 << 40  # tokens; more than any sequence has


@register("retain")
class RetainMixer(Mixer):
    """Sees a window by whole pages, and the tokens before it that are kept; all others are freed for good.

    A token is kept or not when it is written, by its own score and by how many are kept before it; so a prefill in one
    pass, chunks, turns and decoding are one function, and padding has no part in it.

    Attributes:
        decisions: how tokens are kept in passes that take gradients and have no cache; None is the rule as it is, whose
            decisions have no gradient.
    """

    knows_scores = True
    keeps = True
    one_place = "which tokens it keeps depends on how many it has kept before, token by token"
    decisions: Decisions | None = None
    needs_inputs = True  # of some scorers; a mixer knows whether its own does

    def __init__(self, groups: Sequence[Mapping[str, Any]], facts: LayerFacts) -> None:
        super().__init__(groups, facts)
        self.spans = tuple(Span(group["sink"], group["alpha"], group["beta"], granule=PAGE) for group in groups)
        self.windows = tuple(Span(0, span.alpha, span.beta, granule=PAGE) for span in self.spans)
        self.scorer: Scorer = SCORERS[groups[0]["scorer"]](len(groups), facts.hidden_size, facts.head_dim)
        self.needs_inputs = self.scorer.needs_hidden
        self.set_thresholds([group["threshold"] for group in groups])
        self.caps = tuple(None if group["cap"] is None else (int(group["cap"][0]), group["cap"][1]) for group in groups)

    @classmethod
    def form(cls, group: Mapping[str, Any]) -> str:
        """The scorer."""
        return str(group["scorer"])

    def set_thresholds(self, thresholds: Sequence[float | None]) -> None:
        """Keep tokens from these scores on, one for each group; None keeps all that a cap lets in."""
        self.thresholds = tuple(-math.inf if threshold is None else threshold for threshold in thresholds)

    def state(self, max_length: int | None) -> RetainState:
        """Windows and lists."""
        return RetainState(self.spans, self.caps, [group["share"] for group in self.groups], max_length)

    def judge(self, key: torch.Tensor, value: torch.Tensor, step: Step) -> torch.Tensor:
        """What the scorer says of new tokens, `[B, G, T]` in float32, from their `[B, G, T, D]`."""
        positions, fast = step.positions(key.device), RETAIN_IMPLS[choose_impl(step.impl, key).name].scores
        if fast is not None and (found := fast(self.scorer, step.hidden, key, value, positions)) is not None:
            return found
        absent = (positions < 0)[..., None]
        key, value = (x.masked_fill(absent[:, None], 0) for x in (key, value))
        hidden = step.hidden.masked_fill(absent, 0) if self.scorer.needs_hidden and step.hidden is not None else None
        with torch.autocast(key.device.type, enabled=False):  # scores are compared in float32
            judged: torch.Tensor = self.scorer(hidden, key, value, positions.clamp(min=0))
        return judged

    def rules(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Thresholds, sinks and caps as `retain_reference.keep` takes them."""
        caps = tuple((NO_CAP, 0) if cap is None else (cap[0], int(cap[1] * BETA_UNIT)) for cap in self.caps)
        return (
            cached_table(self.thresholds, device, torch.float32),
            cached_table(tuple(span.sink for span in self.spans), device),
            cached_table(caps, device),
        )

    def kept(
        self, key: torch.Tensor, value: torch.Tensor, state: RetainState | None, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which new tokens are kept, bool `[B, G, T]`, and how many behind the sinks are then, `[B, G]` int32."""
        with torch.no_grad():
            found = self.judge(key, value, step)
            kept, count = self.rule(found, state, step, RETAIN_IMPLS[choose_impl(step.impl, key).name])
            if state is None:
                self._report(found, kept, step)
            return kept, count

    def rule(
        self, found: torch.Tensor, state: RetainState | None, step: Step, retain: Retain
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same from what the scorer says, `[B, G, T]`."""
        device = found.device
        count = found.new_zeros(found.shape[:2], dtype=torch.int32) if state is None else state.tensors["count"]
        return retain.keep(found, step.positions(device), count, *self.rules(device))

    def prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        state: RetainState | None,
        step: Step,
        *,
        scale: float | None,
        dropout: float,
    ) -> torch.Tensor:
        """As `Mixer.prefill`."""
        impl, rows = choose_impl(step.impl, query), step.rows
        retain = RETAIN_IMPLS[impl.name]
        assert rows is not None
        if self.decisions is not None and state is None and torch.is_grad_enabled():
            return self._trained(self.decisions, query, key, value, step, scale, dropout)
        kept, count = self.kept(key, value, state, step)
        cached = state is not None and any(rows.past)
        options: dict[str, Any] = {"rows": rows, "scale": scale, "dropout": dropout, "scores": self.scores(step)}
        ends, lists = [past + new for past, new in zip(rows.past, rows.count, strict=True)], None
        if all(span.first(max(ends) - 1) == 0 for span in self.windows):  # these heads are windows that hide nothing
            pages = state.window() if cached and state is not None else None
            out = impl.prefill(query, key, value, self.windows, pages=pages, **options)
        else:
            listed = state.pages() if cached and state is not None else None
            if state is not None and retain.compact is not None:
                lists = options["lists"] = retain.compact(key, value, kept, self.windows, rows, listed)
                state.expect(lists.leaving)
            out = retain.prefill(query, key, value, kept, self.windows, pages=listed, **options)
        if state is not None:
            state.write(key, value, kept, rows, impl.store, lists, retain.append)
            state.tensors["count"].copy_(count)
        return out.transpose(1, 2)

    def _trained(
        self,
        decisions: Decisions,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        step: Step,
        scale: float | None,
        dropout: float,
    ) -> torch.Tensor:
        """As `prefill` without a state, with gradients of what is kept."""
        positions, retain = step.positions(key.device), RETAIN_IMPLS[choose_impl(step.impl, query).name]
        found = self.judge(key, value, step)
        kept = self.rule(found.detach(), None, step, retain)[0]
        thresholds, sinks, _ = self.rules(key.device)
        fixed = (positions[:, None] < sinks[:, None]) | ~thresholds.isfinite()[:, None]
        taken, through = decisions.take(found, thresholds, kept, fixed)
        self._report(found, through, step)
        options: dict[str, Any] = {"scale": scale, "dropout": dropout, "scores": self.scores(step)}
        out = retain.trained(query, key, value, taken, self.windows, step.rows, hard=decisions.hard, **options)
        return out.transpose(1, 2)

    def _report(self, found: torch.Tensor, kept: torch.Tensor, step: Step) -> None:
        """Tell the record of a pass without a cache what was decided, all `[B, G, T]`."""
        if step.record is None or step.rows is None:
            return
        rows, at = step.rows, step.positions(found.device)[:, None]
        last = [max(count - 1, 0) for count in rows.count]
        ends = torch.tensor([[span.boundary(t) for span in self.spans] for t in last], device=found.device)
        sinks = torch.tensor([span.sink for span in self.spans], device=found.device)
        size = self.facts.group_size
        step.record.add_keeping(
            self.facts.index,
            Keeping(
                groups=tuple(head // size for head in self.heads[::size]),
                scores=found.detach(),
                kept=kept.to(found.dtype),
                gone=(at >= sinks[:, None]) & (at < ends[..., None]),
                thresholds=tuple(group["threshold"] for group in self.groups),
                shares=tuple(group["share"] for group in self.groups),
                spans=self.spans,
            ),
        )

    def decode(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        state: RetainState,
        step: Step,
        *,
        scale: float | None,
    ) -> torch.Tensor:
        """As `Mixer.decode`."""
        assert step.lengths is not None
        impl, lengths = choose_impl(step.impl, query), step.on("lengths", key.device)
        retain = RETAIN_IMPLS[impl.name]
        if retain.take is None:
            kept, count = self.kept(key, value, state, step)
            state.tensors["count"].copy_(count)
            state.leave(lengths, step.gains)
            state.store_one(key[:, :, 0], value[:, :, 0], kept[:, :, 0], lengths, impl.store_one)
        else:
            leaves = state.make_room(lengths, step.gains)
            retain.take(
                self.scorer, step.hidden, key[:, :, 0], value[:, :, 0], lengths, state.tensors["count"],
                self.rules(key.device), state.pages(), self.windows, leaves, partial(self.judge, key, value, step),
            )  # fmt: skip
        options: dict[str, Any] = {"scale": scale, "scores": self.scores(step)}
        out: torch.Tensor = retain.decode(query[:, :, 0], state.pages(), lengths, self.windows, **options)
        return out[:, None]
