"""How the decisions of `retain` heads are trained: tokens are kept in part, or by the rule and straight through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .reference import Rows
from .scores import Scores
from .span import Span, first_key, rule_columns

RELAXATION = 0.5  # of the Gumbel-sigmoid: the lower, the closer to 0 or 1
STRIP_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}  # of the float32 scores of the queries that are computed at once


@dataclass(frozen=True)
class Decisions:
    """How tokens are kept in a pass that trains the decisions (DMS, arXiv 2506.05345).

    A token's logit is (score - threshold) / temperature. Softly, its key takes part beside the window with the weight
    w = sigmoid((logit + noise) / 0.5), which log w, added to its attention scores, gives it; the noise is logistic, so
    that a token counts for more than a half as often as sigmoid(logit) says. Hard decisions are those of the rule, the
    cap included, with the gradients of sigmoid(logit).

    Attributes:
        temperature: in the unit of the scores.
        hard: whether the rule itself decides.
        noise: whether soft decisions are drawn.
    """

    temperature: float
    hard: bool = False
    noise: bool = True

    def take(
        self, scores: torch.Tensor, thresholds: torch.Tensor, kept: torch.Tensor, fixed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What tokens take part with, and which are kept.

        Args:
            scores: `[B, G, T]` float32 at least, with gradients.
            thresholds: `[G]`, -inf where a group has none.
            kept: bool `[B, G, T]`, what the rule says.
            fixed: bool `[B, G, T]`, tokens about which only the rule decides.

        Returns:
            `[B, G, T]` each. First what `prefill` takes: hard decisions as 0 or 1, soft ones as logarithms of weights.
            Then the hard decisions, also in a pass that takes soft ones: what is counted is what the rule keeps.
        """
        level = thresholds.to(scores.dtype).masked_fill(~thresholds.isfinite(), 0)
        logits = (scores - level[:, None]) / self.temperature
        flags = kept.to(scores.dtype)
        chance = torch.where(fixed, flags, torch.sigmoid(logits))
        through = flags + (chance - chance.detach())
        if self.hard:
            return through, through
        if self.noise:
            drawn = torch.rand_like(scores).clamp(1e-6, 1 - 1e-6)
            logits = logits + drawn.log() - (-drawn).log1p()
        weights = functional.logsigmoid(logits / RELAXATION)
        return torch.where(fixed, flags.log(), weights), through


def prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    taken: torch.Tensor,
    spans: Sequence[Span],
    rows: Rows,
    *,
    hard: bool,
    scale: float | None = None,
    dropout: float = 0.0,
    scores: Scores | None = None,
) -> torch.Tensor:
    """As `retain_reference.prefill` of tokens that nothing is cached before, differentiable also in the decisions.

    A key that is no longer in the query's window takes part with its weight w: exp(s) becomes w exp(s). So nothing
    changes inside the window. Hard decisions are 0 or 1; of such a w the gradient is that of O, the mean of the values
    under the weights, with respect to w where the key is kept, p (v - O), and where it is not what it would change to
    keep it, p (v - O) with p the share that it would have. Both are bounded, whatever the score of a key that is left
    out.

    Queries are taken in strips, each computed again in the backward pass, so that one strip of scores is held at a
    time and memory grows with the length, not with its square.

    Args:
        query: `[B, H, T, D]`, key, value: `[B, G, T, D]`; what is no token may hold anything.
        taken: `[B, G, T]`, see `Decisions.take`.
        spans: of the windows, one per head group, by whole pages and without sinks.
        rows: which columns are tokens.
        hard: whether `taken` are 0 or 1; else they are logarithms of weights.
        scale, dropout, scores: as in `reference.prefill`.

    Returns:
        `[B, H, T, DV]` in the dtype of the values; zero where a column is no token.
    """
    batch, heads, columns, dim = query.shape
    positions = rows.positions(columns, query.device)
    absent = (positions < 0)[:, None, :, None]
    query, key, value = (x.masked_fill(absent, 0) for x in (query, key, value))  # it may be NaN, and 0 * NaN is NaN
    _, alpha, beta_units, granule = rule_columns(tuple(spans), query.device)
    first = first_key(positions.clamp(min=0)[:, None], alpha, beta_units, granule)  # [B, G, T]
    scale, functions = dim**-0.5 if scale is None else scale, scores or Scores()
    most = STRIP_BYTES.get(query.device.type, STRIP_BYTES["cuda"])
    height = max(1, most // (4 * batch * heads * columns))
    outputs = []
    for start in range(0, columns, height):
        strip, end = slice(start, start + height), min(start + height, columns)
        parts = (query[:, :, strip], key[:, :, :end], value[:, :, :end], taken[:, :, :end])
        places = (first[:, :, strip], positions[:, strip], positions[:, :end])
        options = (hard, scale, dropout, functions)
        outputs.append(
            checkpoint(_strip, *parts, *places, *options, use_reentrant=False, preserve_rng_state=dropout > 0)
        )
    return torch.cat(outputs, dim=2)


def _strip(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    taken: torch.Tensor,
    first: torch.Tensor,
    asked: torch.Tensor,
    at: torch.Tensor,
    hard: bool,
    scale: float,
    dropout: float,
    scores: Scores,
) -> torch.Tensor:
    """Outputs `[B, H, R, DV]` of R queries over the first M columns.

    Args:
        query: `[B, H, R, D]`; key, value: `[B, G, M, D]`; taken: `[B, G, M]`.
        first: `[B, G, R]`, the first position of each query's window.
        asked: `[B, R]`, at: `[B, M]`, positions of queries and keys.
    """
    groups, rows = key.shape[1], query.shape[2]
    size = query.shape[1] // groups

    def by_head(x: torch.Tensor) -> torch.Tensor:  # [B, G, R or 1, M] to [B, H, R or 1, M]
        return x if size == 1 else x.repeat_interleave(size, dim=1)

    def rows_of(x: torch.Tensor) -> torch.Tensor:  # [B, H, R, N] to [B, G, H / G * R, N]: a group's rows together
        return x.unflatten(1, (groups, size)).flatten(2, 3)

    def heads_of(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (size, rows)).flatten(1, 2)

    dtype = torch.promote_types(query.dtype, torch.float32)
    products = heads_of(rows_of(query.to(dtype)) @ key.to(dtype).mT) * scale  # [B, H, R, M]
    seen = ((at[:, None] >= 0) & (at[:, None] <= asked[..., None]))[:, None]  # [B, 1, R, M]
    older = seen & (at[:, None, None] < first[..., None])  # [B, G, R, M]
    taken = taken.to(dtype)[:, :, None]  # [B, G, 1, M]
    if hard:
        seen = by_head(seen & ~(older & (taken.detach() == 0)))
        logits = scores.within(products, seen)
    else:
        bias = torch.where(older, taken, 0)
        logits = scores.within(products, seen) + by_head(bias)
    weights = scores.weights(logits, seen)
    dropped = functional.dropout(weights, dropout)
    out = heads_of(rows_of(dropped.to(value.dtype)) @ value)
    if hard and taken.requires_grad:
        with torch.no_grad():
            total = scores.log_total(logits)[..., None]
            share = torch.where(seen, weights, torch.sigmoid(scores.capped(products) - total))
            share = share.masked_fill_(~by_head(older), 0)
        change = share * by_head(taken - taken.detach())  # zero, with the gradient of the decisions
        moved = heads_of(rows_of(change) @ value.detach().to(dtype))
        out = out + (moved - change.sum(-1, keepdim=True) * out.detach()).to(out.dtype)
    return out.masked_fill((asked < 0)[:, None, :, None], 0)
