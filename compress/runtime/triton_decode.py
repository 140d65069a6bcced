"""Decode attention of a planned layer in Triton: one token per sequence over pages, the work split evenly."""

from __future__ import annotations

from collections.abc import Sequence

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels need Triton; without it attention runs in plain PyTorch") from error

from .pages import Pages
from .scores import Scores
from .span import PAGE, Span
from .triton_span import first_key, span_rules, tanh
from .tuned import decode_config

LOG2E = 1.4426950408889634
NEVER = tl.constexpr(-1.0e30)  # running maximum before any key; finite, so that no NaN arises


@triton.jit
def _bounds(length, sink, alpha, beta, PAGE: tl.constexpr):
    """`span.page_bounds`: end of the sink's pages, start and end of the window's."""
    end = (length + PAGE - 1) // PAGE
    sinks = (tl.minimum(sink, length) + PAGE - 1) // PAGE
    start = tl.maximum(tl.minimum(first_key(length - 1, alpha, beta) // PAGE, end), sinks)
    return sinks, start, end


@triton.jit
def _work(
    lengths_ptr,
    rules_ptr,
    segments,
    most,
    GROUPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PAGE: tl.constexpr,
    FEWEST: tl.constexpr,
):
    """Pages of every segment, a (sequence, group), and how many of `most` programs share them.

    Program p walks pages [pages * p // programs, pages * (p + 1) // programs) of all segments in a row.
    """
    every = tl.arange(0, BLOCK_S)
    known = every < segments
    group = every % GROUPS
    length = tl.load(lengths_ptr + every // GROUPS, mask=known, other=0)
    sink = tl.load(rules_ptr + group * 3)
    alpha = tl.load(rules_ptr + group * 3 + 1)
    beta = tl.load(rules_ptr + group * 3 + 2)
    sinks, start, end = _bounds(length, sink, alpha, beta, PAGE)
    counts = tl.where(known & (length > 0), sinks + end - start, 0)
    pages = tl.sum(counts, 0).to(tl.int64)
    programs = tl.minimum((pages + FEWEST - 1) // FEWEST, most)  # each has a page, so each arrives
    return sinks, start, counts, pages, programs


@triton.jit
def _decode(
    query_ptr,  # [B, H, D]
    key_pages_ptr,  # [places, PAGE, D]
    value_pages_ptr,
    table_ptr,  # [B, G, numbers] int32
    lengths_ptr,  # [B] int32, 0 where a sequence takes no part
    rules_ptr,  # [G, 3] int32: sink, alpha, beta units
    extra_ptr,  # [H] the extra logit of every query head, where EXTRA
    out_ptr,  # [B, H, D]
    parts_ptr,  # [programs, 2, SHARE, BLOCK_V] float32: what a program saw of a segment that it shares with others
    stats_ptr,  # [programs, 2, 2, SHARE] float32: its running maximum and total
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
    PRECISION: tl.constexpr,
):
    """A program walks an equal share of all pages; what it sees of a (sequence, group) is a piece.

    A piece that is a whole segment is written at once; `_join` puts together those that programs share.
    """
    if OVERLAP:  # lets the join take its place while this launch runs; it waits for all of it
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    every = tl.arange(0, BLOCK_S)
    sinks, start, counts, pages, programs = _work(
        lengths_ptr, rules_ptr, segments, tl.num_programs(0), GROUPS, BLOCK_S, PAGE, FEWEST
    )
    if program >= programs:
        return
    ends = tl.cumsum(counts, 0)
    at = (pages * program // programs).to(tl.int32)
    stop = (pages * (program + 1) // programs).to(tl.int32)
    mine = at

    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_V)
    slots = tl.arange(0, PAGE)
    real = (rows < SHARE)[:, None]
    while at < stop:
        s = tl.sum((ends <= at).to(tl.int32), 0)
        this = every == s
        seg_end = tl.sum(tl.where(this, ends, 0), 0)
        seg_start = seg_end - tl.sum(tl.where(this, counts, 0), 0)
        b = s // GROUPS
        g = s % GROUPS
        n_tokens = tl.load(lengths_ptr + b)
        sink_g = tl.load(rules_ptr + g * 3)
        first = first_key(n_tokens - 1, tl.load(rules_ptr + g * 3 + 1), tl.load(rules_ptr + g * 3 + 2))
        sinks_g = tl.sum(tl.where(this, sinks, 0), 0)
        skip = tl.sum(tl.where(this, start, 0), 0) - sinks_g
        piece_end = tl.minimum(stop, seg_end)
        head = g * SHARE + rows
        query = tl.load(
            query_ptr + b.to(tl.int64) * query_b + head[:, None] * query_h + dims[None, :],
            mask=real & (dims < DIM)[None, :],
            other=0.0,
        )
        held = table_ptr + s.to(tl.int64) * numbers
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        top = tl.full([BLOCK_M], NEVER, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        if EXTRA:  # counted once, by the piece that the segment starts with
            logit = tl.load(extra_ptr + head, mask=rows < SHARE, other=0.0).to(tl.float32) * 1.4426950408889634
            top = tl.where(at == seg_start, logit, NEVER)
            total += tl.where(at == seg_start, 1.0, 0.0)
        for i in tl.range(at - seg_start, piece_end - seg_start, num_stages=STAGES):
            number = tl.where(i < sinks_g, i, i + skip)
            place = tl.load(held + number).to(tl.int64)
            j = number * PAGE + slots
            seen = (j < n_tokens) & ((j < sink_g) | (j >= first))
            # Slots that hold no visible token may hold anything, NaN included.
            key = tl.load(
                key_pages_ptr + place * PAGE * DIM + slots[:, None] * DIM + dims[None, :],
                mask=seen[:, None] & (dims < DIM)[None, :],
                other=0.0,
            )
            value = tl.load(
                value_pages_ptr + place * PAGE * VALUE_DIM + slots[:, None] * VALUE_DIM + value_dims[None, :],
                mask=seen[:, None] & (value_dims < VALUE_DIM)[None, :],
                other=0.0,
            )
            score = tl.dot(query, key.T, input_precision=PRECISION)
            if CAPPED:
                score = tanh(score * to_cap)
            score = tl.where(seen[None, :], score, float("-inf"))
            best = tl.maximum(top, tl.max(score, 1) * scale)
            weight = tl.exp2(score * scale - best[:, None])
            shrink = tl.exp2(top - best)
            acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
            total = total * shrink + tl.sum(weight, 1)
            top = best
        out_at = out_ptr + b.to(tl.int64) * out_b + head[:, None] * out_h + value_dims[None, :]
        keep = real & (value_dims < VALUE_DIM)[None, :]
        if (at == seg_start) & (piece_end == seg_end):
            tl.store(out_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=keep)
        else:
            # Slot 0: the segment went on from the program before, or starts where this program starts.
            part = program * 2 + (at != mine).to(tl.int32)
            spot = part * SHARE + rows
            tl.store(parts_ptr + spot[:, None] * BLOCK_V + value_dims[None, :], acc, mask=real)
            tl.store(stats_ptr + part * 2 * SHARE + rows, top, mask=rows < SHARE)
            tl.store(stats_ptr + (part * 2 + 1) * SHARE + rows, total, mask=rows < SHARE)
        at = piece_end


@triton.jit
def _join(
    out_ptr,
    parts_ptr,
    stats_ptr,
    lengths_ptr,
    rules_ptr,
    segments,
    most,
    out_b,
    out_h,
    SHARE: tl.constexpr,
    GROUPS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PAGE: tl.constexpr,
    FEWEST: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """BLOCK_C numbers of one head: the pieces that several programs left, joined in the order of the pages."""
    s = tl.program_id(0)
    h = tl.program_id(1)
    every = tl.arange(0, BLOCK_S)
    # None of this is a result of `_decode`, so it is known before that has ended.
    _, _, counts, pages, programs = _work(lengths_ptr, rules_ptr, segments, most, GROUPS, BLOCK_S, PAGE, FEWEST)
    start = tl.sum(tl.where(every < s, counts, 0), 0).to(tl.int64)
    count = tl.sum(tl.where(every == s, counts, 0), 0)
    dims = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    out = out_ptr + (s // GROUPS).to(tl.int64) * out_b + ((s % GROUPS) * SHARE + h) * out_h
    if count == 0:  # a sequence that takes no part
        tl.store(out + dims, tl.zeros([BLOCK_C], out_ptr.dtype.element_ty), mask=dims < VALUE_DIM)
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
        p = base + tl.arange(0, BLOCK_R)
        ok = p <= last
        part = p * 2 + tl.where(p == one, first_slot, 0)
        tops = tl.load(stats_ptr + part * 2 * SHARE + h, mask=ok, other=NEVER)
        totals = tl.load(stats_ptr + (part * 2 + 1) * SHARE + h, mask=ok, other=0.0)
        at = (part * SHARE + h)[:, None] * BLOCK_V + dims[None, :]
        piece = tl.load(parts_ptr + at, mask=ok[:, None], other=0.0)
        best = tl.maximum(top, tl.max(tops, 0))
        shrink = tl.exp2(top - best)
        weight = tl.exp2(tops - best)
        acc = acc * shrink + tl.sum(piece * weight[:, None], 0)
        total = total * shrink + tl.sum(totals * weight, 0)
        top = best
    tl.store(out + dims, (acc / total).to(out_ptr.dtype.element_ty), mask=dims < VALUE_DIM)


def decode(
    query: torch.Tensor,
    pages: Pages,
    lengths: torch.Tensor,
    spans: Sequence[Span],
    *,
    scale: float | None = None,
    scores: Scores | None = None,
) -> torch.Tensor:
    """As `reference.decode`, in two launches whatever the lengths. No host sync, so a CUDA graph can hold it."""
    batch, heads, dim = query.shape
    groups = len(spans)
    value_dim = pages.values.shape[-1]
    share = heads // groups
    config = decode_config(dim, query.device)
    programs, overlap = config["programs"], config["overlap"]
    block_v = max(16, triton.next_power_of_2(value_dim))
    block_s = max(16, triton.next_power_of_2(batch * groups))
    parts, stats = workspace(query.device, programs * 2 * share, block_v)
    rules = span_rules(tuple(spans), query.device)
    out = query.new_empty(batch, heads, value_dim)
    scale = dim**-0.5 if scale is None else scale
    cap, extra = (None, None) if scores is None else (scores.cap, scores.extra)
    _decode[(programs,)](
        query,
        pages.keys,
        pages.values,
        pages.table,
        lengths,
        rules,
        rules if extra is None else extra,
        out,
        parts,
        stats,
        batch * groups,
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
        EXTRA=extra is not None,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=config["warps"],
    )
    # As many pieces at once as a segment has when half of the segments hold nearly all pages.
    pieces = max(16, min(256, triton.next_power_of_2(2 * programs // (batch * groups))))
    columns = min(block_v, config["columns"])
    _join[(batch * groups, share, triton.cdiv(value_dim, columns))](
        out,
        parts,
        stats,
        lengths,
        rules,
        batch * groups,
        programs,
        out.stride(0),
        out.stride(1),
        SHARE=share,
        GROUPS=groups,
        VALUE_DIM=value_dim,
        BLOCK_V=block_v,
        BLOCK_S=block_s,
        BLOCK_R=pieces,
        BLOCK_C=columns,
        PAGE=PAGE,
        FEWEST=config["fewest"],
        OVERLAP=overlap,
        num_warps=4,
        **({"launch_pdl": True} if overlap else {}),
    )
    return out


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
