"""Prefill attention of a planned layer as Triton kernels: forward over new and paged keys, and its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError as error:
    raise ImportError("the kernels need Triton; without it attention runs in plain PyTorch") from error

from .span import PAGE, Span, kept_table
from .triton_scores import LN2, row_shift, unnormed
from .triton_span import first_key, load_block, load_rule, load_run, sees, span_rules, store_block, tanh
from .tuned import launches_overlap, prefill_config

LOG2E = 1.4426950408889634
NEVER = tl.constexpr(-1.0e30)  # running maximum of a row that has seen no key; finite, so that no NaN arises


@triton.jit
def add_to_softmax(acc, top, total, score, value, scale, PRECISION: tl.constexpr):
    """One step of the online softmax in base 2, of scores `[M, N]` that are multiplied by `scale`.

    Values `[N, BLOCK_V]`; the sum of values so far `[M, BLOCK_V]`, the running maximum and the total of the weights,
    `[M]` each, in float32.
    """
    best = tl.maximum(top, tl.max(score, 1) * scale)
    weight = tl.exp2(score * scale - best[:, None])
    shrink = tl.exp2(top - best)
    acc = acc * shrink[:, None]
    acc = tl.dot(weight.to(value.dtype), value, acc, input_precision=PRECISION)
    return acc, best, total * shrink + tl.sum(weight, 1)


@triton.jit
def _accumulate(
    acc, top, total, query, key, value, seen, scale, to_cap, shift,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, SCORE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`add_to_softmax`, or the same of another score function (triton_scores.py), from queries and keys.

    Queries `[M, BLOCK_D]`, keys `[N, BLOCK_D]`, `seen` `[M, N]` where MASKED. The softmax has no `shift` `[M]`.
    """
    score = tl.dot(query, key.T, input_precision=PRECISION)  # [M, N]
    if SCORE == 0:
        if CAPPED:
            score = tanh(score * to_cap)
        if MASKED:
            score = tl.where(seen, score, float("-inf"))
        acc, top, total = add_to_softmax(acc, top, total, score, value, scale, PRECISION)
    else:
        weight = unnormed(score * scale + shift[:, None], SCORE)
        if MASKED:
            weight = tl.where(seen, weight, 0.0)
        acc = tl.dot(weight.to(value.dtype), value, acc, input_precision=PRECISION)
        if SCORE == 3:
            total += tl.sum(weight, 1)
    return acc, top, total


