"""The mixer of `score` groups: spans of keys in pages, with another score function than the softmax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .mixer import LayerFacts, register
from .mixer_span import SpanMixer
from .pages import PagedState
from .score_functions import ScoreFunction, function_of, is_cosine, row_scale
from .span import AnySpan, Span, keys_seen, rule_columns
from .step import Step

EPSILON = 1e-8  # least norm of a query or a key whose cosine is taken


@register("score")
class ScoreMixer(SpanMixer):
    """Attention over the keys of a span with the scores of `score_functions.py`; its state holds the span's pages.

    All that depends on the row alone, the temperature among it, is a factor on the query, so that SSMax runs as plain
    softmax attention. Where scores are cosines the pages hold normalised keys.

    Attributes:
        log_temperature: `[groups, query heads of one]`, of a factor on the scores: s_h of SSMax is
            exp(log_temperature) / log(reference), so that a head starts as it was at the reference length.
        bias: the same shape, added to the scores of a sigmoid; it starts at 0, which is -log n or -log(reference).
            None of other scores.
    """

    by_query = ("log_temperature", "bias")
    knows_scores = False
    bias: torch.Tensor | None

    def __init__(self, groups: Sequence[Mapping[str, Any]], facts: LayerFacts) -> None:
        super().__init__(groups, facts)
        size = (len(groups), facts.group_size)
        self.cosine = is_cosine(groups[0])
        self.log_temperature = nn.Parameter(torch.empty(size))
        self.register_parameter("bias", nn.Parameter(torch.empty(size)) if groups[0]["score"] == "sigmoid" else None)
        self.reset_parameters()

    @classmethod
    def form(cls, group: Mapping[str, Any]) -> str:
        """The score, with its power, or the length that it refers to."""
        power = group["power"] if group["score"] == "lssar" else ""
        length = group["reference"] if group["score"] == "ssmax" or group["bias"] == "constant" else ""
        return "_".join(str(word) for word in (group["score"], power, length) if word)

    def reset_parameters(self) -> None:
        """Temperature 1, no bias beyond that of the plan."""
        nn.init.zeros_(self.log_temperature)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def span(self, group: Mapping[str, Any]) -> AnySpan:
        """The span beside the score."""
        return Span(group["sink"], group["alpha"], group["beta"])

    def scores(self, step: Step) -> ScoreFunction | None:
        """The score function with this mixer's biases."""
        return function_of(self.groups[0], None if self.bias is None else self.bias.flatten())

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
        assert step.rows is not None
        t = step.positions(query.device)
        if not step.rows.is_whole(query.shape[2]):  # what is no token may hold NaN, and its gradients are not to
            absent = (t < 0)[:, None, :, None]
            query, key = query.masked_fill(absent, 0), key.masked_fill(absent, 0)
        query = self._queries(query, t, scale)
        return super().prefill(query, self._keys(key), value, state, step, scale=1.0, dropout=dropout)

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
        query = self._queries(query, step.positions(query.device), scale)
        return super().decode(query, self._keys(key), value, state, step, scale=1.0)

    def _queries(self, query: torch.Tensor, t: torch.Tensor, scale: float | None) -> torch.Tensor:
        """Queries `[B, H, T, D]` at positions t `[B, T]` with all that is a factor of their rows in them."""
        dtype, dim = torch.promote_types(query.dtype, torch.float32), self.facts.head_dim
        wide = query.to(dtype)
        if self.cosine:
            wide = functional.normalize(wide, dim=-1, eps=EPSILON)
        count = (
            keys_seen(t[:, None], *rule_columns(tuple(self.fixed), query.device)).clamp(min=1).to(dtype)
        )  # [B, G, T]
        factor = row_scale(self.groups[0], count, dim, dim**-0.5 if scale is None else scale)
        factor = factor[:, :, None] * self.log_temperature.to(dtype).exp()[..., None]  # [B, G, R, T]
        return (wide * factor.flatten(1, 2)[..., None]).to(query.dtype)

    def _keys(self, key: torch.Tensor) -> torch.Tensor:
        """Keys `[B, G, T, D]` as they are scored and stored."""
        if not self.cosine:
            return key
        wide = key.to(torch.promote_types(key.dtype, torch.float32))
        return functional.normalize(wide, dim=-1, eps=EPSILON).to(key.dtype)
