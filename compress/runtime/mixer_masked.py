"""The base of mixers that are softmax attention under a mask of positions: the mask is all that a subclass writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .impl import choose_impl
from .mixer_span import SpanMixer
from .pages import PagedState
from .reference import ROWS, masked, slots_of
from .scores import Scores
from .span import FULL, AnySpan
from .step import Step


class MaskedMixer(SpanMixer):
    """Softmax attention over the keys that `visible` says, in plain PyTorch; the state keeps all keys.

    It is the reference that a kernel of such a target is held to. It reads every key that is kept, so it saves no time.
    """

    one_place = "the keys that its mask shows are taken from this process alone"

    def visible(self, t: torch.Tensor, j: torch.Tensor, group: Mapping[str, Any]) -> torch.Tensor:
        """Whether the query at position t sees the key at position j in a group with this entry of the plan.

        t and j are integer tensors that broadcast against each other, and so is the boolean result. Keys behind the
        query, j > t, are hidden whatever it says.
        """
        raise NotImplementedError

    def span(self, group: Mapping[str, Any]) -> AnySpan:
        """The keys that are kept: all of them, unless a subclass knows that some are never needed again."""
        return FULL

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
        keys, values, positions = key, value, t
        if state is not None and any(rows.past):
            past = rows.tensor(query.device)[:, 0]
            old_keys, old_values, old_positions = stored(state, past)
            keys, values = torch.cat([old_keys, key], dim=2), torch.cat([old_values, value], dim=2)
            positions = torch.cat([old_positions, t], dim=1)
        out = self.attend(query, keys, values, t, positions, scale, dropout, self.scores(step))
        if state is not None:
            state.advance(step.gains)
            store = choose_impl(step.impl, query).store
            store(key, value, state.pages(), rows, state.spans, state.slack)
        return out

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
        lengths = step.on("lengths", key.device)
        store_one = choose_impl(step.impl, query).store_one
        store_one(key[:, :, 0], value[:, :, 0], state.pages(), lengths, state.spans)
        keys, values, positions = stored(state, lengths)
        return self.attend(query, keys, values, step.positions(query.device), positions, scale, 0.0, self.scores(step))

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        t: torch.Tensor,
        j: torch.Tensor,
        scale: float | None,
        dropout: float,
        scores: Scores | None,
    ) -> torch.Tensor:
        """Attention of queries `[B, H, T, D]` at positions t `[B, T]` over keys `[B, G, M, D]` at j `[B, M]`.

        A position of -1 is no token: such a key is hidden, and the output of such a query zero.

        Returns:
            `[B, T, H, D]`.
        """
        # What is no token may hold NaN, and 0 * NaN is NaN.
        query = query.masked_fill((t < 0)[:, None, :, None], 0)
        key, value = (x.masked_fill((j < 0)[:, None, :, None], 0) for x in (key, value))
        outputs = []
        for start in range(0, query.shape[2], ROWS["cpu"]):
            rows = slice(start, start + ROWS["cpu"])
            at, of = t[:, rows, None], j[:, None, :]
            known = (of >= 0) & (of <= at)
            seen = torch.stack([known & self.visible(at, of, group) for group in self.groups], dim=1)  # [B, G, T, M]
            seen = seen.repeat_interleave(self.facts.group_size, dim=1)
            out, _ = masked(query[:, :, rows], key, value, seen, scale, dropout, scores)
            outputs.append(out.masked_fill(~seen.any(-1, keepdim=True), 0))
        return torch.cat(outputs, dim=2).transpose(1, 2)


def stored(state: PagedState, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values `[B, G, M, D]` of all pages of sequences with `lengths` `[B]` tokens, and positions `[B, M]`.

    Positions are -1 where no token is stored. Nothing waits for the device, so a CUDA graph can hold it.
    """
    pages = state.pages()
    places = pages.table.clamp(min=0).long()
    positions = slots_of(torch.arange(places.shape[-1], device=places.device))
    positions = torch.where(positions < lengths[:, None], positions, -1)
    return pages.keys[places].flatten(2, 3), pages.values[places].flatten(2, 3), positions
