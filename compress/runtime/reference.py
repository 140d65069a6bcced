"""Attention of a planned layer in plain PyTorch: the specification that every faster implementation is held to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from .pages import Pages
from .scores import Scores, attend
from .span import PAGE, Span, kept_table, rule_columns, visible

# Query rows a block. A window head computes at most this many keys more than it sees; a GPU wants larger blocks.
ROWS = {"cpu": 256, "cuda": 1024}


@dataclass(frozen=True)
class Rows:
    """Which columns of a batch are tokens: of each sequence a run of them.

    Args:
        past: position of each sequence's first new token.
        start: its first column that is a token.
        count: how many columns from there are tokens.
    """

    past: tuple[int, ...]
    start: tuple[int, ...]
    count: tuple[int, ...]

    @staticmethod
    def whole(batch: int, columns: int, past: int = 0) -> Rows:
        """Every column of every sequence is a token."""
        return Rows((past,) * batch, (0,) * batch, (columns,) * batch)

    def is_whole(self, columns: int) -> bool:
        """True when there is no padding."""
        return all(count == columns for count in self.count)

    def tensor(self, device: torch.device) -> torch.Tensor:
        """`[B, 3]` int32: past, start, count; sent to the device once for all layers."""
        return _on_device(self, device)

    def positions(self, columns: int, device: torch.device) -> torch.Tensor:
        """Position of every column among its sequence's tokens, from 0, `[B, T]`; -1 where it is no token."""
        past, start, count = self.tensor(device).long().unbind(1)
        order = torch.arange(columns, device=device) - start[:, None]
        return torch.where((order >= 0) & (order < count[:, None]), past[:, None] + order, -1)


@lru_cache(maxsize=64)
def _on_device(rows: Rows, device: torch.device) -> torch.Tensor:
    return kept_table(list(zip(rows.past, rows.start, rows.count, strict=True)), device)


def prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: Sequence[Span],
    *,
    rows: Rows | None = None,
    pages: Pages | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    scores: Scores | None = None,
    keep_lse: bool = False,
) -> Any:
    """Attention of T new columns over what is cached and themselves, differentiable.

    Args:
        query: `[B, H, T, D]` after RoPE; query head h belongs to group h // (H / G).
        key, value: `[B, G, T, D]`, the new columns alone; or more than T, of which the last T are meant, and those
            before are of the positions before, where there is neither padding nor a cache.
        spans: one per head group.
        rows: which columns are tokens, and their positions; None when all are, from position 0. The others take
            part in nothing and may hold anything.
        pages: what is cached of the positions before `past`; None when nothing is.
        scale: factor on the scores, 1 / sqrt(D) when None.
        scores: what else is done to the scores of the H heads; None for a plain softmax.
        keep_lse: return the log-sum-exp of every row as well, which other parts of the same softmax are joined by
            (merge.py).

    Returns:
        `[B, H, T, D]` in query's dtype; zero where a column is no token. With `keep_lse` also `[B, H, T]` in float32 at
        least: the natural logarithm of the row's sum of exponentials, the extra logit of `scores` included, and
        -inf where a column is no token. It has gradients, too.
    """
    batch, _, columns, _ = query.shape
    rows = rows or Rows.whole(batch, columns)
    alike: dict[tuple[int, int, int], list[int]] = {}
    for row, run in enumerate(zip(rows.past, rows.start, rows.count, strict=True)):
        alike.setdefault(run, []).append(row)
    if len(alike) == 1 and rows.is_whole(columns):
        history = _history(pages, list(range(batch)), spans, rows.past[0])
        out, lse = _alike(query, key, value, spans, rows.past[0], history, scale, dropout, scores, keep_lse)
        return (out, lse) if keep_lse else out
    out, lse = torch.zeros_like(query[..., : value.shape[-1]]), _no_mass(query) if keep_lse else None
    for (past, start, count), members in alike.items():
        if count == 0:
            continue
        kept = slice(start, start + count)
        history = _history(pages, members, spans, past)
        part = [tensor[members][:, :, kept] for tensor in (query, key, value)]
        found, own = _alike(part[0], part[1], part[2], spans, past, history, scale, dropout, scores, keep_lse)
        out[members, :, kept] = found
        if lse is not None and own is not None:
            lse[members, :, kept] = own
    return out if lse is None else (out, lse)


