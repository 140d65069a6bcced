"""What `retain` heads keep and see, in plain PyTorch: the specification that faster implementations are held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .pages import Pages
from .reference import ROWS, Rows, decode_seen, masked, slots_of
from .retain_state import ListedPages, cached_window
from .scores import Scores
from .span import BETA_UNIT, PAGE, Span, first_key, rule_columns


def keep(
    scores: torch.Tensor,
    positions: torch.Tensor,
    count: torch.Tensor,
    thresholds: torch.Tensor,
    sinks: torch.Tensor,
    caps: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of T new columns are kept: those of the sink, and of the others

        keep_j = (r_j >= threshold) and (#{i < j : keep_i} < a + floor(b (j + 1))),

    where tokens of the sink are not counted. With s_j whether a token is behind the sink and not below the
    threshold, and S_j the sum of s up to j, the count behind token j is

        min(S_j, min over i <= j of (cap_i + S_j - S_i)),

    because a cap never falls, so that a count is held back at most where it has met the cap; so no loop is needed.

    Args:
        scores: `[B, G, T]`, of columns that are no token anything.
        positions: `[B, T]`, -1 where a column is no token.
        count: `[B, G]` tokens before them that are kept, those of the sink left out.
        thresholds: `[G]` float32; sinks: `[G]` tokens in whole pages.
        caps: `[G, 2]` int64: a, and b in 1/1024.

    Returns:
        bool `[B, G, T]`, and the counts behind them, `[B, G]` int32.
    """
    at = positions[:, None]
    free = (at >= 0) & (at < sinks[:, None])
    wanted = (at >= sinks[:, None]) & (scores >= thresholds[:, None])
    cap = caps[:, :1] + ((at + 1) * caps[:, 1:]).div(BETA_UNIT, rounding_mode="floor")
    total = wanted.long().cumsum(-1)
    room = (cap - count[..., None].long() - total).masked_fill(at < 0, torch.iinfo(torch.int64).max)
    counted = total + room.cummin(-1).values.clamp(max=0)
    before = torch.cat([torch.zeros_like(counted[..., :1]), counted[..., :-1]], dim=-1)
    return free | (counted > before), (count + counted[..., -1]).to(torch.int32)


def prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kept: torch.Tensor,
    spans: Sequence[Span],
    *,
    rows: Rows | None = None,
    pages: ListedPages | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    scores: Scores | None = None,
) -> torch.Tensor:
    """Attention of T new columns over the lists, the cached windows and themselves, differentiable in the new ones.

    The query at t sees key j <= t when j is in its window, j >= first(t), or is kept. Of one group, kept tokens that a
    query sees beside its window are a prefix of all kept tokens in order: those before first(t).

    Args:
        query: `[B, H, T, D]`, key, value: `[B, G, T, D]`, as in `reference.prefill`.
        kept: bool `[B, G, T]`, which new tokens are kept, those of the sink among them.
        spans: of the windows, one per head group, by whole pages and without sinks.
        rows: which columns are tokens; None when all are, from position 0.
        pages: what is cached of the positions before; None when nothing is.
        scale, dropout, scores: as in `reference.prefill`.

    Returns:
        `[B, H, T, D]` in query's dtype; zero where a column is no token.
    """
    batch, heads, columns, _ = query.shape
    device, groups = query.device, len(spans)
    rows = rows or Rows.whole(batch, columns)
    t = rows.positions(columns, device)
    # What is no token may hold NaN, and 0 * NaN is NaN.
    absent = (t < 0)[:, None, :, None]
    query, key, value = (x.masked_fill(absent, 0) for x in (query, key, value))
    _, alpha, beta_units, granule = rule_columns(tuple(spans), device)
    first = first_key(t.clamp(min=0)[:, None], alpha, beta_units, granule)  # [B, G, T]
    old_keys, old_values, always, sometimes, at = _cached(pages, spans, rows, key, value)
    outputs = []
    for begin in range(0, columns, ROWS["cpu"]):
        block = slice(begin, min(begin + ROWS["cpu"], columns))
        new = slice(0, block.stop)
        window = first[:, :, block, None]
        asked = t[:, None, block, None]
        own = (t[:, None, None, new] >= 0) & (t[:, None, None, new] <= asked)
        own = own & (kept[:, :, None, new] | (t[:, None, None, new] >= window))
        cached = always[:, :, None] | (sometimes[:, :, None] & (at[:, :, None] >= window))
        seen = torch.cat([cached & (asked >= 0), own], dim=-1)
        k, v = torch.cat([old_keys, key[:, :, new]], dim=2), torch.cat([old_values, value[:, :, new]], dim=2)
        by_head = seen.repeat_interleave(heads // groups, dim=1)
        out, _ = masked(query[:, :, block], k, v, by_head, scale, dropout, scores)
        outputs.append(out.masked_fill(~by_head.any(-1, keepdim=True), 0))
    return torch.cat(outputs, dim=2)


def _cached(
    pages: ListedPages | None, spans: Sequence[Span], rows: Rows, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Keys and values `[B, G, M, D]` of lists and windows, and `[B, G, M]` each: whether all later queries see them,
    whether those do in whose window they are, and their positions."""
    if pages is None or not any(rows.past):
        empty = key.new_zeros(*key.shape[:2], 0, dtype=torch.bool)
        return key[:, :, :0], value[:, :, :0], empty, empty, empty.long()
    window = Pages(pages.keys, pages.values, pages.table[:, :, pages.offset :])
    places, at, known = cached_window(window, spans, rows, key.device)
    lists = pages.table[:, :, : pages.offset].long().clamp(min=0)
    slots = slots_of(torch.arange(pages.offset, device=key.device))
    listed = slots < pages.listed[..., None]
    always = torch.cat([listed, known & pages.kept[places].flatten(2)], dim=2)
    sometimes = torch.cat([torch.zeros_like(listed), known], dim=2)
    both = torch.cat([lists, places], dim=2)
    hidden = ~(always | sometimes)[..., None]
    keys, values = (pool[both].flatten(2, 3).masked_fill(hidden, 0) for pool in (pages.keys, pages.values))
    return keys, values, always, sometimes, torch.cat([torch.zeros_like(listed, dtype=torch.long), at], dim=2)


def decode(
    query: torch.Tensor,
    pages: ListedPages,
    lengths: torch.Tensor,
    spans: Sequence[Span],
    *,
    scale: float | None = None,
    scores: Scores | None = None,
) -> torch.Tensor:
    """Attention of one token per sequence over its lists and windows, the token's own key included.

    Of one sequence and group, slot v of the table is seen when v < `listed`, or when
    first(length - 1) <= v - 64 * `offset` < length.

    Args:
        query: `[B, H, D]`.
        pages: what is cached; no page that the new token does not see is left in a window.
        lengths: `[B]` tokens of each sequence, this one included; 0 where a sequence takes no part.
        spans: of the windows, one per head group, by whole pages and without sinks.
        scale, scores: as in `prefill`.

    Returns:
        `[B, H, D]` in query's dtype; zero where a sequence takes no part.
    """
    if not pages.table.shape[-1]:  # no sequence has a token yet
        return query.new_zeros(*query.shape[:2], pages.values.shape[-1])
    slots = torch.arange(pages.table.shape[-1] * PAGE, device=query.device)
    at, last = slots - pages.offset * PAGE, lengths[:, None, None].long() - 1
    _, alpha, beta_units, granule = rule_columns(tuple(spans), query.device)
    first = first_key(last, alpha, beta_units, granule)
    seen = (slots < pages.listed[..., None]) | ((at >= first) & (at >= 0) & (at <= last))
    out: torch.Tensor = decode_seen(query, pages, lengths, seen, scale=scale, scores=scores)
    return out
