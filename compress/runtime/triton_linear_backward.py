"""Gradients of additive linear attention: of rows, of states by a sum that runs backwards, of queries, keys, values."""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels need Triton; without it attention runs in plain PyTorch") from error

from .span import PAGE
from .triton_linear_layout import (
    Layout,
    begin,
    dot_state,
    heads_at_once,
    inner,
    load_part,
    options,
    overlapped,
    row_decay,
    store_part,
    strides,
    tile_rows,
)
from .triton_linear_states import Slots, running, sums_of_queries


@triton.jit
def _rows(
    p_grad,  # [B, H, T, DV]
    p_out,  # [B, H, T, DV] the result of the forward pass
    p_window,  # [B, H, T, DV], where MERGE
    p_lse,  # [B, H, T] float32, where MERGE
    p_gain,  # [B, H, T] float32, where MERGE
    p_mass,  # [B, H, T] float32
    p_runs,  # [B, 3] int32
    p_grad_window,  # [B, H, T, DV], where MERGE
    p_grad_lse,  # [B, H, T] float32, where MERGE
    p_weight,  # [B, H, T] float32: what a row's gradient is multiplied with to be that of its numerator
    p_extra,  # [B, H, T] float32: the gradient of its denominator
    columns,
    heads,
    grad_b,
    grad_h,
    grad_t,
    out_b,
    out_h,
    out_t,
    window_b,
    window_h,
    window_t,
    to_b,
    to_h,
    to_t,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PAGE: tl.constexpr,
    MERGE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A page of queries of one head: y = a o + (1 - a) num / den with a = sigmoid(lse - log den - gain), backwards."""
    begin(OVERLAP)
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = tl.program_id(1) % heads
    _, head, column, m_row = tile_rows(tl.program_id(0), h, p_runs, b, 1, PAGE)
    o_number = (b * heads + head) * columns + column
    mass = tl.load(p_mass + o_number, mask=m_row, other=0.0)
    some = mass > 0
    total = tl.where(some, mass, 1.0)
    share = tl.zeros([PAGE], tl.float32)
    if MERGE:
        b_lse = tl.load(p_lse + o_number, mask=m_row, other=0.0)
        b_gain = tl.load(p_gain + o_number, mask=m_row, other=0.0)
        share = tl.where(some, tl.sigmoid(b_lse - tl.log(total) - b_gain), 1.0)
    of_out = tl.zeros([PAGE], tl.float32)
    of_window = tl.zeros([PAGE], tl.float32)
    for at in tl.static_range(0, VALUE_DIM, BLOCK_V):
        o_grad = b * grad_b + head * grad_h + column * grad_t
        o_out = b * out_b + head * out_h + column * out_t
        b_grad = load_part(p_grad, o_grad, m_row, at, VALUE_DIM, BLOCK_V).to(tl.float32)
        b_out = load_part(p_out, o_out, m_row, at, VALUE_DIM, BLOCK_V).to(tl.float32)
        of_out += tl.sum(b_grad * b_out, 1)
        if MERGE:
            o_window = b * window_b + head * window_h + column * window_t
            b_window = load_part(p_window, o_window, m_row, at, VALUE_DIM, BLOCK_V).to(tl.float32)
            of_window += tl.sum(b_grad * b_window, 1)
            o_to = b * to_b + head * to_h + column * to_t
            store_part(p_grad_window, o_to, b_grad * share[:, None], m_row, at, VALUE_DIM, BLOCK_V)
    weight = tl.where(some, (1.0 - share) / total, 0.0)
    tl.store(p_weight + o_number, weight, mask=m_row)
    tl.store(p_extra + o_number, -weight * of_out, mask=m_row)
    if MERGE:
        tl.store(p_grad_lse + o_number, tl.where(some, share * (of_window - of_out), 0.0), mask=m_row)


@triton.jit
def _look_back(
    p_grad, o_grad, m_row, p_state, p_values, value_t, chunk, count, at_f,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr,
    PAGE: tl.constexpr, BEFORE: tl.constexpr, OWN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One pass over the gradients of rows: their products with a state, with the values of the chunk before theirs, and
    with those of their own; the mirror of `triton_linear._look`."""
    # [ROWS, BLOCK_F], [ROWS, PAGE] twice
    acc = tl.zeros([ROWS, BLOCK_F], tl.float32)
    before = tl.zeros([ROWS, PAGE], tl.float32)
    own = tl.zeros([ROWS, PAGE], tl.float32)
    j = (chunk * PAGE + tl.arange(0, PAGE)).to(tl.int64)
    for at_v in tl.range(0, VALUE_DIM, BLOCK_V, num_stages=STAGES):
        # [ROWS, BLOCK_V], [BLOCK_V, BLOCK_F]
        o_v = at_v + tl.arange(0, BLOCK_V)
        b_grad = load_part(p_grad, o_grad, m_row, at_v, VALUE_DIM, BLOCK_V)
        b_state = load_part(p_state, o_v * FEATURES, o_v < VALUE_DIM, at_f, FEATURES, BLOCK_F)
        acc = dot_state(b_grad, b_state, acc, PRECISION)
        if BEFORE:
            b_value = load_part(p_values, (j - PAGE) * value_t, j - PAGE < count, at_v, VALUE_DIM, BLOCK_V)
            before = tl.dot(b_grad, b_value.T, before, input_precision=PRECISION)
        if OWN:
            b_value = load_part(p_values, j * value_t, j < count, at_v, VALUE_DIM, BLOCK_V)
            own = tl.dot(b_grad, b_value.T, own, input_precision=PRECISION)
    return acc, before, own


@triton.jit
def _queries(
    p_grad,  # [B, H, T, DV]
    p_key,  # [B, G, M, F]
    p_value,  # [B, G, M, DV]
    p_sums,  # [B, G, S * SEGMENT * PAGE] float32, where DECAY
    p_states,  # [B, G, S + 1, DV, F]
    p_norms,  # [B, G, S + 1, F] float32, where MASS
    p_weight,  # [B, H, T] float32
    p_extra,  # [B, H, T] float32
    p_chunk,  # [B, G, P] int32
    p_runs,  # [B, 3] int32
    p_tokens,  # [B, G, 2] int32
    p_to,  # [B, H, T, F] the gradient of the queries
    pages,
    columns,
    segments,
    grad_b,
    grad_h,
    grad_t,
    key_b,
    key_g,
    key_t,
    value_b,
    value_g,
    value_t,
    to_b,
    to_h,
    to_t,
    SHARE: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    FEATURES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SEGMENT: tl.constexpr,
    PAGE: tl.constexpr,
    DECAY: tl.constexpr,
    OWN: tl.constexpr,
    MASS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """BLOCK_F numbers of the gradients of the queries of one page and HEADS heads; the mirror of `_read`."""
    begin(OVERLAP)
    sets: tl.constexpr = SHARE // HEADS
    rows: tl.constexpr = PAGE * HEADS
    page = tl.program_id(0) // sets
    at_f = tl.program_id(1) * BLOCK_F
    bg = tl.program_id(2).to(tl.int64)
    b = bg // GROUPS
    g = bg % GROUPS
    # [rows] each
    token, head, column, m_row = tile_rows(page, g * SHARE + tl.program_id(0) % sets * HEADS, p_runs, b, HEADS, PAGE)
    if page * PAGE >= tl.load(p_runs + b * 3) + tl.load(p_runs + b * 3 + 2):
        return
    chunk = tl.load(p_chunk + bg * pages + page)
    segment = chunk // SEGMENT
    count = tl.load(p_tokens + bg * 2)
    p_decays = p_sums + bg * segments * SEGMENT * PAGE
    slot = bg * (segments + 1) + segment
    p_state = p_states + slot * (FEATURES * VALUE_DIM)
    p_keys = p_key + b * key_b + g * key_g
    p_values = p_value + b * value_b + g * value_g
    o_number = (b * GROUPS * SHARE + head) * columns + column
    weight = tl.load(p_weight + o_number, mask=m_row, other=0.0)
    extra = tl.load(p_extra + o_number, mask=m_row, other=0.0)
    o_grad = b * grad_b + head * grad_h + column * grad_t
    o_token = tl.arange(0, PAGE)
    o_f = at_f + tl.arange(0, BLOCK_F)
    # [PAGE]
    j = (chunk * PAGE + o_token).to(tl.int64)
    m_j = j < count
    scale = weight
    if DECAY:
        reach = row_decay(p_decays, chunk, token, SEGMENT, OWN, PAGE)
        scale = weight * tl.exp(reach)

    # [rows, BLOCK_F], [rows, PAGE]
    if (SEGMENT == 2) & (chunk % SEGMENT > 0):
        b_key = load_part(p_keys, (j - PAGE) * key_t, j - PAGE < count, at_f, FEATURES, BLOCK_F)
        acc, b_slope, own = _look_back(
            p_grad, o_grad, m_row, p_state, p_values, value_t, chunk, count, at_f,
            rows, FEATURES, VALUE_DIM, BLOCK_F, BLOCK_V, PAGE, True, OWN, STAGES, PRECISION,
        )  # fmt: skip
        acc = acc * scale[:, None]
        b_slope = b_slope * weight[:, None] + extra[:, None]
        if DECAY:
            end = tl.load(p_decays + chunk * PAGE - 1)
            fade = tl.load(p_decays + j - PAGE, mask=j - PAGE < count, other=0.0)
            b_slope = b_slope * tl.exp(reach - end)[:, None] * tl.exp(end - fade)[None, :]
        acc = tl.dot(b_slope.to(b_key.dtype), b_key, acc, input_precision=PRECISION)
    else:
        acc, b_slope, own = _look_back(
            p_grad, o_grad, m_row, p_state, p_values, value_t, chunk, count, at_f,
            rows, FEATURES, VALUE_DIM, BLOCK_F, BLOCK_V, PAGE, False, OWN, STAGES, PRECISION,
        )  # fmt: skip
        acc = acc * scale[:, None]
    if MASS:
        b_norm = tl.load(p_norms + slot * FEATURES + o_f, mask=o_f < FEATURES, other=0.0)
        if DECAY:
            acc += (extra * tl.exp(reach))[:, None] * b_norm[None, :]
        else:
            acc += extra[:, None] * b_norm[None, :]
    if OWN:
        b_key = load_part(p_keys, j * key_t, m_j, at_f, FEATURES, BLOCK_F)
        m_pair = o_token[None, :] <= token[:, None]
        own = own * weight[:, None] + extra[:, None]
        if DECAY:
            fade = tl.load(p_decays + j, mask=m_j, other=0.0)
            own = own * tl.exp(tl.where(m_pair, reach[:, None] - fade[None, :], 0.0))
        own = tl.where(m_pair, own, 0.0)
        acc = tl.dot(own.to(b_key.dtype), b_key, acc, input_precision=PRECISION)
    store_part(p_to, b * to_b + head * to_h + column * to_t, acc, m_row, at_f, FEATURES, BLOCK_F)


@triton.jit
def _keys(
    p_query,  # [B, H, T, F]
    p_key,  # [B, G, M, F]
    p_value,  # [B, G, M, DV]
    p_grad,  # [B, H, T, DV]
    p_sums,  # [B, G, S * SEGMENT * PAGE] float32, where DECAY
    p_totals,  # [B, G, S] float32, where DECAY
    p_states,  # [B, G, S + 1, DV, F]: gradients of the state before a segment and all behind it
    p_norms,  # [B, G, S + 1, F] float32: those of its normaliser, where MASS
    p_weight,  # [B, H, T] float32
    p_extra,  # [B, H, T] float32
    p_chunk,  # [B, G, P] int32
    p_first,  # [B, G, (S + 1) * SEGMENT + 1] int32
    p_runs,  # [B, 3] int32
    p_tokens,  # [B, G, 2] int32
    p_to,  # [B, G, M, F] the gradient of the keys, or with VALUES that of the values [B, G, M, DV]
    pages,
    columns,
    stream,
    segments,
    query_b,
    query_h,
    query_t,
    key_b,
    key_g,
    key_t,
    value_b,
    value_g,
    value_t,
    grad_b,
    grad_h,
    grad_t,
    to_b,
    to_g,
    to_t,
    SHARE: tl.constexpr,
    GROUPS: tl.constexpr,
    FEATURES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SEGMENT: tl.constexpr,
    PAGE: tl.constexpr,
    VALUES: tl.constexpr,
    DECAY: tl.constexpr,
    OWN: tl.constexpr,
    MASS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A block of the gradients of the keys of one chunk, or of its values.

    Queries that read later in the chunk's segment have seen its keys one by one, all later ones through the state.
    """
    begin(OVERLAP)
    n = tl.program_id(0)
    bg = tl.program_id(2).to(tl.int64)
    b = bg // GROUPS
    g = bg % GROUPS
    count = tl.load(p_tokens + bg * 2)
    absorbed = tl.load(p_tokens + bg * 2 + 1)
    segment = n // SEGMENT
    o_token = tl.arange(0, PAGE)
    # [PAGE]
    j = (n * PAGE + o_token).to(tl.int64)
    m_j = j < count
    p_decays = p_sums + bg * segments * SEGMENT * PAGE
    p_keys = p_key + b * key_b + g * key_g
    p_values = p_value + b * value_b + g * value_g
    slot = bg * (segments + 1) + segment + 1
    p_state = p_states + slot * (FEATURES * VALUE_DIM)
    if DECAY:
        fade = tl.load(p_decays + j, mask=m_j, other=0.0)

    # What comes through the state after the segment: [PAGE, BLOCK_F or BLOCK_V].
    if VALUES:
        at = tl.program_id(1) * BLOCK_V
        acc = tl.zeros([PAGE, BLOCK_V], tl.float32)
        o_v = at + tl.arange(0, BLOCK_V)
        for at_f in tl.static_range(0, FEATURES, BLOCK_F):
            b_key = load_part(p_keys, j * key_t, m_j, at_f, FEATURES, BLOCK_F)
            b_state = load_part(p_state, o_v * FEATURES, o_v < VALUE_DIM, at_f, FEATURES, BLOCK_F)
            acc = dot_state(b_key, b_state.T, acc, PRECISION)
    else:
        at = tl.program_id(1) * BLOCK_F
        acc = tl.zeros([PAGE, BLOCK_F], tl.float32)
        for at_v in tl.static_range(0, VALUE_DIM, BLOCK_V):
            o_v = at_v + tl.arange(0, BLOCK_V)
            b_value = load_part(p_values, j * value_t, m_j, at_v, VALUE_DIM, BLOCK_V)
            b_state = load_part(p_state, o_v * FEATURES, o_v < VALUE_DIM, at, FEATURES, BLOCK_F)
            acc = dot_state(b_value, b_state, acc, PRECISION)
        if MASS:
            o_f = at + tl.arange(0, BLOCK_F)
            acc += tl.load(p_norms + slot * FEATURES + o_f, mask=o_f < FEATURES, other=0.0)[None, :]
    if DECAY:
        total = tl.load(p_totals + bg * segments + segment)
        acc = acc * tl.exp(total - fade)[:, None]
    acc = tl.where((j < absorbed)[:, None], acc, 0.0)

    p_pages = p_first + bg * ((segments + 1) * SEGMENT + 1)
    low = tl.load(p_pages + n + 1)
    if OWN:
        low = tl.load(p_pages + n)
    high = tl.load(p_pages + (segment + 1) * SEGMENT)
    if n * PAGE >= count:
        high = low
    for item in tl.range(low * SHARE, high * SHARE, num_stages=STAGES):
        page = item // SHARE
        _, head, column, m_row = tile_rows(page, g * SHARE + item % SHARE, p_runs, b, 1, PAGE)
        o_query = b * query_b + head * query_h + column * query_t
        o_grad = b * grad_b + head * grad_h + column * grad_t
        o_number = (b * GROUPS * SHARE + head) * columns + column
        # [PAGE] and, by query and key, [PAGE, PAGE]
        weight = tl.load(p_weight + o_number, mask=m_row, other=0.0)
        if VALUES:
            b_pair = inner(p_query, o_query, m_row, p_keys, j * key_t, m_j, PAGE, PAGE, FEATURES, BLOCK_F, PRECISION)
            b_pair = b_pair * weight[:, None]
        else:
            b_pair = inner(p_grad, o_grad, m_row, p_values, j * value_t, m_j, PAGE, PAGE, VALUE_DIM, BLOCK_V, PRECISION)
            b_pair = b_pair * weight[:, None] + tl.load(p_extra + o_number, mask=m_row, other=0.0)[:, None]
        chunk = tl.load(p_chunk + bg * pages + page)
        if DECAY:
            reach = row_decay(p_decays, chunk, o_token, SEGMENT, OWN, PAGE)
            b_pair = b_pair * tl.exp(reach[:, None] - fade[None, :])
        if OWN:
            b_pair = tl.where((n < chunk) | (o_token[None, :] <= o_token[:, None]), b_pair, 0.0)
        if VALUES:
            b_row = load_part(p_grad, o_grad, m_row, at, VALUE_DIM, BLOCK_V)
        else:
            b_row = load_part(p_query, o_query, m_row, at, FEATURES, BLOCK_F)
        acc = tl.dot(b_pair.to(b_row.dtype).T, b_row, acc, input_precision=PRECISION)
    acc = tl.where(m_j[:, None], acc, 0.0)
    p_rows = p_to + b * to_b + g * to_g
    if VALUES:
        store_part(p_rows, j * to_t, acc, j < stream, at, VALUE_DIM, BLOCK_V)
    else:
        store_part(p_rows, j * to_t, acc, j < stream, at, FEATURES, BLOCK_F)


def of_queries(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slots: Slots,
    weight: torch.Tensor,
    extra: torch.Tensor,
    where: Layout,
    *,
    mass: bool = True,
) -> torch.Tensor:
    """The gradient of the queries `[B, H, T, F]`; arguments as of `sums_of_queries` and `triton_linear.read`.

    Args:
        mass: whether the slots have normalisers.
    """
    batch, heads, columns, features = query.shape
    groups = key.shape[1]
    at_once = heads_at_once("queries", heads // groups, value)
    opts = options("queries", query, value, groups, where, at_once)
    found = torch.empty_like(query) if where.rows.is_whole(columns) else torch.zeros_like(query)
    _queries[(where.pages * (heads // groups // at_once), triton.cdiv(features, opts["BLOCK_F"]), batch * groups)](
        grad,
        key,
        value,
        where.decays(weight)[0],
        slots.matrices,
        slots.norms,
        weight,
        extra,
        where.chunk,
        where.runs,
        where.tokens,
        found,
        where.pages,
        columns,
        where.segments,
        *strides(grad, key, value, found),
        HEADS=at_once,
        MASS=mass,
        **opts,
    )
    return found


def of_keys(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    flow: Slots,
    weight: torch.Tensor,
    extra: torch.Tensor,
    where: Layout,
    *,
    mass: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of the keys `[B, G, M, F]` and values `[B, G, M, DV]`; arguments as of `of_queries`.

    Args:
        flow: the gradient of the state before every segment, and of all behind it.
    """
    batch, groups, tokens, features = key.shape
    columns, value_dim = query.shape[2], value.shape[-1]
    found = torch.empty_like(key), torch.empty_like(value)
    sums, totals = where.decays(weight)
    opts = options("keys", query, value, groups, where, 1)
    blocks_f, blocks_v = triton.cdiv(features, opts["BLOCK_F"]), triton.cdiv(value_dim, opts["BLOCK_V"])
    for values, blocks, target in ((False, blocks_f, found[0]), (True, blocks_v, found[1])):
        _keys[(triton.cdiv(tokens, PAGE), blocks, batch * groups)](
            query,
            key,
            value,
            grad,
            sums,
            totals,
            flow.matrices,
            flow.norms,
            weight,
            extra,
            where.chunk,
            where.first,
            where.runs,
            where.tokens,
            target,
            where.pages,
            columns,
            tokens,
            where.segments,
            *strides(query, key, value, grad, target),
            VALUES=values,
            MASS=mass,
            **opts,
        )
    return found


def backward(
    grad: torch.Tensor | None,
    grad_mass: torch.Tensor | None,
    grad_last: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slots: Slots,
    window: torch.Tensor | None,
    lse: torch.Tensor | None,
    gain: torch.Tensor | None,
    out: torch.Tensor | None,
    mass: torch.Tensor,
    where: Layout,
    *,
    with_first: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of query, key, value, first, window, lse and gain, from those of the results of `additive`.

    Zero in columns that are no token.

    Args:
        grad, grad_mass, grad_last: None where nothing depends on that result.
        slots, mass: what the forward pass kept; mass is one number where nobody asked for it.
        out: its result, where that is a mean; None where it is a sum.
    """
    batch, heads, columns, _ = query.shape
    value_dim = value.shape[-1]
    pages, merged = where.pages, window is not None
    grad = value.new_zeros(batch, heads, columns, value_dim) if grad is None else grad.to(value.dtype)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    whole = where.rows.is_whole(columns)  # then every number of a row is written
    make = torch.empty_like if whole else torch.zeros_like
    grad_window = make(window) if window is not None else None
    grad_lse = make(mass) if merged else None
    of_rows = (batch, heads, columns)
    if out is None:
        weight = mass.new_ones(of_rows)
        extra = torch.zeros_like(weight) if grad_mass is None else grad_mass.float().contiguous()
    else:
        weight, extra = ((mass.new_empty if whole else mass.new_zeros)(of_rows) for _ in range(2))
        over, to = (out, out) if window is None or grad_window is None else (window, grad_window)
        _rows[(pages, batch * heads)](
            grad,
            out,
            over,
            mass if lse is None else lse,
            mass if gain is None else gain,
            mass,
            where.runs,
            to,
            mass if grad_lse is None else grad_lse,
            weight,
            extra,
            columns,
            heads,
            *strides(grad, out, over, to),
            VALUE_DIM=value_dim,
            BLOCK_V=min(64, max(16, triton.next_power_of_2(value_dim))),
            PAGE=PAGE,
            MERGE=merged,
            num_warps=4,
            **overlapped(value.device),
        )

    normed = out is not None or grad_mass is not None or grad_last is not None
    sums = sums_of_queries(grad, query, value, weight, extra, where)
    flow = Slots.like(key, value, where.segments, value.dtype)
    grad_first = running(sums, flow, grad_last, where, reverse=True)
    grad_query = of_queries(grad, query, key, value, slots, weight, extra, where, mass=normed)
    grad_key, grad_value = of_keys(grad, query, key, value, flow, weight, extra, where, mass=normed)
    grad_gain = None if grad_lse is None else -grad_lse
    return grad_query, grad_key, grad_value, grad_first if with_first else None, grad_window, grad_lse, grad_gain