def check_active(active: torch.Tensor, heads: int, groups: int, gates: torch.Tensor | None) -> None:
    """Raise ValueError unless `active` is bool `[B, G or H, ...]`, and `gates` are wide and of that shape."""
    if active.dtype != torch.bool or active.shape[1] not in (groups, heads):
        raise ValueError(
            f"active: expected bool of {groups} groups or {heads} query heads, got {active.dtype} of {active.shape[1]}"
        )
    wide = (torch.float32, torch.float64)
    if gates is not None and (gates.dtype not in wide or gates.shape != active.shape):
        raise ValueError(
            f"gates: expected float32 {list(active.shape)} as active, got {gates.dtype} {list(gates.shape)}"
        )


def only_active(out: torch.Tensor, active: torch.Tensor, gates: torch.Tensor | None = None) -> torch.Tensor:
    """Outputs `[B, H, ..., D]` times the gates, with zeros, whatever was there, where `active` says off.

    Args:
        active, gates: `[B, G or H, ...]`.
    """
    share = out.shape[1] // active.shape[1]
    if gates is not None:
        out = (out * gates.repeat_interleave(share, dim=1)[..., None]).to(out.dtype)
    return out.masked_fill(~active.repeat_interleave(share, dim=1)[..., None], 0)


def _no_mass(query: torch.Tensor) -> torch.Tensor:
    """The log-sum-exp of queries `[..., D]` that see no key: -inf, in float32 at least."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_full(query.shape[:-1], float("-inf"), dtype=dtype)


History = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def _history(pages: Pages | None, rows: list[int], spans: Sequence[Span], past: int) -> History | None:
    """Per group, cached keys and values `[B, M, D]` of sequences of one length and their positions `[M]`."""
    if pages is None or past == 0:
        return None
    history = []
    for group, span in enumerate(spans):
        numbers = torch.tensor(span.pages(past), dtype=torch.long, device=pages.table.device)
        positions = slots_of(numbers)
        stored = positions < past
        places = pages.table[rows, group][:, numbers].long()
        history.append(
            (
                pages.keys[places].flatten(1, 2)[:, stored],
                pages.values[places].flatten(1, 2)[:, stored],
                positions[stored],
            )
        )
    return history


def slots_of(pages: torch.Tensor) -> torch.Tensor:
    """Token numbers of whole pages, `[..., P]` to `[..., P * 64]`."""
    return (pages[..., None] * PAGE + torch.arange(PAGE, device=pages.device)).flatten(-2)


def _alike(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: Sequence[Span],
    past: int,
    history: History | None,
    scale: float | None,
    dropout: float,
    scores: Scores | None,
    keep_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`prefill` of sequences that are all at the same position and without padding."""
    count, groups = query.shape[2], key.shape[1]
    ahead = key.shape[2] - count
    share = query.shape[1] // groups
    out, lse = torch.empty_like(query[..., : value.shape[-1]]), _no_mass(query) if keep_lse else None
    # Groups that see the same keys of these queries are computed together.
    together: dict[Span, list[int]] = {}
    for group, span in enumerate(spans):
        together.setdefault(Span() if span.sees_all(past + count) else span, []).append(group)
    for span, members in together.items():
        heads = [head for group in members for head in range(group * share, (group + 1) * share)]
        q = query[:, heads]
        if scores is None and lse is None and past == 0 and ahead == 0 and span.is_full:
            out[:, heads] = scaled_dot_product_attention(
                q, key[:, members], value[:, members], is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=True
            )
            continue
        height = ROWS.get(query.device.type, ROWS["cuda"])
        for start in range(0, count, height):
            rows = torch.arange(past + start, past + min(start + height, count), device=query.device)
            k, v, positions = _keys_in_sight(key, value, members, span, past, start, len(rows), history, ahead)
            block, seen = q[:, :, start : start + len(rows)], span.visible(rows[:, None], positions[None, :])
            own = None if scores is None else scores.of(heads)
            found, own_lse = masked(block, k, v, seen, scale, dropout, own, keep_lse)
            out[:, heads, start : start + len(rows)] = found
            if lse is not None and own_lse is not None:
                lse[:, heads, start : start + len(rows)] = own_lse
    return out, lse


