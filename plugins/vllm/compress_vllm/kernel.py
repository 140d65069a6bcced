"""Attention by a span rule on an engine's blocks in Triton: one kernel for prompts, chunks of them and single tokens.

What `plain.py` computes. A program takes some queries of one request and one head group, and reads the blocks that the
first of them to the last see: those of the sink, and those from the window's edge on. Nothing is asked of the device
before a launch, and no shape depends on the lengths, so that a step of single tokens can be captured in a CUDA graph.
Where programs would be too few to fill a GPU, the keys of a query are split into segments, which a second kernel adds
up (as in flash decoding, https://arxiv.org/abs/2311.01282).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from compress_vllm.rule import Rule

PROGRAMS = 264  # two for each multiprocessor of an H100
SEGMENTS = 16  # the most
BETA_UNIT = tl.constexpr(1024)


@triton.jit
def _first(t, alpha, beta, granule):
    """The first key of a window, as `Rule.first`; t is one position or several."""
    t = t & -granule
    # (t + 1) beta // 1024 in parts, which 32 bits can hold.
    grown = (t + 1) // BETA_UNIT * beta + (t + 1) % BETA_UNIT * beta // BETA_UNIT
    window = tl.maximum(alpha + grown, 1)
    return tl.maximum(t + 1 - window, 0) & -granule


@triton.jit
def _request_of(starts_ptr, requests, place, QUERIES: tl.constexpr):
    """The request whose queries program `place` takes: that of the last r with starts[r] // QUERIES + r <= place."""
    low, high = 0, requests
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts_ptr + middle) // QUERIES + middle <= place:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit(do_not_specialize=["sink", "alpha", "beta", "granule", "requests"])
def _attend_kernel(
    out_ptr,
    partial_ptr,
    sums_ptr,
    query_ptr,
    cache_ptr,
    table_ptr,
    starts_ptr,
    lengths_ptr,
    extra_ptr,  # [HEADS], where EXTRA
    sink,
    alpha,
    beta,
    granule,
    requests,
    scale,
    cap,
    query_row,
    query_head,
    out_row,
    out_head,
    cache_block,
    cache_head,
    cache_row,
    table_row,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CAPPED: tl.constexpr,
    EXTRA: tl.constexpr,
):
    """Rows of a program are `QUERIES` queries times the `SHARE` heads of a group; TILE keys are read at a time."""
    place, group, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    request = _request_of(starts_ptr, requests, place, QUERIES)
    begin = tl.load(starts_ptr + request)
    count = tl.load(starts_ptr + request + 1) - begin
    start = (place - begin // QUERIES - request) * QUERIES
    if start >= count:
        return
    before = tl.load(lengths_ptr + request) - count

    row = tl.arange(0, ROWS)
    local = start + row // SHARE
    asked = (row < QUERIES * SHARE) & (local < count)
    head = group * SHARE + row % SHARE
    token = (begin + local).to(tl.int64)
    t = before + local
    first = _first(t, alpha, beta, granule)
    column = tl.arange(0, WIDTH)
    inside = column < SIZE
    query = tl.load(  # [ROWS, WIDTH]
        query_ptr + token[:, None] * query_row + head[:, None] * query_head + column[None],
        mask=asked[:, None] & inside[None],
        other=0.0,
    )

    # What any of the queries sees: keys before `sinks`, and those from `lowest` to `last`.
    last = before + tl.minimum(start + QUERIES, count) - 1
    lowest = _first(before + start, alpha, beta, granule)
    sink_tiles = tl.cdiv(tl.minimum(sink, lowest), TILE)
    skip = tl.maximum(lowest // TILE - sink_tiles, 0)  # tiles between
    tiles = tl.cdiv(last + 1, TILE) - skip
    share = tl.cdiv(tiles, SEGMENTS)

    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    if EXTRA:  # as a key whose value is zero, which the first segment has
        logit = tl.load(extra_ptr + head, mask=asked, other=0.0).to(tl.float32) * 1.4426950408889634
        highest = tl.where(segment == 0, logit, highest)
        total = tl.where(segment == 0, 1.0, total)
    head_ptr = cache_ptr + group * cache_head
    for number in range(segment * share, tl.minimum(segment * share + share, tiles)):
        tile = tl.where(number < sink_tiles, number, number + skip)
        key = tile * TILE + tl.arange(0, TILE)
        # Other entries of the table can be of freed blocks, which hold anything.
        held = (key <= last) & ((key < sink) | (key >= lowest))
        block = tl.load(table_ptr + request * table_row + key // BLOCK, mask=held, other=0).to(tl.int64)
        keys_ptr = head_ptr + block * cache_block + key % BLOCK * cache_row
        keys = tl.load(  # [WIDTH, TILE]
            keys_ptr[None] + column[:, None], mask=held[None] & inside[:, None], other=0.0
        )
        scores = tl.dot(query, keys.to(query.dtype), input_precision="ieee") * scale
        if CAPPED:
            scores = cap * (2 * tl.sigmoid(2 * scores / cap) - 1)
        visible = held[None] & (key[None] <= t[:, None]) & ((key[None] < sink) | (key[None] >= first[:, None]))
        scores = tl.where(visible, scores * 1.4426950408889634, float("-inf"))  # to the base of 2
        new = tl.maximum(highest, tl.max(scores, axis=1))
        base = tl.where(new == float("-inf"), 0.0, new)  # of rows that have seen nothing yet
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(highest - base)
        values = tl.load(keys_ptr[:, None] + SIZE + column[None], mask=held[:, None] & inside[None], other=0.0)
        sums = sums * decay[:, None] + tl.dot(weights.to(query.dtype), values.to(query.dtype), input_precision="ieee")
        total = total * decay + tl.sum(weights, axis=1)
        highest = new

    if SEGMENTS == 1:
        total = tl.where(total == 0, 1.0, total)  # of rows that no query has; every query sees itself
        tl.store(
            out_ptr + token[:, None] * out_row + head[:, None] * out_head + column[None],
            (sums / total[:, None]).to(out_ptr.dtype.element_ty),
            mask=asked[:, None] & inside[None],
        )
    else:
        part = (token * HEADS + head) * SEGMENTS + segment
        tl.store(partial_ptr + part[:, None] * WIDTH + column[None], sums, mask=asked[:, None])
        tl.store(sums_ptr + part * 2, highest, mask=asked)
        tl.store(sums_ptr + part * 2 + 1, total, mask=asked)


@triton.jit
def _add_kernel(
    out_ptr,
    partial_ptr,
    sums_ptr,
    out_row,
    out_head,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """One token and one head: what its segments found, weighted by their sums."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part = (token * HEADS + head) * SEGMENTS + tl.arange(0, SEGMENTS)
    highest, total = tl.load(sums_ptr + part * 2), tl.load(sums_ptr + part * 2 + 1)
    weights = tl.exp2(highest - tl.max(highest, axis=0))
    column = tl.arange(0, WIDTH)
    sums = tl.load(partial_ptr + part[:, None] * WIDTH + column[None])  # [SEGMENTS, WIDTH]
    found = tl.sum(sums * weights[:, None], axis=0) / tl.sum(total * weights, axis=0)
    tl.store(out_ptr + token * out_row + head * out_head + column, found.to(out_ptr.dtype.element_ty), column < SIZE)


@triton.jit
def _store_kernel(
    cache_ptr,
    key_ptr,
    value_ptr,
    slots_ptr,
    key_row,
    key_head,
    value_row,
    value_head,
    cache_block,
    cache_head,
    cache_row,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token and one head group: its key and its value go to its slot."""
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot < 0:
        return
    column = tl.arange(0, WIDTH)
    inside = column < SIZE
    key = tl.load(key_ptr + token * key_row + group * key_head + column, mask=inside)
    value = tl.load(value_ptr + token * value_row + group * value_head + column, mask=inside)
    place = cache_ptr + slot // BLOCK * cache_block + group * cache_head + slot % BLOCK * cache_row + column
    tl.store(place, key.to(cache_ptr.dtype.element_ty), mask=inside)
    tl.store(place + SIZE, value.to(cache_ptr.dtype.element_ty), mask=inside)


def store(cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """As `plain.store`."""
    _, groups, block, width = cache.shape
    size = width // 2
    _store_kernel[(min(len(slots), len(key)), groups)](
        cache,
        key,
        value,
        slots,
        *key.stride()[:2],
        *value.stride()[:2],
        *cache.stride()[:3],
        SIZE=size,
        WIDTH=triton.next_power_of_2(size),
        BLOCK=block,
        num_warps=1,
    )


def attend(
    query: torch.Tensor,
    cache: torch.Tensor,
    rule: Rule,
    table: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    most_queries: int,
    longest: int,
    scale: float,
    cap: float | None,
    out: torch.Tensor,
    extra: torch.Tensor | None = None,
) -> None:
    """As `plain.attend`, where a step's metadata are tensors on the device.

    Args:
        query, out: `[tokens, heads, size]`; the last stride is 1, as that of the cache.
        cache: `[blocks, groups, tokens of a block, 2 size]`.
        table: `[R, blocks]`, int32.
        starts: where the queries of each of the R requests begin, and where the last ones end, `[R + 1]`, int32.
        lengths: tokens of each request, with those of this step, `[R]`, int32. A request without queries is left out.
        most_queries: no request has more.
        longest: no request has more tokens.
    """
    tokens, heads, size = query.shape
    groups, block = cache.shape[1], cache.shape[2]
    share, width = heads // groups, triton.next_power_of_2(size)
    # A prompt's queries share what they read; a program that has one query alone needs the 16 rows that a dot product
    # has at least.
    rows = max(16 if most_queries == 1 else 64, triton.next_power_of_2(share))
    tile = 64 if width * query.element_size() <= 256 else 32
    requests = len(lengths)
    segments = 1
    if most_queries == 1:
        window = longest - rule.first(max(longest - 1, 0))
        tiles = triton.cdiv(min(rule.sink + window, longest), tile)
        wanted = min(triton.cdiv(PROGRAMS, max(requests * groups, 1)), triton.cdiv(tiles, 2), SEGMENTS)
        segments = triton.next_power_of_2(max(wanted, 1))
    split = segments > 1
    partial = query.new_empty(tokens * heads * segments * width if split else 0, dtype=torch.float32)
    sums = query.new_empty(tokens * heads * segments * 2 if split else 0, dtype=torch.float32)
    queries = rows // share
    _attend_kernel[(tokens // queries + requests, groups, segments)](
        out,
        partial,
        sums,
        query,
        cache,
        table,
        starts,
        lengths,
        query if extra is None else extra,
        rule.sink,
        rule.alpha,
        rule.beta_units,
        rule.granule,
        requests,
        scale,
        cap or 0.0,
        *query.stride()[:2],
        *out.stride()[:2],
        *cache.stride()[:3],
        table.stride(0),
        HEADS=heads,
        SHARE=share,
        SIZE=size,
        WIDTH=width,
        ROWS=rows,
        QUERIES=queries,
        BLOCK=block,
        TILE=tile,
        SEGMENTS=segments,
        CAPPED=cap is not None,
        EXTRA=extra is not None,
        num_warps=4,
        num_stages=3,  # the table is read ahead of the blocks that it names
    )
    if split:
        _add_kernel[(tokens, heads)](
            out, partial, sums, *out.stride()[:2], HEADS=heads, SIZE=size, WIDTH=width, SEGMENTS=segments, num_warps=2
        )
