"""Attention over kept tokens and a window as Triton kernels, and the making of the lists in which they lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels need Triton; without it attention runs in plain PyTorch") from error

from .reference import Rows
from .retain_reference import decode as reference_decode
from .retain_reference import prefill as reference_prefill
from .retain_state import ListedPages
from .scores import KernelScores, Scores
from .span import PAGE, Span
from .triton_decode import decode as paged_decode
from .triton_prefill import Lists, forward
from .triton_span import first_key, load_block, load_rule, load_run, span_rules, store_block
from .tuned_retain import flag_pages

_MOST_KEYS = 128  # of a tile, as of `tuned.prefill_config`


@triton.jit
def _flags(
    p_kept, p_pool_kept, p_held, b, g, number, past, start, count, kept_b, kept_g, kept_t,
    PAGE: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """Which tokens of pages `number` `[N]` are kept, `[N, PAGE]` int32, and their columns among the new ones."""
    # [N, PAGE]
    j = number[:, None] * PAGE + tl.arange(0, PAGE)[None, :]
    column = (start + j - past).to(tl.int64)
    m_new = (j >= past) & (j < past + count)
    o_new = b.to(tl.int64) * kept_b + g * kept_g + column * kept_t
    kept = tl.load(p_kept + o_new, mask=m_new, other=0).to(tl.int32)
    if PAGED:
        m_page = number * PAGE < past
        place = tl.load(p_held + number, mask=m_page, other=0).to(tl.int64)
        o_old = place[:, None] * PAGE + tl.arange(0, PAGE)[None, :]
        kept += tl.load(p_pool_kept + o_old, mask=j < past, other=0).to(tl.int32)
    return kept, column


@triton.jit(do_not_specialize=["offset", "pages"])
def _count(
    p_kept,  # [B, G, T] uint8
    p_pool_kept,  # [places, PAGE] uint8, where PAGED
    p_table,  # [B, G, numbers] int32, where PAGED
    p_rows,  # [B, 3] int32: past, start, count
    p_rules,  # [G, 4] int32
    p_before,  # [B, G, pages] int32
    p_leaving,  # [B, G] int32
    kept_b,
    kept_g,
    kept_t,
    numbers,
    offset,
    pages,
    GROUPS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGED: tl.constexpr,
):
    """How many tokens of one (sequence, group) are kept before every page, BLOCK pages after the other.

    Pages are counted from the first one of the window that is cached; `leaving` are those before the window of the
    last new token.
    """
    segment = tl.program_id(0)
    b = segment // GROUPS
    g = segment % GROUPS
    past, start, count = load_run(p_rows, b)
    _, alpha, beta, mask = load_rule(p_rules, g)
    from_page = first_key(past - 1, alpha, beta, mask) // PAGE
    p_held = p_table
    if PAGED:
        p_held += segment.to(tl.int64) * numbers + offset
    stays = tl.where(count > 0, first_key(past + count - 1, alpha, beta, mask) // PAGE - from_page, 0)
    total = 0
    leaving = 0
    for base in range(0, pages, BLOCK):
        # [BLOCK], [BLOCK, PAGE]
        o_page = base + tl.arange(0, BLOCK)
        kept, _columns = _flags(
            p_kept, p_pool_kept, p_held, b, g, from_page + o_page, past, start, count, kept_b, kept_g, kept_t,
            PAGE, PAGED,
        )  # fmt: skip
        b_counts = tl.sum(kept, 1)
        before = total + tl.cumsum(b_counts, 0) - b_counts
        tl.store(p_before + segment.to(tl.int64) * pages + o_page, before, mask=o_page < pages)
        total += tl.sum(b_counts, 0)
        leaving += tl.sum(tl.where(o_page < stays, b_counts, 0), 0)
    tl.store(p_leaving + segment, leaving)


@triton.jit(do_not_specialize=["offset", "pages", "room"])
def _copy(
    p_key,  # [B, G, T, D]
    p_value,  # [B, G, T, DV]
    p_kept,  # [B, G, T] uint8
    p_key_pages,  # [places, PAGE, D], where PAGED
    p_value_pages,  # [places, PAGE, DV], where PAGED
    p_pool_kept,  # [places, PAGE] uint8, where PAGED
    p_table,  # [B, G, numbers] int32, where PAGED
    p_rows,  # [B, 3] int32: past, start, count
    p_rules,  # [G, 4] int32
    p_before,  # [B, G, pages] int32
    p_leaving,  # [B, G] int32
    p_list_keys,  # [B, G, room, D]
    p_list_values,  # [B, G, room, DV]
    key_b,
    key_g,
    key_t,
    value_b,
    value_g,
    value_t,
    kept_b,
    kept_g,
    kept_t,
    numbers,
    offset,
    pages,
    room,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    REST: tl.constexpr,
    PAGED: tl.constexpr,
):
    """The kept tokens of one page that leaves the window behind those of the pages before it.

    The first page's program also writes zeros behind the list's end, as many values as a tile of keys has at most.
    """
    segment = tl.program_id(1)
    b = segment // GROUPS
    g = segment % GROUPS
    past, start, count = load_run(p_rows, b)
    _, alpha, beta, mask = load_rule(p_rules, g)
    number = first_key(past - 1, alpha, beta, mask) // PAGE + tl.program_id(0)
    if (count == 0) | (number >= first_key(past + count - 1, alpha, beta, mask) // PAGE):
        return
    if tl.program_id(0) == 0:  # weights of 0 meet them, which no mask makes 0 where they are NaN
        o_rest = tl.load(p_leaving + segment) + tl.arange(0, REST)
        o_entry = segment.to(tl.int64) * room + o_rest
        b_zero = tl.zeros([REST, BLOCK_D], p_list_values.dtype.element_ty)
        store_block(p_list_values, o_entry * VALUE_DIM, b_zero, o_rest < room, VALUE_DIM, BLOCK_D)
    p_held = p_table
    if PAGED:
        p_held += segment.to(tl.int64) * numbers + offset
    # [1, PAGE]
    kept, column = _flags(
        p_kept, p_pool_kept, p_held, b, g, number + tl.arange(0, 1), past, start, count, kept_b, kept_g, kept_t,
        PAGE, PAGED,
    )  # fmt: skip
    # [PAGE]
    kept = tl.reshape(kept, [PAGE])
    column = tl.reshape(column, [PAGE])
    before = tl.load(p_before + segment.to(tl.int64) * pages + tl.program_id(0))
    entry = segment.to(tl.int64) * room + before + tl.cumsum(kept, 0) - kept
    j = number * PAGE + tl.arange(0, PAGE)
    m_new = (kept != 0) & (j >= past)
    # [PAGE, BLOCK_D]
    b_key = load_block(p_key, b.to(tl.int64) * key_b + g * key_g + column * key_t, m_new, DIM, BLOCK_D)
    store_block(p_list_keys, entry * DIM, b_key, m_new, DIM, BLOCK_D)
    o_value = b.to(tl.int64) * value_b + g * value_g + column * value_t
    b_value = load_block(p_value, o_value, m_new, VALUE_DIM, BLOCK_D)
    store_block(p_list_values, entry * VALUE_DIM, b_value, m_new, VALUE_DIM, BLOCK_D)
    if PAGED:  # noqa: SIM102  (what is no constant does not end an `and` in a kernel)
        if number * PAGE < past:
            m_old = (kept != 0) & (j < past)
            slot = tl.load(p_held + number).to(tl.int64) * PAGE + tl.arange(0, PAGE)
            b_key = load_block(p_key_pages, slot * DIM, m_old, DIM, BLOCK_D)
            store_block(p_list_keys, entry * DIM, b_key, m_old, DIM, BLOCK_D)
            b_value = load_block(p_value_pages, slot * VALUE_DIM, m_old, VALUE_DIM, BLOCK_D)
            store_block(p_list_values, entry * VALUE_DIM, b_value, m_old, VALUE_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["room"])
def _append(
    p_list_keys,  # [B, G, room, D]
    p_list_values,  # [B, G, room, DV]
    p_counts,  # [B, G] int32
    p_listed,  # [B, G] int32
    p_key_pages,  # [places, PAGE, D]
    p_value_pages,  # [places, PAGE, DV]
    p_table,  # [B, G, numbers] int32
    numbers,
    room,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
):
    """PAGE entries of a list into the pages of a table, behind the tokens that lie there."""
    segment = tl.program_id(1).to(tl.int64)
    # [PAGE]
    entry = tl.program_id(0) * PAGE + tl.arange(0, PAGE)
    m_entry = entry < tl.load(p_counts + segment)
    slot = tl.load(p_listed + segment) + entry
    place = tl.load(p_table + segment * numbers + slot // PAGE, mask=m_entry, other=0).to(tl.int64)
    slot = place * PAGE + slot % PAGE
    # [PAGE, BLOCK_D]
    b_key = load_block(p_list_keys, (segment * room + entry) * DIM, m_entry, DIM, BLOCK_D)
    store_block(p_key_pages, slot * DIM, b_key, m_entry, DIM, BLOCK_D)
    b_value = load_block(p_list_values, (segment * room + entry) * VALUE_DIM, m_entry, VALUE_DIM, BLOCK_D)
    store_block(p_value_pages, slot * VALUE_DIM, b_value, m_entry, VALUE_DIM, BLOCK_D)


def compact(
    key: torch.Tensor,
    value: torch.Tensor,
    kept: torch.Tensor,
    spans: Sequence[Span],
    rows: Rows,
    pages: ListedPages | None,
) -> Lists:
    """The kept tokens that leave the windows in a pass, in order: two launches, and the host waits for nothing.

    They come from the cached windows and from the new tokens. Since how many they are is known to the device alone,
    there is room for all that leave.

    Args:
        key, value: `[B, G, T, D]` new tokens; kept: bool `[B, G, T]`, which are kept.
        spans: of the windows, by whole pages and without sinks; rows: which columns are tokens.
        pages: what is cached of the positions before; None when nothing is.
    """
    batch, groups, _, dim = key.shape
    value_dim = value.shape[-1]
    some = [
        (span.first(past - 1), span.first(past + count - 1), past + count)
        for past, count in zip(rows.past, rows.count, strict=True)
        if count
        for span in spans
    ]
    leaving = max(((last - first) // PAGE for first, last, _ in some), default=0)
    size = 1 + max((-(-end // PAGE) - first // PAGE for first, _, end in some), default=0)
    keys = key.new_empty(batch, groups, max(1, leaving * PAGE), dim)
    values = value.new_empty(batch, groups, max(1, leaving * PAGE), value_dim)
    before = torch.empty(batch, groups, size, dtype=torch.int32, device=key.device)
    totals = torch.empty(batch, groups, dtype=torch.int32, device=key.device)
    where, rules, flags = rows.tensor(key.device), span_rules(tuple(spans), key.device), kept.view(torch.uint8)
    cached: tuple[Any, ...] = (None,) * 4
    numbers = offset = 0
    if pages is not None:
        cached = (pages.keys, pages.values, pages.kept.view(torch.uint8), pages.table)
        numbers, offset = pages.table.shape[-1], pages.offset
    options: dict[str, Any] = {"GROUPS": groups, "PAGE": PAGE, "PAGED": pages is not None}
    # fmt: off
    _count[(batch * groups,)](
        flags, *cached[2:], where, rules, before, totals, *flags.stride(), numbers, offset, size,
        BLOCK=flag_pages(key.device), **options,
    )
    # fmt: on
    if leaving:
        key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
        # fmt: off
        _copy[(leaving, batch * groups)](
            key, value, flags, *cached, where, rules, before, totals, keys, values,
            *key.stride()[:3], *value.stride()[:3], *flags.stride(), numbers, offset, size, keys.shape[2],
            DIM=dim, VALUE_DIM=value_dim, BLOCK_D=triton.next_power_of_2(max(dim, value_dim)), REST=_MOST_KEYS,
            **options,
        )
        # fmt: on
    listed = None if pages is None else pages.listed
    return Lists(keys, values, before, totals, listed, offset)


def append(lists: Lists, pages: ListedPages) -> None:
    """Write what `compact` gave into the pages of the lists, behind the tokens that lie there.

    Args:
        pages: with a table that has the pages for them, and `listed` as it was before.
    """
    batch, groups, room, dim = lists.keys.shape
    value_dim = lists.values.shape[-1]
    # fmt: off
    _append[(triton.cdiv(room, PAGE), batch * groups)](
        lists.keys, lists.values, lists.leaving, pages.listed, pages.keys, pages.values, pages.table,
        pages.table.shape[-1], room, DIM=dim, VALUE_DIM=value_dim,
        BLOCK_D=triton.next_power_of_2(max(dim, value_dim)), PAGE=PAGE,
    )
    # fmt: on


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
    lists: Lists | None = None,
) -> torch.Tensor:
    """As `retain_reference.prefill`, which it calls for gradients, dropout, and scores without a kernel.

    A tile of queries walks a prefix of its group's list, then its window: there is no mask of pairs.

    Args:
        lists: what `compact` gave of these tokens, where it is known already.
    """
    form = KernelScores() if scores is None else scores.for_kernels
    tensors = (query, key, value, *(() if form is None or form.by_head is None else (form.by_head,)))
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if form is None or dropout > 0 or trained:
        options: dict[str, Any] = {"scale": scale, "dropout": dropout, "scores": scores}
        return reference_prefill(query, key, value, kept, spans, rows=rows, pages=pages, **options)
    rows = rows or Rows.whole(query.shape[0], query.shape[2])
    out, _ = forward(
        query if query.stride(-1) == 1 else query.contiguous(),
        key,
        value,
        spans,
        rows.tensor(query.device),
        not rows.is_whole(query.shape[2]),
        None if pages is None else (pages.keys, pages.values, pages.table),
        query.shape[-1] ** -0.5 if scale is None else scale,
        keep_lse=False,
        cap=form.cap,
        extra=form.by_head,
        score=form.score,
        lists=compact(key, value, kept, spans, rows, pages) if lists is None else lists,
    )
    return out


def decode(
    query: torch.Tensor,
    pages: ListedPages,
    lengths: torch.Tensor,
    spans: Sequence[Span],
    *,
    scale: float | None = None,
    scores: Scores | None = None,
) -> torch.Tensor:
    """As `retain_reference.decode`: list and window are one list of pages, which programs share evenly."""
    if (scores is not None and scores.for_kernels is None) or not pages.table.shape[-1]:
        return reference_decode(query, pages, lengths, spans, scale=scale, scores=scores)
    lists = (pages.listed, pages.offset, pages.rings)
    out: torch.Tensor = paged_decode(query, pages, lengths, spans, scale=scale, scores=scores, lists=lists)
    return out


KERNELS = (prefill, decode, compact, append)
