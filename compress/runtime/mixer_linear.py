"""The mixer of `linear` groups: a state of constant size for the keys that a window hides, or for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .impl import Impl, choose_impl
from .impl_linear import LINEAR_IMPLS, Linear
from .linear_cache import LinearState
from .linear_layout import Layout, layouts
from .linear_states import Rule, carry, chunk_states, own_chunk, passage, read, state_columns, wide
from .maps import MAPS, FeatureMap
from .maps_cosine import Cosine
from .maps_elu import Elu
from .maps_hedgehog import Hedgehog, HedgehogExp
from .maps_plain import Plain, Silu, UnitLength
from .maps_random import RandomFeatures
from .maps_relu import Relu
from .maps_taylor import Taylor
from .merge import log_mass, merge
from .mixer import Branches, LayerFacts, register
from .mixer_span import SpanMixer, attend_view
from .reference import Rows
from .rope import turned_back
from .shard import Shard, View
from .span import NO_END, PAGE, AnySpan, Span, cached_table, first_key
from .step import Step

KNOWN = (Cosine, Elu, Hedgehog, HedgehogExp, Plain, RandomFeatures, Relu, Silu, Taylor, UnitLength)
SEGMENT = 8192  # tokens whose chunk states are held at once
EPS = 1e-6  # of the norm behind a state without normaliser


@dataclass(frozen=True)
class Parts:
    """What the branches of some query heads give, before they are joined.

    Attributes:
        out: of the softmax over the keys in sight, `[B, H, T, V]`; None for heads without one.
        lse: the log-sum-exp of its scores, `[B, H, T]`, -inf where nothing is seen.
        num: of the state, `[B, H, T, V]` in float32 at least: the sum of weighted values, or what is added to `out`.
        log_den: logarithm of the state's sum of weights, `[B, H, T]`; -inf where it is empty. None where the state is
            added.
        log_gain: logarithm of the factor on the state's weights beside the softmax's, `[B, H, T]`; None likewise.
    """

    out: torch.Tensor | None
    lse: torch.Tensor | None
    num: torch.Tensor
    log_den: torch.Tensor | None
    log_gain: torch.Tensor | None


@dataclass(frozen=True)
class Features:
    """What the weights of a shared normaliser are made of: products of a query's and the keys' features, and decay.

    Attributes:
        query: `[B, H, T, F]`.
        key: `[B, G, T, F]`.
        log_decay: logarithms of the decays that tokens bring, `[B, G, T]`; None without decay.
        spans: for every group what its queries see of the softmax, so that the state has the rest; None where the
            state has all keys.
    """

    query: torch.Tensor
    key: torch.Tensor
    log_decay: torch.Tensor | None
    spans: tuple[Span, ...] | None


@dataclass(frozen=True)
class _Segment:
    """A segment of a sequence whose rest other processes have: its queries, what they see, and its tokens' numbers.

    Attributes:
        query: `[B, H, T, D]`.
        both: keys and values of the view, side by side.
        key, value, gates: of the segment's tokens and of those before that are behind the view's gap.
        rows: the segment's place in the sequence.
    """

    query: torch.Tensor
    view: View
    both: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    gates: torch.Tensor | None
    rows: Rows

    @staticmethod
    def of(query: torch.Tensor, view: View, both: torch.Tensor, gates: torch.Tensor | None) -> _Segment:
        """From views of keys and values, and of what tokens have beside them."""
        size = query.shape[-1]
        key, value = both[:, :, view.sink :].split([size, both.shape[-1] - size], dim=-1)
        gates = None if gates is None else gates[:, :, view.sink :]
        rows = Rows.whole(len(query), query.shape[2], view.start)
        return _Segment(query, view, both, key, value, gates, rows)


@register("linear")
class LinearMixer(SpanMixer):
    """Softmax over the keys in sight joined with a linear state over the others, or a linear state over all keys.

    With p the page of a query, the softmax sees what a `Span` of whole pages shows to p, and the state sums over just
    the keys that it hides; decays in the state count up to there. A group that is `alone` has no softmax: its queries
    read the state and the keys of their own page by the same rule.

    Parameters, with G groups of R query heads: `map.*`; for a shared normaliser `gain` `[G, R]` and `gain_query`
    `[G, R, D]`, which give log g = gain + gain_query . q; for an added state `norm` `[G, R, V]`, `gate`
    `[G, R, hidden]` and `gate_bias` `[G, R]`; with decays of tokens `decay` `[G, hidden]` and `decay_bias` `[G]`, and
    for the delta rule `strength` and `strength_bias` likewise.
    """

    branches: Branches | tuple[Branches, ...] = "both"
    by_query = ("map.query", "map.query_bias", "gain", "gain_query", "norm", "gate", "gate_bias")
    needs_inputs = True  # of some groups, for their gates; a mixer knows whether its own do

    def __init__(self, groups: Sequence[Mapping[str, Any]], facts: LayerFacts) -> None:
        super().__init__(groups, facts)
        group, count, share = groups[0], len(groups), facts.group_size
        self.rule: Rule = group["rule"]
        self.alone: bool = group["alone"]
        self.shared = group["out"] == "shared"
        self.token_decay = group["decay"] == "token"
        self.log_decays = tuple(-entry["slope"] for entry in groups) if group["decay"] == "fixed" else None
        self.knows_scores = not self.alone
        self.gate_count = self.token_decay + (self.rule == "delta")
        self.needs_inputs = not self.shared or self.gate_count > 0
        self.turns = facts.frequencies() if group["rope"] == "undo" and facts.frequencies is not None else None
        if group["rope"] == "undo" and self.turns is None:
            raise ValueError("`rope: undo` needs the frequencies of the model's RoPE, which are not known here")
        self.map: FeatureMap = MAPS[group["map"]](count, share, facts.head_dim, group["features"], group["reach"])
        if self.shared:
            self.gain = nn.Parameter(torch.empty(count, share))
            self.gain_query = nn.Parameter(torch.empty(count, share, facts.head_dim))
        else:
            self.norm = nn.Parameter(torch.empty(count, share, facts.head_dim))
            self.gate = nn.Parameter(torch.empty(count, share, facts.hidden_size))
            self.gate_bias = nn.Parameter(torch.empty(count, share))
        for name in self._gates():
            self.register_parameter(name, nn.Parameter(torch.empty(count, facts.hidden_size)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(count)))
        self.reset_parameters()

    @classmethod
    def form(cls, group: Mapping[str, Any]) -> str:
        """Everything but the span and the slope."""
        words = [group["map"], group["features"] or "", "" if group["rule"] == "add" else group["rule"]]
        words.append("" if group["decay"] == "none" else group["decay"])
        words.append("added" if group["out"] == "added" and group["rule"] == "add" else "")
        words += [
            "alone" if group["alone"] else "",
            "undo" if group["rope"] == "undo" else "",
            group["reach"] if MAPS[group["map"]].positional else "",
        ]
        return "_".join(str(word) for word in words if word)

    def _gates(self) -> list[str]:
        """Names of what every token has beside its key."""
        return ["decay"] * self.token_decay + ["strength"] * (self.rule == "delta")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A map that is the identity and gains of 1; an added state that adds nothing yet, unless it is alone."""
        super().reset_parameters()
        if self.shared:
            self.gain.zero_()
            self.gain_query.zero_()
        else:
            self.norm.fill_(float(self.alone))
            self.gate.zero_()
            self.gate_bias.zero_()
        for name in self._gates():
            self.get_parameter(name).zero_()
            # Half of what a token writes is kept for some 2,000 tokens; half of the difference is written.
            self.get_parameter(f"{name}_bias").fill_(-8.0 if name == "decay" else 0.0)

    def span(self, group: Mapping[str, Any]) -> AnySpan:
        """The keys in sight, by whole pages; those of a query's own page where it is alone."""
        return Span(group["sink"], group["alpha"], group["beta"], granule=PAGE)

    @property
    def columns(self) -> int:
        """Columns of a state."""
        return state_columns(self.rule, self.facts.head_dim)

    def state(self, max_length: int | None) -> LinearState:
        """Pages and states."""
        return LinearState(self.rules, max_length, (self.map.features, self.columns), self.gate_count)

    def prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        state: Any,
        step: Step,
        *,
        scale: float | None,
        dropout: float,
    ) -> torch.Tensor:
        """As `Mixer.prefill`."""
        options: dict[str, Any] = {"scale": scale, "dropout": dropout}
        assert step.rows is not None
        if step.shard is not None:
            out = self._joined_shard(query, key, value, step.shard, step, **options)
            return out.to(query.dtype).transpose(1, 2)
        if not torch.is_grad_enabled() and self._sees_all(step.rows):
            out = super().prefill(query, key, value, state, step, **options)
            if state is not None:
                state.store_gates(self.gates_of(step), step.rows)
            return out
        if self._merges and self._kernels(choose_impl(step.impl, query)) is not None:
            out = self._run(query, key, value, state, step, merged=True, **options)[2]
        else:
            out = self.joined(self.parts(query, key, value, state, step, **options))
        return out.to(query.dtype).transpose(1, 2)

    def _joined_shard(
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
        """The heads' outputs `[B, H, T, V]` where other processes have the rest of the sequence (LASP-2, arXiv
        2502.07563): every segment says what its queries' windows leave to a state, all processes get that of all, and
        each starts from the state before its own segments."""
        factor, kernels = self._scale(scale), self._kernels(choose_impl(step.impl, query))
        merged, gates = self._merges and kernels is not None, self.gates_of(step)
        views = shard.views(torch.cat([key, value], dim=-1), tuple(self.fixed))
        gated = [None] * len(views) if gates is None else [found for _, found in shard.views(gates, tuple(self.fixed))]
        segments = [
            _Segment.of(part, view, both, own)
            for part, (view, both), own in zip(shard.split(query, 2), views, gated, strict=True)
        ]
        outs, lses, found = list[torch.Tensor](), list[torch.Tensor](), list[torch.Tensor]()
        for part, held in zip(segments, self._held_before(shard, segments, factor), strict=True):
            out = lse = window = None
            if not self.alone:
                options: dict[str, Any] = {"scale": scale, "dropout": dropout, "scores": self.scores(step)}
                out, lse = attend_view(step.impl, part.query, part.view, part.both, keep_lse=True, **options)
                outs.append(out)
                lses.append(lse)
            given = (part.query, part.key, part.value, part.gates, None, part.rows, None, factor)
            if kernels is None:
                of_state, _ = self._read_new(*given, held=held)
            else:
                window = None if out is None or lse is None or not merged else self._window(out, lse)
                of_state, _ = self._read_fast(kernels, *given, merged=merged, window=window, held=held)
            if merged and self.branches in ("window", "none"):
                of_state = torch.zeros_like(of_state) if out is None or self.branches == "none" else out
            found.append(of_state)
        all_found = torch.cat(found, dim=2)
        if merged:
            return all_found
        out, lse = (torch.cat(each, dim=2) if each else None for each in (outs, lses))
        return self.joined(self._parts(out, lse, query, all_found, step, step.positions(query.device) < 0))

    def _held_before(self, shard: Shard, segments: Sequence[_Segment], scale: float) -> list[torch.Tensor]:
        """The states `[B, G, F, E]` before the first query of each segment, from what all segments make."""
        made = []
        for part in segments:
            columns = part.query.shape[2]
            (layout,) = layouts(part.rows, tuple(self.fixed), columns, self.alone, NO_END, part.key.device)
            k, v = layout.keys_of(part.key, None, None), layout.keys_of(part.value, None, None)
            gates = None if part.gates is None else layout.keys_of(part.gates, None, None)
            positional = self.map.positional or self.turns is not None
            k = self._key_features(k, scale, layout.key_positions(k.device) if positional else None)
            made.append(passage(k, v, **self._options(gates, layout.last * PAGE)))
        gains, sums = (shard.everywhere(torch.stack(each)) for each in zip(*made, strict=True))
        held, found = torch.zeros_like(sums[0]), []
        for gain, added in zip(gains, sums, strict=True):
            found.append(held)
            held = carry(gain, held) + added
        return [found[number] for number in shard.numbers]

    def parts(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        state: LinearState | None,
        step: Step,
        *,
        scale: float | None,
        dropout: float = 0.0,
    ) -> Parts:
        """What the branches give, and the tokens are written into the state; arguments as of `Mixer.prefill`."""
        out, lse, found = self._run(query, key, value, state, step, merged=False, scale=scale, dropout=dropout)
        return self._parts(out, lse, query, found, step, step.positions(query.device) < 0)

    def _run(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        state: LinearState | None,
        step: Step,
        *,
        merged: bool,
        scale: float | None,
        dropout: float,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
        """Output and log-sum-exp of the softmax, where there is one, and what the columns find in the states.

        With `merged` the latter is the heads' output, which is for kernels and states with a normaliser.
        """
        impl, rows = choose_impl(step.impl, query), step.rows
        assert rows is not None and step.gains is not None
        spans = self.fixed
        pages = state.pages() if state is not None and any(rows.past) else None
        out = lse = None
        if not self.alone:
            options: dict[str, Any] = {"scale": scale, "dropout": dropout, "scores": self.scores(step)}
            out, lse = impl.prefill(query, key, value, spans, rows=rows, pages=pages, keep_lse=True, **options)
        gates, factor = self.gates_of(step), self._scale(scale)
        kernels = self._kernels(impl)
        if kernels is None:
            found, last = self._read_new(query, key, value, gates, state, rows, pages, factor)
        else:
            window = None if out is None or lse is None or not merged else self._window(out, lse)
            found, last = self._read_fast(
                kernels, query, key, value, gates, state, rows, pages, factor, merged=merged, window=window
            )
        if state is not None:
            state.advance(step.gains)
            impl.store(key, value, state.pages(), rows, spans)
            state.store_gates(gates, rows)
            state.matrix.copy_(last.detach())
        if merged and self.branches in ("window", "none"):
            found = torch.zeros_like(found) if out is None or self.branches == "none" else out
        return out, lse, found

    def _sees_all(self, rows: Rows) -> bool:
        """Whether these heads are windows for all queries of a pass, because none of their keys is hidden yet."""
        if self.alone or self.branches not in ("both", "window"):
            return False
        ends = {past + count for past, count in zip(rows.past, rows.count, strict=True)}
        return all(span.boundary(max(ends) - 1) <= span.sink for span in self.fixed)

    def _kernels(self, impl: Impl) -> Linear | None:
        """What computes these heads' states beside plain PyTorch, if anything does."""
        kernels = LINEAR_IMPLS.get(impl.name)
        trained = self.token_decay and torch.is_grad_enabled()
        if self.turns is not None:  # the kernels take keys as they are in the pages
            return None
        if kernels is None or not kernels.takes(self.rule, self.map.features, trained_decay=trained):
            return None
        return kernels

    @property
    def _merges(self) -> bool:
        """Whether kernels may join the branches: there is a normaliser, and the same branches count in all groups."""
        return self.shared and isinstance(self.branches, str)

    def _window(self, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The softmax's part for a merge: nothing, where its branch does not count."""
        if self.branches in ("both", "window"):
            return out, lse
        return torch.zeros_like(out), torch.full_like(lse, float("-inf"))

    def _gains(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Of every query head a number and a vector, which give the logarithm of its gain."""
        return (self.gain.flatten(), self.gain_query.flatten(0, 1)) if self.shared else None

    def features(self, query: torch.Tensor, key: torch.Tensor, step: Step, *, scale: float | None) -> Features:
        """The features of a pass without a cache and without padding; arguments as of `Mixer.prefill`."""
        positions, log_decay = step.positions(query.device)[:, None], None
        if self.token_decay:
            gates = self.gates_of(step)
            assert gates is not None
            log_decay = gates[..., 0]
        elif self.log_decays is not None:
            fixed = cached_table(self.log_decays, key.device, torch.float32)
            log_decay = fixed[:, None].expand(key.shape[0], -1, key.shape[2])
        q = self._query_features(query, self._scale(scale), positions)
        k = self._key_features(key, self._scale(scale), positions)
        return Features(q, k, log_decay, None if self.alone else tuple(self.fixed))

    def decode(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        state: Any,
        step: Step,
        *,
        scale: float | None,
    ) -> torch.Tensor:
        """As `Mixer.decode`."""
        assert step.lengths is not None
        impl, lengths = choose_impl(step.impl, query), step.on("lengths", key.device)
        kernels = self._kernels(impl)
        self._absorb(state, lengths, step, self._scale(scale), kernels)
        if step.gains is not None:
            state.advance(step.gains)
        pages, gates = state.pages(), self.gates_of(step)
        impl.store_one(key[:, :, 0], value[:, :, 0], pages, lengths, state.spans)
        state.store_one_gate(gates, lengths)
        out = lse = None
        if not self.alone:
            options: dict[str, Any] = {"scale": scale, "scores": self.scores(step)}
            out, lse = impl.decode(query[:, :, 0], pages, lengths, state.spans, keep_lse=True, **options)
            out, lse = out[:, :, None], lse[:, :, None]
        held = state.matrix
        if self.alone:  # with the keys of the page that the token lies in
            count = torch.where(lengths > 0, (lengths - 1) % PAGE + 1, 0)[:, None].expand(-1, held.shape[1])
            number = (lengths.long() - 1).clamp(min=0)[:, None].expand(-1, held.shape[1]) // PAGE
            held = self._take_page(state, held, number, count, self._scale(scale))
        positions = step.positions(query.device)
        if kernels is not None and (self._merges or not self.shared):
            return self._decode_fast(kernels, query, held, out, lse, step, lengths, positions, self._scale(scale))
        q = self._query_features(query, self._scale(scale), positions[:, None])
        found = q.to(held.dtype).unflatten(1, (held.shape[1], -1)).flatten(2, 3) @ held  # [B, G, R, E]
        found = found.flatten(1, 2)[:, :, None]
        parts = self._parts(out, lse, query, found, step, positions < 0)
        return self.joined(parts).to(query.dtype).transpose(1, 2)

    def _decode_fast(
        self,
        kernels: Linear,
        query: torch.Tensor,
        held: torch.Tensor,
        out: torch.Tensor | None,
        lse: torch.Tensor | None,
        step: Step,
        lengths: torch.Tensor,
        positions: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """The end of `decode` by kernels: `held` `[B, G, F, E]` is read, and joined with the softmax's part."""
        where = positions[:, None] if self.map.positional else None
        q, log_gain = kernels.query_features(self.map, self.groups[0]["map"], query, scale, where, self._gains())
        options: dict[str, Any] = {"mean": self.shared}
        if out is not None and lse is not None and log_gain is not None:
            window = self._window(out, lse)
            options |= {"window": (window[0][:, :, 0], window[1][:, :, 0]), "log_gain": log_gain[:, :, 0]}
        found = kernels.read_one(q[:, :, 0], held, lengths, self.facts.head_dim, query.dtype, **options)[:, :, None]
        if not self.shared:
            found = self.joined(self._parts(out, lse, query, found, step, positions < 0))
        elif self.branches in ("window", "none"):
            found = torch.zeros_like(found) if out is None or self.branches == "none" else out
        return found.to(query.dtype).transpose(1, 2)

    def joined(self, parts: Parts) -> torch.Tensor:
        """The heads' outputs, `[B, H, T, V]`."""
        if isinstance(self.branches, str):
            return self._joined(parts, self.branches)
        made = {branches: self._joined(parts, branches) for branches in set(self.branches)}
        share = self.facts.group_size
        heads = [made[name][:, group * share : (group + 1) * share] for group, name in enumerate(self.branches)]
        return torch.cat(heads, dim=1)

    def _joined(self, parts: Parts, branches: Branches) -> torch.Tensor:
        window = parts.out is not None and branches in ("both", "window")
        linear = branches in ("both", "linear")
        out = parts.out if parts.out is not None and window else torch.zeros_like(parts.num)
        if not linear:
            return out
        if parts.log_den is None:
            return wide(out) + parts.num
        assert parts.log_gain is not None
        lse = parts.lse if parts.lse is not None and window else torch.full_like(parts.log_den, float("-inf"))
        return merge(out, lse, parts.num, parts.log_den, parts.log_gain)

    def gates_of(self, step: Step) -> torch.Tensor | None:
        """What every new token has beside its key, `[B, G, T, n]`: see `LinearState`; None without any."""
        if not self.gate_count:
            return None
        hidden, found = self._hidden(step), []
        for name in self._gates():
            weight, bias = (self.get_parameter(full).to(hidden.dtype) for full in (name, f"{name}_bias"))
            logit = functional.linear(hidden, weight, bias).transpose(1, 2)
            found.append(-functional.softplus(logit) if name == "decay" else logit.sigmoid())
        return torch.stack(found, dim=-1)

    def _parts(
        self,
        out: torch.Tensor | None,
        lse: torch.Tensor | None,
        query: torch.Tensor,
        found: torch.Tensor,
        step: Step,
        absent: torch.Tensor,
    ) -> Parts:
        """`Parts` from what was found in the states, `[B, H, T, E]`; `absent` `[B, T]` are no tokens."""
        groups, share = len(self.groups), self.facts.group_size
        absent = absent[:, None]
        if self.shared:
            num, den = found[..., :-1], found[..., -1].masked_fill(absent, 0)
            num = num.masked_fill(absent[..., None], 0)
            q = wide(query).masked_fill(absent[..., None], 0).unflatten(1, (groups, share))
            turned = (q * self.gain_query[:, :, None].to(q.dtype)).sum(-1)
            log_gain = (self.gain[..., None].to(q.dtype) + turned).flatten(1, 2)
            return Parts(out, lse, num, log_mass(den), log_gain)
        hidden = self._hidden(step)
        weight, bias = self.gate.flatten(0, 1).to(hidden.dtype), self.gate_bias.flatten().to(hidden.dtype)
        logit = functional.linear(hidden, weight, bias)
        gate = logit.sigmoid().transpose(1, 2)[..., None]  # [B, H, T, 1]
        found = wide(found[..., : self.facts.head_dim])
        normed = found * torch.rsqrt(found.square().mean(-1, keepdim=True) + EPS)
        num = gate * normed * self.norm.flatten(0, 1)[:, None].to(found.dtype)
        return Parts(out, lse, num.masked_fill(absent[..., None], 0), None, None)

    def _query_features(self, query: torch.Tensor, scale: float, positions: torch.Tensor | None) -> torch.Tensor:
        """What the map makes of queries, as they are or before RoPE; positions may be None where nothing reads them."""
        return self.map.of_query(self._as_mapped(query, positions), scale, positions)

    def _key_features(self, key: torch.Tensor, scale: float, positions: torch.Tensor | None) -> torch.Tensor:
        """The same of keys."""
        return self.map.of_key(self._as_mapped(key, positions), scale, positions)

    def _as_mapped(self, x: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        if self.turns is None:
            return x
        assert positions is not None
        return turned_back(wide(x), positions, cached_table(self.turns, x.device, torch.float32))

    def _hidden(self, step: Step) -> torch.Tensor:
        """The layer's inputs `[B, T, hidden]`, zero where a column is no token."""
        assert step.hidden is not None
        absent = step.positions(step.hidden.device) < 0
        return wide(step.hidden).masked_fill(absent[..., None], 0)

    def _scale(self, scale: float | None) -> float:
        return self.facts.head_dim**-0.5 if scale is None else scale

    def _read_new(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        gates: torch.Tensor | None,
        state: LinearState | None,
        rows: Rows,
        pages: Any,
        scale: float,
        *,
        held: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What new columns find in the states, `[B, H, T, E]`, and the states behind them, `[B, G, F, E]`.

        Args:
            held: the states before them, where `state` does not have them.
        """
        columns = query.shape[2]
        held = self._held(state, value) if held is None else held
        total = None
        for layout in layouts(rows, tuple(self.fixed), columns, self.alone, SEGMENT, query.device):
            found, held = self._read_part(layout, query, key, value, gates, state, held, pages, scale)
            found = layout.columns_of(found, columns)
            total = found if total is None else total + found
        assert total is not None
        return total, held

    def _held(self, state: LinearState | None, value: torch.Tensor) -> torch.Tensor:
        """The states before a pass of prefill, `[B, G, F, E]`, for values `[B, G, T, V]`."""
        if state is None:
            return wide(value).new_zeros(len(value), len(self.groups), self.map.features, self.columns)
        held = state.matrix
        # Autograd may keep it, and the pass writes the states behind it into the same memory.
        return held.clone() if torch.is_grad_enabled() else held

    def _read_fast(
        self,
        kernels: Linear,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        gates: torch.Tensor | None,
        state: LinearState | None,
        rows: Rows,
        pages: Any,
        scale: float,
        *,
        merged: bool,
        window: tuple[torch.Tensor, torch.Tensor] | None,
        held: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`_read_new` by kernels; with `merged` the first result is the heads' output, `[B, H, T, V]`."""
        device, columns, kind = query.device, query.shape[2], self.groups[0]["map"]
        (layout,) = layouts(rows, tuple(self.fixed), columns, self.alone, NO_END, device)
        pools = (None, None, None) if state is None else (state.keys, state.values, state.gates)
        k, v = (layout.keys_of(new, pages, pool) for new, pool in zip((key, value), pools, strict=False))
        gated = None if gates is None else layout.keys_of(gates, pages, pools[2])
        if layout.slice_from is None:  # a map has no gradient in what may be NaN
            absent = (torch.arange(k.shape[2], device=device) >= layout.keys[..., None])[..., None]
            k = k.masked_fill(absent, 0)
            gated = None if gated is None else gated.masked_fill(absent, 0)
        positional, whole = self.map.positional, rows.is_whole(columns)
        at = None
        if positional or not whole:
            position = layout.past - layout.start + torch.arange(columns, device=device)
            at = position.clamp(min=0)[:, None]
            if not whole:
                absent = (position < layout.past) | (position >= layout.until)
                query = query.masked_fill(absent[:, None, :, None], 0)
        both = (at, layout.key_positions(device) if positional else None)
        q, log_gain, k = kernels.pass_features(self.map, kind, query, k, scale, both, self._gains() if merged else None)
        held = held if state is None else state.matrix
        options = self._options(gated, layout.keys)
        options = {name: options[name] for name in ("rule", "log_decay", "strength")}
        options |= {"alone": self.alone, "mean": merged, "mass": self.shared, "window": window, "log_gain": log_gain}
        found, last = kernels.read_new(q, k, v, held, layout, rows, **options)
        return found, last

    def _read_part(
        self,
        layout: Layout,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        gates: torch.Tensor | None,
        state: LinearState | None,
        held: torch.Tensor,
        pages: Any,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for the queries of a layout, by pages, `[B, H, 64 * P, E]`."""
        device = query.device
        k = layout.keys_of(key, pages, None if state is None else state.keys)
        v = layout.keys_of(value, pages, None if state is None else state.values)
        absent = torch.arange(k.shape[2], device=device) >= layout.keys[..., None]
        k, v = (x.masked_fill(absent[..., None], 0) for x in (k, v))
        gated = None
        if gates is not None:
            gated = layout.keys_of(gates, pages, None if state is None else state.gates).masked_fill(
                absent[..., None], 0
            )
        options = self._options(gated, layout.keys)
        positional = self.map.positional or self.turns is not None
        k = self._key_features(k, scale, layout.key_positions(device) if positional else None)
        states = chunk_states(k, v, held, **options)
        q = layout.queries_of(query)
        q = self._query_features(q, scale, layout.query_positions(device)[:, None] if positional else None)
        if self.alone:
            found = self._own(layout, q, k, v, states, options)
        else:
            found = read(q, states, layout.chunk)
        last = layout.last[..., None, None, None].expand(-1, -1, 1, *states.shape[3:])
        return found, states.gather(2, last)[:, :, 0]

    def _own(
        self,
        layout: Layout,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        states: torch.Tensor,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """Queries of heads without a softmax: their page's keys are those of the chunk that they read before."""

        def pages_of(x: torch.Tensor) -> torch.Tensor:
            chunks = x.unflatten(2, (-1, PAGE))  # [B, G, N, 64], or with numbers behind
            number = layout.chunk.clamp(max=max(chunks.shape[2] - 1, 0))
            number = number.view(*number.shape, *(1,) * (chunks.dim() - 3))
            return chunks.gather(2, number.expand(-1, -1, -1, *chunks.shape[3:])).flatten(2, 3)

        own = {**options, "count": None}
        # Keys behind the last one are zeros here, which write nothing, and whose decay no earlier query reads.
        for name in ("log_decay", "strength"):
            if own.get(name) is not None and own[name].dim() == 3:
                own[name] = pages_of(own[name])
        return own_chunk(query, pages_of(key), pages_of(value), states, layout.chunk, **own)

    def _options(self, gates: torch.Tensor | None, count: torch.Tensor) -> dict[str, Any]:
        """Arguments of `chunk_states` beside keys and values; gates `[B, G, M, n]`."""
        log_decay = strength = None
        if self.token_decay:
            assert gates is not None
            log_decay = gates[..., 0]
        elif self.log_decays is not None:
            log_decay = cached_table(self.log_decays, count.device, torch.float64)
        if self.rule == "delta":
            assert gates is not None
            strength = gates[..., -1]
        return {"rule": self.rule, "count": count, "log_decay": log_decay, "strength": strength}

    def _absorb(
        self, state: LinearState, lengths: torch.Tensor, step: Step, scale: float, kernels: Linear | None
    ) -> None:
        """Bring the page that leaves the sight of the new token into the state, while its keys are still there.

        A growing state knows on the host whether there is any; a reserved one always computes, and waits for nothing.
        """
        if state.max_length is None and step.gains is not None:
            new = [length for length, gain in zip(state.lengths, step.gains, strict=True) if gain]
            if all(span.boundary(t) == span.boundary(t - 1) for t in new for span in state.spans):
                return
        held = state.matrix
        if kernels is not None and self.rule == "add" and not self.token_decay:
            decays = None if self.log_decays is None else cached_table(self.log_decays, held.device, torch.float32)
            kind = self.groups[0]["map"]
            if kernels.absorb(held, state.pages(), lengths, state.spans, self.map, kind, scale, decays):
                return
        t = lengths.long()[:, None] - 1
        rules = tuple((span.sink, span.alpha, span.beta_units) for span in state.spans)
        sink, alpha, beta = cached_table(rules, lengths.device).unbind(1)
        before, after = (first_key(at, alpha, beta, PAGE).maximum(sink) for at in (t - 1, t))
        count = torch.where((after > before) & (t >= 0), PAGE, 0)
        held.copy_(self._take_page(state, held, before // PAGE, count, scale))

    def _take_page(
        self, state: LinearState, held: torch.Tensor, number: torch.Tensor, count: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """States `[B, G, F, E]` after the first `count` `[B, G]` tokens of the cached pages `number` `[B, G]`."""
        pages = state.pages()
        if not pages.table.shape[-1]:  # no sequence has a token yet
            return held
        number = number.clamp(max=pages.table.shape[-1] - 1)
        place = pages.table.long().gather(2, number[..., None])[..., 0].clamp(min=0)
        absent = (torch.arange(PAGE, device=held.device) >= count[..., None])[..., None]
        key, value = (pool[place].masked_fill(absent, 0) for pool in (pages.keys, pages.values))
        gates = None if state.gates is None or not self.gate_count else state.gates[place]
        positions = number[..., None] * PAGE + torch.arange(PAGE, device=held.device)
        k = self._key_features(key, scale, positions)
        return chunk_states(k, value, held, **self._options(gates, count))[:, :, 1]
