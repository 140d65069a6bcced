"""Decode attention of a planned layer in Triton: one token per sequence over pages, the work split evenly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels need Triton; without it attention runs in plain PyTorch") from error

from .pages import Pages
from .reference import check_active
from .reference import decode as reference_decode
from .scores import KernelScores, Scores
from .span import PAGE, Span
from .triton_scores import LN2, row_shift, unnormed
from .triton_span import first_key, load_block, load_rule, span_rules, store_block, tanh
from .tuned import decode_config

LOG2E = 1.4426950408889634
NEVER = tl.constexpr(-1.0e30)  # running maximum before any key; finite, so that no NaN arises


@triton.jit
def _bounds(length, sink, alpha, beta, mask, PAGE: tl.constexpr):
    """`span.page_bounds`: end of the sink's pages, start and end of the window's."""
    end = (length + PAGE - 1) // PAGE
    sinks = (tl.minimum(sink, length) + PAGE - 1) // PAGE
    start = tl.maximum(tl.minimum(first_key(length - 1, alpha, beta, mask) // PAGE, end), sinks)
    return sinks, start, end


@triton.jit
def _list_bounds(length, listed, offset, alpha, beta, mask, PAGE: tl.constexpr):
    """The same of a table whose first `offset` pages hold a list of so many tokens in the place of a sink."""
    end = (length + PAGE - 1) // PAGE
    start = tl.minimum(first_key(length - 1, alpha, beta, mask) // PAGE, end)
    return (listed + PAGE - 1) // PAGE, offset + start, offset + end


@triton.jit
def _work(
    p_lengths,  # [B] int32
    p_rules,  # [G, 4] int32
    p_active,  # [B, G] uint8 with ACTIVE 1, [B, H] with ACTIVE 2, None with ACTIVE 0
    p_listed,  # [B, G] int32 tokens in a list before the window, where LISTED; else None
    offset,  # pages of the table before those of the window, where LISTED; else None
    segments,
    most,
    SHARE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PAGE: tl.constexpr,
    FEWEST: tl.constexpr,
    ACTIVE: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Pages of every segment, a (sequence, group), and how many of `most` programs share them.

    End of the sink's pages, start of the window's and the number of both, `[BLOCK_S]` each; all pages; the programs.
    Program p walks pages [pages * p // programs, pages * (p + 1) // programs) of all segments in a row. A segment
    whose heads are all off has no pages.
    """
    every = tl.arange(0, BLOCK_S)
    known = every < segments
    group = every % GROUPS
    length = tl.load(p_lengths + every // GROUPS, mask=known, other=0)
    sink, alpha, beta, mask = load_rule(p_rules, group)
    if LISTED:
        listed = tl.load(p_listed + every, mask=known, other=0)
        sinks, start, end = _list_bounds(length, listed, offset, alpha, beta, mask, PAGE)
    else:
        sinks, start, end = _bounds(length, sink, alpha, beta, mask, PAGE)
    counts = tl.where(known & (length > 0), sinks + end - start, 0)
    if ACTIVE == 1:
        counts = tl.where(tl.load(p_active + every, mask=known, other=0) != 0, counts, 0)
    elif ACTIVE == 2:
        o_row = tl.arange(0, BLOCK_M)
        # [BLOCK_S, BLOCK_M]
        o_head = every[:, None] * SHARE + o_row[None, :]
        b_active = tl.load(p_active + o_head, mask=known[:, None] & (o_row < SHARE)[None, :], other=0)
        counts = tl.where(tl.max(b_active.to(tl.int32), 1) != 0, counts, 0)
    pages = tl.sum(counts, 0).to(tl.int64)
    programs = tl.minimum((pages + FEWEST - 1) // FEWEST, most)  # each has a page, so each arrives
    return sinks, start, counts, pages, programs


@triton.jit
def _count(
    p_ends,  # [segments] int32
    p_lengths,  # as in `_work`, and so is all else
    p_rules,
    p_active,
    segments,
    SHARE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PAGE: tl.constexpr,
    FEWEST: tl.constexpr,
    ACTIVE: tl.constexpr,
):
    """Pages of all segments up to each, itself included: of many segments, no other program has to find them again."""
    every = tl.arange(0, BLOCK_S)
    _, _, counts, _, _ = _work(
        p_lengths, p_rules, p_active, None, 0, segments, 1, SHARE, GROUPS, BLOCK_M, BLOCK_S, PAGE, FEWEST, ACTIVE,
        False,
    )  # fmt: skip
    tl.store(p_ends + every, tl.cumsum(counts, 0), mask=every < segments)


@triton.jit
def _counted(p_ends, segments, most, FEWEST: tl.constexpr):
    """All pages and the programs that share them, as of `_work`, from what `_count` found."""
    pages = tl.load(p_ends + segments - 1).to(tl.int64)
    return pages, tl.minimum((pages + FEWEST - 1) // FEWEST, most)


@triton.jit(do_not_specialize=["offset", "places"])
def _decode(
    p_query,  # [B, H, D]
    p_key_pages,  # [places, PAGE, D]
    p_value_pages,  # [places, PAGE, DV]
    p_table,  # [B, G, numbers] int32
    p_lengths,  # [B] int32, 0 where a sequence takes no part
    p_rules,  # [G, 4] int32: sink, alpha, beta units, mask
    p_extra,  # [H] the extra logit of every query head, where EXTRA; its bias with SCORE 1 and 2
    p_active,  # [B, G] uint8 with ACTIVE 1, [B, H] with ACTIVE 2: what is on; None with ACTIVE 0
    p_gates,  # float32 of the same shape, factors on the outputs, where GATED
    p_listed,  # as in `_work`, and so is the offset
    p_ends,  # [segments] int32 of `_count`, where COUNTED
    p_rings,  # [G, 3] int32, where RING, from which places follow: no program waits for the table before its first keys
    places,  # of a sequence, where RING
    offset,
    p_out,  # [B, H, DV]
    p_parts,  # [programs, 2, SHARE, BLOCK_V] float32: what a program saw of a segment that it shares with others
    p_stats,  # [programs, 2, 2, SHARE] float32: its running maximum and total
    p_lse,  # [B, H] float32, the natural log-sum-exp, where KEEP_LSE
    segments,
    numbers,
    scale,
    to_cap,  # factor on the scores before the cap, where CAPPED
    query_b,
    query_h,
    out_b,
    out_h,
    SHARE: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PAGE: tl.constexpr,
    FEWEST: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
    CAPPED: tl.constexpr,
    EXTRA: tl.constexpr,
    SCORE: tl.constexpr,
    ACTIVE: tl.constexpr,
    GATED: tl.constexpr,
    LISTED: tl.constexpr,
    COUNTED: tl.constexpr,
    RING: tl.constexpr,
    KEEP_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program walks an equal share of all pages; what it sees of a (sequence, group) is a piece.

    A piece that is a whole segment is written at once; `_join` puts together those that programs share.
    """
    if OVERLAP:
        if LISTED:  # this launch took its place while the one that stores the token ran
            tl.extra.cuda.gdc_wait()
        # Lets the join take its place while this launch runs; it waits for all of it.
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    every = tl.arange(0, BLOCK_S)
    most = tl.num_programs(0)
    if COUNTED:
        pages, programs = _counted(p_ends, segments, most, FEWEST)
    else:
        sinks, start, counts, pages, programs = _work(
            p_lengths, p_rules, p_active, p_listed, offset, segments, most, SHARE, GROUPS, BLOCK_M, BLOCK_S, PAGE,
            FEWEST, ACTIVE, LISTED,
        )  # fmt: skip
    if program >= programs:
        return
    if RING:
        # [BLOCK_S]
        p_ring = p_rings + every % GROUPS * 3
        list_place = every // GROUPS * places + tl.load(p_ring)
        window_place = every // GROUPS * places + tl.load(p_ring + 1)
        ring = tl.load(p_ring + 2)
    at = (pages * program // programs).to(tl.int32)
    stop = (pages * (program + 1) // programs).to(tl.int32)
    mine = at
    if COUNTED:
        s = tl.sum((tl.load(p_ends + every, mask=every < segments, other=stop) <= at).to(tl.int32), 0)
    else:
        ends = tl.cumsum(counts, 0)

    o_row = tl.arange(0, BLOCK_M)  # query heads of a group
    m_row = o_row < SHARE
    o_slot = tl.arange(0, PAGE)
    while at < stop:
        if COUNTED:
            while tl.load(p_ends + s) <= at:  # the last one is done, and others have no pages
                s += 1
            seg_end = tl.load(p_ends + s)
            seg_start = tl.load(p_ends + s - 1, mask=s > 0, other=0)
        else:
            s = tl.sum((ends <= at).to(tl.int32), 0)
            this = every == s
            seg_end = tl.sum(tl.where(this, ends, 0), 0)
            seg_start = seg_end - tl.sum(tl.where(this, counts, 0), 0)
        b = s // GROUPS
        g = s % GROUPS
        n_tokens = tl.load(p_lengths + b)
        sink, alpha, beta, mask = load_rule(p_rules, g)
        first = first_key(n_tokens - 1, alpha, beta, mask)
        if LISTED:  # from here on by slots of the table
            sink = tl.load(p_listed + s)
            first += offset * PAGE
            n_tokens += offset * PAGE
        if COUNTED:
            sinks_g, start_g, _ = _bounds(n_tokens, sink, alpha, beta, mask, PAGE)
        else:
            sinks_g = tl.sum(tl.where(this, sinks, 0), 0)
            start_g = tl.sum(tl.where(this, start, 0), 0)
        skip = start_g - sinks_g
        piece_end = tl.minimum(stop, seg_end)
        head = g * SHARE + o_row
        # [BLOCK_M, BLOCK_D]
        b_query = load_block(p_query + b.to(tl.int64) * query_b, head * query_h, m_row, DIM, BLOCK_D)
        p_held = p_table + s.to(tl.int64) * numbers
        if RING:
            list_place_g = tl.sum(tl.where(this, list_place, 0), 0)
            window_place_g = tl.sum(tl.where(this, window_place, 0), 0)
            ring_g = tl.sum(tl.where(this, ring, 0), 0)
        # [BLOCK_M, BLOCK_V], [BLOCK_M], [BLOCK_M]
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        top = tl.full([BLOCK_M], NEVER, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        if EXTRA:  # counted once, by the piece that the segment starts with
            logit = tl.load(p_extra + head, mask=m_row, other=0.0).to(tl.float32) * 1.4426950408889634
            top = tl.where(at == seg_start, logit, NEVER)
            total += tl.where(at == seg_start, 1.0, 0.0)
        shift = row_shift(p_extra, head, m_row, n_tokens - 1, first, sink, SCORE)
        if SCORE != 0:  # pieces add up as they are: the maximum is 0, and the total of a sigmoid is counted once
            top = tl.zeros([BLOCK_M], tl.float32)
            if SCORE != 3:
                total += tl.where(at == seg_start, 1.0, 0.0)
        for i in tl.range(at - seg_start, piece_end - seg_start, num_stages=STAGES):
            number = tl.where(i < sinks_g, i, i + skip)
            if RING:
                in_window = window_place_g + tl.maximum(number - offset, 0) % ring_g
                place = tl.where(i < sinks_g, list_place_g + i, in_window).to(tl.int64)
            else:
                place = tl.load(p_held + number).to(tl.int64)
            # [PAGE], [PAGE, BLOCK_D], [PAGE, BLOCK_V]
            j = number * PAGE + o_slot
            m_seen = (j < n_tokens) & ((j < sink) | (j >= first))
            # Slots that hold no visible token may hold anything, NaN included.
            b_key = load_block(p_key_pages + place * PAGE * DIM, o_slot * DIM, m_seen, DIM, BLOCK_D)
            p_values = p_value_pages + place * PAGE * VALUE_DIM
            b_value = load_block(p_values, o_slot * VALUE_DIM, m_seen, VALUE_DIM, BLOCK_V)
            # [BLOCK_M, PAGE]
            b_score = tl.dot(b_query, b_key.T, input_precision=PRECISION)
            if SCORE == 0:
                if CAPPED:
                    b_score = tanh(b_score * to_cap)
                b_score = tl.where(m_seen[None, :], b_score, float("-inf"))
                b_best = tl.maximum(top, tl.max(b_score, 1) * scale)
                b_weight = tl.exp2(b_score * scale - b_best[:, None])
                b_shrink = tl.exp2(top - b_best)
                acc = tl.dot(b_weight.to(b_value.dtype), b_value, acc * b_shrink[:, None], input_precision=PRECISION)
                total = total * b_shrink + tl.sum(b_weight, 1)
                top = b_best
            else:
                b_weight = tl.where(m_seen[None, :], unnormed(b_score * scale + shift[:, None], SCORE), 0.0)
                acc = tl.dot(b_weight.to(b_value.dtype), b_value, acc, input_precision=PRECISION)
                if SCORE == 3:
                    total += tl.sum(b_weight, 1)
        if (at == seg_start) & (piece_end == seg_end):
            p_row = p_out + b.to(tl.int64) * out_b
            if ACTIVE == 2:
                m_on = tl.load(p_active + s * SHARE + o_row, mask=m_row, other=0) != 0
                acc = tl.where(m_on[:, None], acc, 0.0)
                top = tl.where(m_on, top, float("-inf"))
            if GATED:
                if ACTIVE == 2:
                    acc *= tl.load(p_gates + s * SHARE + o_row, mask=m_row, other=0.0)[:, None]
                else:
                    acc *= tl.load(p_gates + s)
            store_block(p_row, head * out_h, acc / total[:, None], m_row, VALUE_DIM, BLOCK_V)
            if KEEP_LSE:
                tl.store(p_lse + b * GROUPS * SHARE + head, (top + tl.log2(total)) * LN2, mask=m_row)
        else:
            # Slot 0: the segment went on from the program before, or starts where this program starts.
            part = program * 2 + (at != mine).to(tl.int32)
            store_block(p_parts, (part * SHARE + o_row) * BLOCK_V, acc, m_row, BLOCK_V, BLOCK_V)
            tl.store(p_stats + part * 2 * SHARE + o_row, top, mask=m_row)
            tl.store(p_stats + (part * 2 + 1) * SHARE + o_row, total, mask=m_row)
        at = piece_end


@triton.jit(do_not_specialize=["offset"])
def _join(
    p_out,  # [B, H, DV]
    p_parts,  # [programs, 2, SHARE, BLOCK_V] float32
    p_stats,  # [programs, 2, 2, SHARE] float32
    p_lse,  # [B, H] float32, where KEEP_LSE
    p_lengths,  # [B] int32
    p_rules,  # [G, 4] int32
    p_active,  # as in `_decode`, and so are the gates and the lists
    p_gates,
    p_listed,
    p_ends,
    offset,
    segments,
    most,
    out_b,
    out_h,
    SHARE: tl.constexpr,
    GROUPS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PAGE: tl.constexpr,
    FEWEST: tl.constexpr,
    OVERLAP: tl.constexpr,
    ACTIVE: tl.constexpr,
    GATED: tl.constexpr,
    LISTED: tl.constexpr,
    COUNTED: tl.constexpr,
    KEEP_LSE: tl.constexpr,
):
    """BLOCK_C numbers of one head: the pieces that several programs left, joined in the order of the pages."""
    s = tl.program_id(0)
    h = tl.program_id(1)
    if OVERLAP:  # noqa: SIM102  # known when this is compiled
        # Also where nothing is to be joined this launch may not end before `_decode` has, because what comes next waits
        # for this one.
        if (s == 0) & (h == 0) & (tl.program_id(2) == 0):
            tl.extra.cuda.gdc_wait()
    # None of this is a result of `_decode`, so it is known before that has ended.
    if COUNTED:
        pages, programs = _counted(p_ends, segments, most, FEWEST)
        start = tl.load(p_ends + s - 1, mask=s > 0, other=0).to(tl.int64)
        count = (tl.load(p_ends + s) - start).to(tl.int32)
    else:
        every = tl.arange(0, BLOCK_S)
        _, _, counts, pages, programs = _work(
            p_lengths, p_rules, p_active, p_listed, offset, segments, most, SHARE, GROUPS, BLOCK_M, BLOCK_S, PAGE,
            FEWEST, ACTIVE, LISTED,
        )  # fmt: skip
        start = tl.sum(tl.where(every < s, counts, 0), 0).to(tl.int64)
        count = tl.sum(tl.where(every == s, counts, 0), 0)
    # [BLOCK_C]
    o_dims = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    p_row = p_out + (s // GROUPS).to(tl.int64) * out_b + ((s % GROUPS) * SHARE + h) * out_h
    p_total = p_lse + (s // GROUPS) * GROUPS * SHARE + (s % GROUPS) * SHARE + h
    nothing = count == 0  # a sequence that takes no part, or heads that are off
    if ACTIVE == 2:
        nothing = nothing | (tl.load(p_active + s * SHARE + h) == 0)
    if nothing:
        if KEEP_LSE:
            tl.store(p_total, float("-inf"))
        tl.store(p_row + o_dims, tl.zeros([BLOCK_C], p_out.dtype.element_ty), mask=o_dims < VALUE_DIM)
        return
    one = (((start + 1) * programs - 1) // pages).to(tl.int32)  # the programs that walk the first and the last page
    last = (((start + count) * programs - 1) // pages).to(tl.int32)
    if one == last:
        return
    # Slot 0 holds the piece that starts where its program starts; only the first can start later.
    first_slot = (pages * one // programs < start).to(tl.int32)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BLOCK_C], tl.float32)
    top = tl.full([1], NEVER, tl.float32)
    total = tl.zeros([1], tl.float32)
    for base in range(one, last + 1, BLOCK_R):
        # [BLOCK_R]
        p = base + tl.arange(0, BLOCK_R)
        m_p = p <= last
        part = p * 2 + tl.where(p == one, first_slot, 0)
        b_tops = tl.load(p_stats + part * 2 * SHARE + h, mask=m_p, other=NEVER)
        b_totals = tl.load(p_stats + (part * 2 + 1) * SHARE + h, mask=m_p, other=0.0)
        # [BLOCK_R, BLOCK_C]
        o_parts = (part * SHARE + h)[:, None] * BLOCK_V + o_dims[None, :]
        b_parts = tl.load(p_parts + o_parts, mask=m_p[:, None], other=0.0)
        b_best = tl.maximum(top, tl.max(b_tops, 0))
        b_shrink = tl.exp2(top - b_best)
        b_weight = tl.exp2(b_tops - b_best)
        acc = acc * b_shrink + tl.sum(b_parts * b_weight[:, None], 0)
        total = total * b_shrink + tl.sum(b_totals * b_weight, 0)
        top = b_best
    if GATED:
        acc *= tl.load(p_gates + (s * SHARE + h if ACTIVE == 2 else s))
    tl.store(p_row + o_dims, (acc / total).to(p_out.dtype.element_ty), mask=o_dims < VALUE_DIM)
    if KEEP_LSE:  # the same number from all programs of a head
        tl.store(p_total, tl.sum((top + tl.log2(total)) * LN2, 0))


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
    lists: tuple[torch.Tensor, int, tuple[torch.Tensor, int] | None] | None = None,
) -> Any:
    """As `reference.decode`, in two launches whatever the lengths, and in three where sequences and groups are many. No
    host sync, so a CUDA graph can hold it.

    Scores that the kernels do not have go to the reference.

    Args:
        lists: of a table whose first pages are a list of tokens, which are all seen, how many tokens those are,
            `[B, G]` int32, how many pages, and what places follow from instead of the table, as of
            `retain_state.ListedPages.rings`, or None; the spans have no sinks then. None without.
    """
    batch, heads, dim = query.shape
    groups = len(spans)
    value_dim = pages.values.shape[-1]
    share = heads // groups
    listed, offset, rings = (None, None, None) if lists is None else lists
    config = decode_config(dim, query.device, batch * groups * (offset or 0), rings is not None)
    programs, overlap = config["programs"], config["overlap"]
    block_v = max(16, triton.next_power_of_2(value_dim))
    segments = batch * groups
    block_s = max(16, triton.next_power_of_2(segments))
    parts, stats = workspace(query.device, programs * 2 * share, block_v)
    rules = span_rules(tuple(spans), query.device)
    out = query.new_empty(batch, heads, value_dim)
    lse = query.new_empty(batch, heads, dtype=torch.float32) if keep_lse else stats
    scale = dim**-0.5 if scale is None else scale
    form = KernelScores() if scores is None else scores.for_kernels
    if form is None:
        return reference_decode(
            query, pages, lengths, spans, scale=scale, scores=scores, keep_lse=keep_lse, active=active, gates=gates
        )
    cap, extra = form.cap, form.by_head
    flags, unit = None, 0
    if active is not None:
        check_active(active, heads, groups, gates)
        flags, unit = active.contiguous().view(torch.uint8), 1 if active.shape[1] == groups else 2
        gates = None if gates is None else gates.contiguous()
    counted = lists is None and segments > config["found"]
    ends = torch.empty(segments, dtype=torch.int32, device=query.device) if counted else None
    if counted:
        _count[(1,)](
            ends,
            lengths,
            rules,
            flags,
            segments,
            SHARE=share,
            GROUPS=groups,
            BLOCK_M=max(16, triton.next_power_of_2(share)),
            BLOCK_S=block_s,
            PAGE=PAGE,
            FEWEST=config["fewest"],
            ACTIVE=unit,
            num_warps=max(4, min(16, block_s // 256)),
        )
    _decode[(programs,)](
        query,
        pages.keys,
        pages.values,
        pages.table,
        lengths,
        rules,
        rules if extra is None else extra,
        flags,
        gates,
        listed,
        ends,
        *((None, None) if rings is None else rings),
        offset,
        out,
        parts,
        stats,
        lse,
        segments,
        pages.table.shape[-1],
        (scale if cap is None else cap) * LOG2E,
        0.0 if cap is None else scale / cap,
        query.stride(0),
        query.stride(1),
        out.stride(0),
        out.stride(1),
        SHARE=share,
        GROUPS=groups,
        DIM=dim,
        VALUE_DIM=value_dim,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        BLOCK_V=block_v,
        BLOCK_M=max(16, triton.next_power_of_2(share)),
        BLOCK_S=block_s,
        PAGE=PAGE,
        FEWEST=config["fewest"],
        STAGES=config["stages"],
        OVERLAP=overlap,
        CAPPED=cap is not None,
        EXTRA=extra is not None and form.score == 0,
        SCORE=form.score,
        ACTIVE=unit,
        GATED=gates is not None,
        LISTED=lists is not None,
        COUNTED=counted,
        RING=rings is not None,
        KEEP_LSE=keep_lse,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=config["warps"],
        **({"launch_pdl": True} if overlap and lists is not None else {}),
        **({"maxnreg": config["registers"]} if "registers" in config else {}),
    )
    # As many pieces at once as a segment has when half of the segments hold nearly all pages.
    pieces = max(16, min(256, triton.next_power_of_2(2 * programs // segments)))
    columns = min(block_v, config["columns"])
    _join[(segments, share, triton.cdiv(value_dim, columns))](
        out,
        parts,
        stats,
        lse,
        lengths,
        rules,
        flags,
        gates,
        listed,
        ends,
        offset,
        segments,
        programs,
        out.stride(0),
        out.stride(1),
        SHARE=share,
        GROUPS=groups,
        VALUE_DIM=value_dim,
        BLOCK_V=block_v,
        BLOCK_M=max(16, triton.next_power_of_2(share)),
        BLOCK_S=block_s,
        BLOCK_R=pieces,
        BLOCK_C=columns,
        PAGE=PAGE,
        FEWEST=config["fewest"],
        OVERLAP=overlap,
        ACTIVE=unit,
        GATED=gates is not None,
        LISTED=lists is not None,
        COUNTED=counted,
        KEEP_LSE=keep_lse,
        num_warps=1 if counted else 4,  # of many segments most were written at once, and their programs end here
        **({"launch_pdl": True} if overlap else {}),
    )
    return (out, lse) if keep_lse else out


_WORKSPACES: dict[tuple[torch.device, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}


def workspace(device: torch.device, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What programs hand to the join behind them: `rows` pieces of `width`, and their maxima and totals, float32.

    One per device and stream, where launches queue. A larger one is added when one is too small; the smaller stays,
    because a captured CUDA graph may point to it.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    spaces = _WORKSPACES.setdefault((device, stream), [])
    for parts, stats in spaces:
        if parts.numel() >= rows * width and stats.numel() >= rows * 2:
            return parts, stats
    spaces.append(
        (
            torch.empty(rows * width, dtype=torch.float32, device=device),
            torch.empty(rows * 2, dtype=torch.float32, device=device),
        )
    )
    return spaces[-1]
