"""Hedgehog's objective: weights of the hidden keys as softmax has them, and the attention that they have together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch.utils.checkpoint import checkpoint

from compress.limits import FACTOR, LONGEST
from compress.registry import objectives
from compress.train.objectives.hidden import Hidden, Mass, wide
from compress.train.objectives.objective import Inputs, Objective

BLOCK = 128  # queries whose weights are computed at once


@objectives.register("weights")
class Weights(Objective):
    """Cross entropy of a state's weights on those of softmax, over the hidden keys, plus the error of their mass.

    Hedgehog (arXiv 2402.04347) takes all keys; here the softmax is taken over the keys that the head hides, which are
    those that its state has. Weights of single keys are needed, so this costs a row of scores for every query that it
    is taken on, in blocks that are computed again in the backward pass.
    """

    mass: float = Field(1.0, ge=0, le=FACTOR, description="weight of the error of the hidden keys' attention")
    form: Mass = Field(
        "divergence",
        description="of that error: `divergence` of the two shares, or the squared difference of the `log` masses",
    )
    by_mass: bool = Field(
        True, description="queries weigh by the attention that their hidden keys have; false weighs all alike"
    )
    queries: int | None = Field(
        128, ge=1, le=LONGEST, description="queries of a sequence that are drawn in each pass; null takes all"
    )

    needs_teacher: ClassVar[bool] = True
    of_layer: ClassVar[bool] = True
    needs_parts: ClassVar[bool] = True
    needs_features: ClassVar[bool] = True
    unit: ClassVar[str] = "nats a query, summed over layers"

    def loss(self, student: Any, teacher: Any, inputs: Inputs) -> torch.Tensor:
        """Of one layer, the mean over its heads; the sum over drawn queries stands for that over all.

        Args:
            student: `parts` (see `Hidden.of`) and `features` (see `runtime.mixer_linear.Features`).
            teacher: `outputs`, `lse` (likewise), `query` `[B, H, T, D]`, `key` `[B, G, T, D]`, `scaling`.
        """
        parts, length = student["parts"], teacher["lse"].shape[-1]
        hidden = Hidden.of(parts, teacher)
        rows = torch.arange(length, device=teacher["lse"].device)
        if self.queries is not None and self.queries < length:
            rows = torch.randperm(length, device=rows.device)[: self.queries].sort().values
        total = hidden.share.new_zeros(())
        for block in rows.split(BLOCK):
            entropies = checkpoint(
                self._divergence, block, student, teacher, use_reentrant=False, preserve_rng_state=False
            )
            if not self.by_mass:
                entropies = entropies / hidden.share[:, :, block].clamp(min=1e-3)
            total = total + entropies.mean(1).sum()
        total = length / len(rows) * total
        if self.mass:
            total = total + self.mass * hidden.mass_error(self.form).mean(1).sum()
        return total

    def _divergence(self, rows: torch.Tensor, student: Any, teacher: Any) -> torch.Tensor:
        """p KL(softmax || state) over the hidden keys of some queries, `[B, H, R]`."""
        parts, features = student["parts"], student["features"]
        hidden = hidden_keys(features.spans, rows, teacher["key"].shape[2])[:, None]  # [G or 1, 1, R, M]
        scores = _products(teacher["query"], teacher["key"], rows) * teacher["scaling"]  # [B, G, heads, R, M]
        lse = teacher["lse"][:, :, rows].unflatten(1, scores.shape[1:3])[..., None]
        logs = (scores - lse).masked_fill(~hidden, float("-inf"))
        weights = torch.exp(logs)
        share = weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        own = _products(features.query, features.key, rows)
        den = parts.log_den[:, :, rows].unflatten(1, own.shape[1:3])[..., None]
        own_logs = own.clamp(min=torch.finfo(own.dtype).tiny).log() - den.masked_fill(den == float("-inf"), 0)
        if features.log_decay is not None:
            own_logs = own_logs + decayed(features.spans, features.log_decay, rows)[:, :, None]
        gap = (logs - share.log() - own_logs).masked_fill(~hidden, 0)
        return (weights * gap).sum(-1).flatten(1, 2)


def hidden_keys(spans: Sequence[Any] | None, rows: torch.Tensor, length: int) -> torch.Tensor:
    """Which of the first `length` keys a state has for the queries at `rows`, `[G or 1, R, length]`."""
    keys = torch.arange(length, device=rows.device)
    if spans is None:
        return (keys <= rows[:, None])[None]
    found = {
        span: (keys <= rows[:, None]) & ~span.visible(rows[:, None], keys[None, :]) for span in dict.fromkeys(spans)
    }
    return torch.stack([found[span] for span in spans])


def decayed(spans: Sequence[Any] | None, log_decay: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Logarithm of what is left of every key in a state when the queries at `rows` read it, `[B, G, R, M]`.

    A state decays with every token that it takes, so up to the last one that it has for the query.

    Args:
        log_decay: `[B, G, M]` of all tokens.
    """
    total = wide(log_decay).cumsum(-1)
    every = [rows] * total.shape[1] if spans is None else [span.boundary(rows) - 1 for span in spans]
    last = torch.stack(every).clamp(min=0)  # [G, R]
    return total.gather(2, last.expand(len(total), -1, -1))[..., None] - total[:, :, None]


def _products(query: torch.Tensor, key: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Products of some queries with all keys of their groups, `[B, G, H / G, R, M]` in float32 at least."""
    grouped = query[:, :, rows].unflatten(1, (key.shape[1], -1))
    return wide(grouped) @ wide(key).transpose(-1, -2)[:, :, None]