@triton.jit(do_not_specialize=["list_pages", "offset", "ahead"])
def _forward(
    p_query,  # [B, H, T, D]
    key_tiles,  # descriptor of [B, G, ahead + T, D], tiles [BLOCK_N, BLOCK_D]
    value_tiles,  # descriptor of [B, G, ahead + T, DV], tiles [BLOCK_N, BLOCK_V]
    p_out,  # [B, H, T, DV]
    p_lse,  # [B, H, T] float32
    p_order,  # [G, 5] int32: group, sink, alpha, beta units, mask; the groups in the order of their launch
    p_rows,  # [B, 3] int32: position of the first new token, first valid column, valid columns
    p_key_pages,  # [places, BLOCK_P, D]
    p_value_pages,  # [places, BLOCK_P, DV]
    p_table,  # [B, G, numbers] int32
    p_extra,  # [H] the extra logit of every query head, where EXTRA; its bias with SCORE 1 and 2
    p_on,  # [B, G, T * SHARE] int32: the rows that are computed, token * SHARE + head of the group; None for all
    p_on_counts,  # [B, G] int32: how many of them there are
    p_gates,  # [B, G, T] float32 with GATED 1, [B, H, T] with GATED 2: factors on the outputs; None with GATED 0
    list_key_tiles,  # descriptor of [B, G, L, D], tiles [BLOCK_N, BLOCK_D], where LISTED; else None, as those below
    list_value_tiles,  # descriptor of [B, G, L, DV], tiles [BLOCK_N, BLOCK_V]
    p_before,  # [B, G, list_pages] int32: tokens of the list before the n-th page from the first of the cached window
    p_listed,  # [B, G] int32: tokens in the first `offset` pages of the table, where PAGED
    list_pages,
    offset,
    ahead,  # keys before those of the queries' columns, where AHEAD: of the positions before `past`
    numbers,
    tiles,
    batch,
    columns,
    scale,
    to_cap,  # factor on the scores before the cap, where CAPPED
    query_b,
    query_h,
    query_t,
    out_b,
    out_h,
    out_t,
    gate_b,
    gate_u,
    gate_t,
    SHARE: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    RAGGED: tl.constexpr,
    PAGED: tl.constexpr,
    GATHERED: tl.constexpr,
    GATED: tl.constexpr,
    LISTED: tl.constexpr,
    AHEAD: tl.constexpr,
    KEEP_LSE: tl.constexpr,
    CAPPED: tl.constexpr,
    EXTRA: tl.constexpr,
    SCORE: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One tile: BLOCK_M rows of (token, head of the group), the heads of a group next to each other.

    Where GATHERED they are the rows that a list names, and the tiles behind its end have nothing to do. Where LISTED,
    a query sees beside its window a prefix of a list of keys: those before the first page of its window.
    """
    if OVERLAP:  # first wait for what is ahead; then the launch behind may take its place
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    item = tl.program_id(0)
    # Long tiles first, one group after the other: what runs together shares its keys through the cache.
    tile = tiles - 1 - item % tiles
    b = (item // tiles) % batch
    p_rule = p_order + item // (tiles * batch) * 5
    g = tl.load(p_rule)
    sink, alpha, beta, mask = load_rule(p_rule + 1, 0)
    past, start, count = load_run(p_rows, b)
    if GATHERED:  # rows of tokens that lie apart, in their order; keys are bounded by the first and the last of them
        on_count = tl.load(p_on_counts + b * GROUPS + g)
        if tile * BLOCK_M >= on_count:
            return
        p_own = p_on + (b * GROUPS + g).to(tl.int64) * columns * SHARE + tile * BLOCK_M
        low = tl.load(p_own) // SHARE
        high = tl.load(p_own + tl.minimum(BLOCK_M, on_count - tile * BLOCK_M) - 1) // SHARE
        # [BLOCK_M]
        m_token = tile * BLOCK_M + tl.arange(0, BLOCK_M) < on_count
        o_packed = tl.load(p_own + tl.arange(0, BLOCK_M), mask=m_token, other=0)
        o_token = o_packed // SHARE
        head = g * SHARE + o_packed % SHARE
    else:
        low = tile * BLOCK_M // SHARE
        if low >= count:
            return
        high = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // SHARE, count - 1)

        # [BLOCK_M]
        o_packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        o_token = o_packed // SHARE
        head = g * SHARE + o_packed % SHARE
        m_token = o_token < count
    t = past + o_token
    o_column = (start + o_token).to(tl.int64)
    # [BLOCK_M, BLOCK_D]
    o_query = b.to(tl.int64) * query_b + o_column * query_t + head * query_h
    b_query = load_block(p_query, o_query, m_token, DIM, BLOCK_D)
    first = first_key(t, alpha, beta, mask)
    earliest = first_key(past + low, alpha, beta, mask)
    latest = first_key(past + high, alpha, beta, mask)

    # [BLOCK_M, BLOCK_V], [BLOCK_M], [BLOCK_M]
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    top = tl.full([BLOCK_M], NEVER, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if EXTRA:  # as if of a key before all others, whose value is zero
        top = tl.load(p_extra + head).to(tl.float32) * 1.4426950408889634
        total += 1.0
    shift = row_shift(p_extra, head, m_token, t, first, sink, SCORE)
    if SCORE != 0:
        top = tl.zeros([BLOCK_M], tl.float32)
        if SCORE != 3:
            total += 1.0

    if LISTED:
        from_page = first_key(past - 1, alpha, beta, mask) // BLOCK_P
        p_own_before = p_before + (b * GROUPS + g).to(tl.int64) * list_pages
        all_rows = tl.load(p_own_before + earliest // BLOCK_P - from_page)
        any_row = tl.load(p_own_before + latest // BLOCK_P - from_page)
        # One loop less to compile where none is fast.
        whole = all_rows // BLOCK_N if PRECISION != "ieee" else 0
        for i in tl.range(0, whole, num_stages=STAGES):
            # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_V]
            b_key = list_key_tiles.load([b, g, i * BLOCK_N, 0]).reshape(BLOCK_N, BLOCK_D)
            b_value = list_value_tiles.load([b, g, i * BLOCK_N, 0]).reshape(BLOCK_N, BLOCK_V)
            acc, top, total = _accumulate(
                acc, top, total, b_query, b_key, b_value, None, scale, to_cap, shift, False, CAPPED, SCORE, PRECISION
            )
        # [BLOCK_M]
        n_before = tl.load(p_own_before + first // BLOCK_P - from_page, mask=m_token, other=0)
        for i in tl.range(whole, (any_row + BLOCK_N - 1) // BLOCK_N, num_stages=1):
            # [BLOCK_N], [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_V]
            entry = i * BLOCK_N + tl.arange(0, BLOCK_N)
            b_key = list_key_tiles.load([b, g, i * BLOCK_N, 0]).reshape(BLOCK_N, BLOCK_D)
            b_value = list_value_tiles.load([b, g, i * BLOCK_N, 0]).reshape(BLOCK_N, BLOCK_V)
            # [BLOCK_M, BLOCK_N]
            m_seen = entry[None, :] < n_before[:, None]
            acc, top, total = _accumulate(
                acc, top, total, b_query, b_key, b_value, m_seen, scale, to_cap, shift, True, CAPPED, SCORE, PRECISION
            )

    if AHEAD:  # the keys' columns start that many tokens before the queries'
        past -= ahead
        low += ahead
        high += ahead
        count += ahead

    # New keys, in columns from the sequence's first new token; tiles that every row sees whole need no mask. Behind a
    # list they start with the window, which moves by whole pages, so that most tiles start where it does.
    origin = tl.maximum(earliest - past, 0) if LISTED else 0
    begin = (tl.maximum(earliest - past, 0) - origin) // BLOCK_N
    end = (high - origin + BLOCK_N) // BLOCK_N
    inner = tl.minimum(tl.maximum((tl.maximum(latest - past, 0) - origin + BLOCK_N - 1) // BLOCK_N, begin), end)
    outer = tl.maximum((low + 1 - origin) // BLOCK_N, inner)
    for i in tl.range(inner, outer, num_stages=STAGES):
        # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_V]
        b_key = key_tiles.load([b, g, start + origin + i * BLOCK_N, 0]).reshape(BLOCK_N, BLOCK_D)
        b_value = value_tiles.load([b, g, start + origin + i * BLOCK_N, 0]).reshape(BLOCK_N, BLOCK_V)
        acc, top, total = _accumulate(
            acc, top, total, b_query, b_key, b_value, None, scale, to_cap, shift, False, CAPPED, SCORE, PRECISION
        )

    sinks = tl.minimum((tl.minimum(tl.maximum(sink - past, 0), high + 1) + BLOCK_N - 1) // BLOCK_N, begin)
    left = inner - begin
    for i in tl.range(0, sinks + left + end - outer, num_stages=STAGES):
        number = tl.where(i < sinks, i, tl.where(i < sinks + left, begin + i - sinks, outer + i - sinks - left))
        # [BLOCK_N], [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_V]
        column = origin + number * BLOCK_N + tl.arange(0, BLOCK_N)
        b_key = key_tiles.load([b, g, start + origin + number * BLOCK_N, 0]).reshape(BLOCK_N, BLOCK_D)
        b_value = value_tiles.load([b, g, start + origin + number * BLOCK_N, 0]).reshape(BLOCK_N, BLOCK_V)
        if RAGGED:  # columns behind the sequence's end may hold anything, NaN included
            b_value = tl.where((column < count)[:, None], b_value, 0.0)
        # [BLOCK_M, BLOCK_N]
        m_seen = sees(t, past + column, sink, first)
        acc, top, total = _accumulate(
            acc, top, total, b_query, b_key, b_value, m_seen, scale, to_cap, shift, True, CAPPED, SCORE, PRECISION
        )

    if PAGED:
        o_slot = tl.arange(0, BLOCK_P)
        pages_end = (past + BLOCK_P - 1) // BLOCK_P
        sinks = tl.minimum((tl.minimum(sink, past) + BLOCK_P - 1) // BLOCK_P, pages_end)
        begin = tl.minimum(tl.maximum(earliest // BLOCK_P, sinks), pages_end)
        p_held = p_table + (b * GROUPS + g).to(tl.int64) * numbers
        if LISTED:
            n_listed = tl.load(p_listed + b * GROUPS + g)
            for i in tl.range(0, (n_listed + BLOCK_P - 1) // BLOCK_P, num_stages=STAGES):
                place = tl.load(p_held + i).to(tl.int64)
                # [BLOCK_P], [BLOCK_P, BLOCK_D], [BLOCK_P, BLOCK_V]
                m_stored = i * BLOCK_P + o_slot < n_listed
                b_key = load_block(p_key_pages + place * BLOCK_P * DIM, o_slot * DIM, m_stored, DIM, BLOCK_D)
                p_values = p_value_pages + place * BLOCK_P * VALUE_DIM
                b_value = load_block(p_values, o_slot * VALUE_DIM, m_stored, VALUE_DIM, BLOCK_V)
                # [BLOCK_M, BLOCK_P]
                m_seen = m_stored[None, :] & m_token[:, None]
                acc, top, total = _accumulate(
                    acc, top, total, b_query, b_key, b_value, m_seen, scale, to_cap, shift, True, CAPPED, SCORE,
                    PRECISION,
                )  # fmt: skip
            p_held += offset
        for i in tl.range(0, sinks + pages_end - begin, num_stages=STAGES):
            number = tl.where(i < sinks, i, begin + i - sinks)
            place = tl.load(p_held + number).to(tl.int64)
            # [BLOCK_P], [BLOCK_P, BLOCK_D], [BLOCK_P, BLOCK_V]
            j = number * BLOCK_P + o_slot
            m_stored = j < past
            b_key = load_block(p_key_pages + place * BLOCK_P * DIM, o_slot * DIM, m_stored, DIM, BLOCK_D)
            p_values = p_value_pages + place * BLOCK_P * VALUE_DIM
            b_value = load_block(p_values, o_slot * VALUE_DIM, m_stored, VALUE_DIM, BLOCK_V)
            # [BLOCK_M, BLOCK_P]
            m_seen = m_stored[None, :] & ((j[None, :] < sink) | (j[None, :] >= first[:, None]))
            acc, top, total = _accumulate(
                acc, top, total, b_query, b_key, b_value, m_seen, scale, to_cap, shift, True, CAPPED, SCORE, PRECISION
            )

    total = tl.where(m_token, total, 1.0)
    if GATED > 0:
        unit = head if GATED == 2 else tl.zeros_like(head) + g
        acc *= tl.load(p_gates + b.to(tl.int64) * gate_b + unit * gate_u + o_column * gate_t, mask=m_token)[:, None]
    o_out = b.to(tl.int64) * out_b + o_column * out_t + head * out_h
    store_block(p_out, o_out, acc / total[:, None], m_token, VALUE_DIM, BLOCK_V)
    if KEEP_LSE:
        o_lse = (b * GROUPS * SHARE + head).to(tl.int64) * columns + o_column
        lse = top + tl.log2(total)
        if KEEP_LSE == 2:
            lse = lse * LN2
        tl.store(p_lse + o_lse, lse, mask=m_token)


@dataclass(frozen=True)
class Lists:
    """Keys that queries see before their windows, in order; see `triton_retain.compact`.

    Attributes:
        keys, values: `[B, G, L, D]`; what lies behind a list's end may be anything, but values of a tile's keys are 0.
        before: `[B, G, N]` int32, how many of them lie before the n-th page of 64 tokens, counted from the first page
            of the cached window, that of the query at the position before the new tokens.
        listed: `[B, G]` int32, how many lie in the first `offset` pages of the table besides, which all queries see;
            None without a cache.
        leaving: `[B, G]` int32, the lists' lengths: what leaves the windows by the end of the pass.
        offset: pages of the table before those of the window.
    """

    keys: torch.Tensor
    values: torch.Tensor
    before: torch.Tensor
    leaving: torch.Tensor
    listed: torch.Tensor | None = None
    offset: int = 0


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: Sequence[Span],
    rows: torch.Tensor,
    ragged: bool,
    pages: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    scale: float,
    *,
    keep_lse: bool,
    natural: bool = False,
    cap: float | None = None,
    extra: torch.Tensor | None = None,
    score: int = 0,
    on: tuple[torch.Tensor, torch.Tensor] | None = None,
    gates: torch.Tensor | None = None,
    lists: Lists | None = None,
    ahead: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One launch, with the `cap` and `extra` of `scores.Scores`, or with the score function of that number.

    Args:
        natural: keep the natural log-sum-exp instead of that to the base 2, which the gradients take.
        on: the rows to compute and how many they are, as `triton_routed.rows_on` lists them; None for all.
        gates: float32 `[B, G, T]` or `[B, H, T]` of any strides, factors on the outputs; None for 1.
        lists: what queries see before their windows, which then move by whole pages and have no sinks; None without.
        ahead: how many more columns keys and values have than queries, of the positions before; then there is neither
            padding, nor a cache, nor any of `on`, `gates` and `lists`.

    Returns:
        Output `[B, H, T, D]` and, if kept, the log-sum-exp of every row `[B, H, T]`, the extra logit included,
        -inf where a column is no token. Of rows that are not computed they are 0 and -inf.
    """
    batch, heads, columns, dim = query.shape
    groups, value_dim = key.shape[1], value.shape[-1]
    share = heads // groups
    config = prefill_config(max(dim, value_dim), query.itemsize, query.device)
    block_m, block_n = config["block_m"], config["block_n"]
    block_d, block_v = (max(16, triton.next_power_of_2(size)) for size in (dim, value_dim))
    tiles, overlap = triton.cdiv(columns * share, block_m), launches_overlap(query.device)
    some = ragged or on is not None
    make = query.new_zeros if some else query.new_empty
    out = make(batch, columns, heads, value_dim).transpose(1, 2)
    lse = query.new_empty((batch, heads, columns) if keep_lse else (1,), dtype=torch.float32)
    if some and keep_lse:
        lse.fill_(float("-inf"))
    key_pages, value_pages, table = pages if pages is not None else (key, value, rows)
    _forward[(tiles * batch * groups,)](
        query,
        _descriptor(key, block_n, block_d),
        _descriptor(value, block_n, block_v),
        out,
        lse,
        launch_order(tuple(spans), ahead + columns, query.device),
        rows,
        key_pages,
        value_pages,
        table,
        rows if extra is None else extra,
        *((None, None) if on is None else on),
        gates,
        *_list_arguments(lists, block_n, block_d, block_v),
        ahead,
        table.shape[-1],
        tiles,
        batch,
        columns,
        (scale if cap is None else cap) * LOG2E,
        0.0 if cap is None else scale / cap,
        query.stride(0),
        query.stride(1),
        query.stride(2),
        out.stride(0),
        out.stride(1),
        out.stride(2),
        *((None, None, None) if gates is None else gates.stride()),
        SHARE=share,
        GROUPS=groups,
        DIM=dim,
        VALUE_DIM=value_dim,
        BLOCK_D=block_d,
        BLOCK_V=block_v,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_P=PAGE,
        RAGGED=ragged,
        PAGED=pages is not None,
        GATHERED=on is not None,
        GATED=0 if gates is None else 1 if gates.shape[1] == groups else 2,
        LISTED=lists is not None,
        AHEAD=ahead > 0,
        KEEP_LSE=(2 if natural else 1) if keep_lse else 0,
        CAPPED=cap is not None,
        EXTRA=extra is not None and score == 0,
        SCORE=score,
        STAGES=config["stages"],
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        OVERLAP=overlap,
        num_warps=config["warps"],
        **({"launch_pdl": True} if overlap else {}),
    )
    return out, lse


def _list_arguments(lists: Lists | None, block_n: int, block_d: int, block_v: int) -> tuple[Any, ...]:
    """What the kernel is given of lists."""
    if lists is None:
        return (None,) * 6
    return (
        _descriptor(lists.keys, block_n, block_d),
        _descriptor(lists.values, block_n, block_v),
        lists.before,
        lists.listed,
        lists.before.shape[-1],
        lists.offset,
    )


def _descriptor(tensor: torch.Tensor, block: int, width: int) -> TensorDescriptor:
    """Tiles `[block, width]` of `[B, G, T, D]`; what lies outside reads as zero."""
    aligned = all(stride * tensor.itemsize % 16 == 0 for stride in tensor.stride()[:-1])
    if tensor.stride(-1) != 1 or not aligned or tensor.data_ptr() % 16:
        tensor = tensor.contiguous()
        pad = -tensor.shape[-1] * tensor.itemsize % 16 // tensor.itemsize
        tensor = torch.nn.functional.pad(tensor, (0, pad)) if pad else tensor
    return TensorDescriptor.from_tensor(tensor, [1, 1, block, width])


@lru_cache(maxsize=4096)
def launch_order(spans: tuple[Span, ...], length: int, device: torch.device) -> torch.Tensor:
    """Groups and their rules `[G, 5]` int32, the group with the most work first, so that short tiles fill the end."""
    rules = span_rules(spans, torch.device("cpu"))
    work = [span.sink + length - span.first(length - 1) for span in spans]
    order = sorted(range(len(spans)), key=lambda group: -work[group])
    return kept_table([[group, *rules[group].tolist()] for group in order], device)