def masked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor,
    scale: float | None,
    dropout: float,
    scores: Scores | None,
    keep_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention under a mask, with grouped heads: arguments and results as of `scores.attend`."""
    if scores is not None or keep_lse:
        return attend(query, key, value, seen, scores or Scores(), scale=scale, dropout=dropout, keep_lse=keep_lse)
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=scale, dropout_p=dropout, enable_gqa=True
    )
    return out, None


def _keys_in_sight(
    key: torch.Tensor,
    value: torch.Tensor,
    members: list[int],
    span: Span,
    past: int,
    start: int,
    rows: int,
    history: History | None,
    ahead: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values `[B, len(members), M, D]` that the block's queries can see at all, and their positions `[M]`."""
    first, stop = span.first(past + start), past + start + rows
    new = torch.arange(past - ahead, stop, device=key.device)
    keep = (new < span.sink) | (new >= first)
    k, v, positions = key[:, members, : len(new)][:, :, keep], value[:, members, : len(new)][:, :, keep], new[keep]
    if past == 0 or history is None:
        return k, v, positions
    # Members share one span, hence the same cached positions.
    cached = history[members[0]][2]
    keep = (cached < span.sink) | (cached >= first)
    old_k = torch.stack([history[group][0][:, keep] for group in members], dim=1)
    old_v = torch.stack([history[group][1][:, keep] for group in members], dim=1)
    return torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2), torch.cat([cached[keep], positions])


def decode(
    query: torch.Tensor,
    pages: Pages,
    lengths: torch.Tensor,
    spans: Sequence[Span],
    *,
    scale: float | None = None,
    scores: Scores | None = None,
    keep_lse: bool = False,
    active: torch.Tensor | None = None,
    gates: torch.Tensor | None = None,
) -> Any:
    """Attention of one token per sequence over the pages, the token's own key included.

    Args:
        query: `[B, H, D]`.
        pages: what is cached.
        lengths: `[B]` tokens of each sequence, this one included; its position is length - 1. A sequence of
            length 0 takes no part, and its output is zero.
        spans: one per head group.
        scale, scores, keep_lse: as in `prefill`.
        active: bool on the device, `[B, G]` or `[B, H]`: which groups, or which query heads, are on; None when all
            are. A group without a head that is on reads no key. The output of a head that is off is exactly zero.
        gates: float32 at least, of the shape of `active`, factors on the outputs; None for 1.

    Returns:
        `[B, H, D]` in query's dtype; with `keep_lse` also the log-sum-exp `[B, H]`, -inf for a sequence of length 0
        and for a head that is off.
    """
    batch, heads, _ = query.shape
    groups = len(spans)
    if active is not None:
        check_active(active, heads, groups, gates)
    if not pages.table.shape[-1]:  # no sequence has a token yet
        out = query.new_zeros(batch, heads, pages.values.shape[-1])
        return (out, _no_mass(query)) if keep_lse else out
    positions = torch.arange(pages.table.shape[-1] * PAGE, device=query.device)
    sink, alpha, beta_units, granule = rule_columns(tuple(spans), query.device)  # each [G, 1]
    last = lengths[:, None, None].long() - 1
    seen = visible(last, positions, sink, alpha, beta_units, granule)  # [B, G, numbers * 64]
    options: dict[str, Any] = {"scale": scale, "scores": scores, "keep_lse": keep_lse}
    return decode_seen(query, pages, lengths, seen, active=active, gates=gates, **options)


