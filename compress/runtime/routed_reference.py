"""Prefill of heads that are on for some tokens only, in plain PyTorch: the specification of faster implementations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .pages import Pages
from .reference import Rows, check_active, only_active
from .reference import prefill as reference_prefill
from .scores import Scores
from .span import Span


def prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: Sequence[Span],
    active: torch.Tensor,
    *,
    gates: torch.Tensor | None = None,
    rows: Rows | None = None,
    pages: Pages | None = None,
    scale: float | None = None,
    scores: Scores | None = None,
) -> torch.Tensor:
    """`reference.prefill` of heads that are on for some tokens only; what a head that is off would give is zero.

    Keys and values take part whether their own token has the group on or not. This computes everything and leaves
    out what is off; a kernel skips it. There are no gradients: those of a router flow through the dense pass.

    Args:
        active: bool, `[B, G, T]` where a group is on or off as a whole, or `[B, H, T]` for single query heads. What it
            says of a column that is no token means nothing.
        gates: float32 at least, of the same shape, factors on the outputs; None for 1.
        query, key, value, spans, rows, pages, scale, scores: as in `reference.prefill`.

    Returns:
        `[B, H, T, D]` in query's dtype; exactly zero where a head is off, and where a column is no token.

    Raises:
        ValueError: `active` is neither by group nor by query head, or the gates are something else.
    """
    check_active(active, query.shape[1], len(spans), gates)
    out = reference_prefill(query, key, value, spans, rows=rows, pages=pages, scale=scale, scores=scores)
    return only_active(out, active, gates)