def decode_seen(
    query: torch.Tensor,
    pages: Pages,
    lengths: torch.Tensor,
    seen: torch.Tensor,
    *,
    scale: float | None,
    scores: Scores | None,
    keep_lse: bool = False,
    active: torch.Tensor | None = None,
    gates: torch.Tensor | None = None,
) -> Any:
    """`decode` over the slots of the table's pages that `seen` `[B, G, numbers * 64]` says, whatever the rule."""
    batch, heads, _ = query.shape
    groups = seen.shape[1]
    if active is not None:
        seen = seen & active.unflatten(1, (groups, -1)).any(-1)[..., None]
    # Only pages in sight are gathered; the others come last in the order, as many as the fullest group needs. A CUDA
    # graph takes all, since how many there are is not known to the host.
    by_page = seen.unflatten(-1, (-1, PAGE))
    in_sight = by_page.any(-1)
    captured = query.is_cuda and torch.cuda.is_current_stream_capturing()
    most = in_sight.shape[-1] if captured else max(1, int(in_sight.sum(-1).max()))
    order = (~in_sight).long().argsort(dim=-1, stable=True)[..., :most]  # [B, G, P]
    seen = by_page.gather(2, order[..., None].expand(-1, -1, -1, PAGE)).flatten(2)
    places = pages.table.clamp(min=0).long().gather(-1, order)
    # Slots that hold no visible token may hold anything, NaN included, and 0 * NaN is NaN.
    hidden = ~seen[..., None]
    key = pages.keys[places].flatten(2, 3).masked_fill(hidden, 0)  # [B, G, P * 64, D]
    value = pages.values[places].flatten(2, 3).masked_fill(hidden, 0)
    absent, lse = (lengths == 0)[:, None].expand(batch, heads), None
    if scores is not None or keep_lse:
        seen = seen.repeat_interleave(heads // groups, dim=1)[:, :, None]
        out, lse = attend(query[:, :, None], key, value, seen, scores or Scores(), scale=scale, keep_lse=keep_lse)
    else:
        q = query.view(batch, groups, heads // groups, -1)  # the heads of a group are the rows of its tile
        out = scaled_dot_product_attention(q, key, value, attn_mask=seen[:, :, None], scale=scale)
    out = out.reshape(batch, heads, -1)
    if active is not None:
        out = only_active(out, active, gates)
        absent = absent | ~active.repeat_interleave(heads // active.shape[1], dim=1)
    out = out.masked_fill(absent[..., None], 0)
    return out if lse is None else (out, lse[..., 0].masked_fill(absent, float("-inf")))


def store(
    key: torch.Tensor, value: torch.Tensor, pages: Pages, rows: Rows, spans: Sequence[Span], slack: int = 0
) -> None:
    """Write new tokens `[B, G, T, D]` into the pages that are held once they are there, detached.

    Args:
        slack: how many tokens later than a span says pages are freed.
    """
    key, value = key.detach(), value.detach()
    for row, (past, start, count) in enumerate(zip(rows.past, rows.start, rows.count, strict=True)):
        for group, span in enumerate(spans):
            held = span.pages(past + count, past + count - slack)
            numbers = torch.tensor(held, dtype=torch.long, device=pages.table.device)
            positions = slots_of(numbers)
            fresh = (positions >= past) & (positions < past + count)
            slots = slots_of(pages.table[row, group][numbers].long())[fresh]
            source = positions[fresh] - past + start
            for pool, new in ((pages.keys, key), (pages.values, value)):
                pool.view(-1, pool.shape[-1])[slots] = new[row, group, source].to(pool.dtype)


def store_one(
    key: torch.Tensor, value: torch.Tensor, pages: Pages, lengths: torch.Tensor, spans: Sequence[Span]
) -> None:
    """Write one token a sequence, `[B, G, D]`, as its last; sequences of length 0 take no part.

    Args:
        lengths: `[B]` tokens of each sequence, this one included.
    """
    key, value = key.detach(), value.detach()
    rows = (lengths > 0).nonzero().flatten()
    last = lengths[rows].long() - 1
    groups = torch.arange(key.shape[1], device=key.device)
    slots = pages.table[rows[:, None], groups, (last // PAGE)[:, None]].long() * PAGE + (last % PAGE)[:, None]
    for pool, new in ((pages.keys, key), (pages.values, value)):
        pool.view(-1, pool.shape[-1])[slots] = new[rows].to(pool.dtype)
