"""Additive linear attention in Triton: queries read states of the keys, merged with a window's softmax.

Keys come as a stream of features that is cut into chunks of 64 tokens, and chunks into segments of two.
`triton_linear_states.py` leaves the state before each segment; here a query takes the state of its segment, and the
chunks between that state and its own boundary as products with their keys.

Queries are worked on in pages of 64 positions, because all queries of a page read the state at the same chunk.

Names as in `triton_span.py`; besides there are F features, M tokens in the stream of keys, P pages of queries and S
segments. A slot is the state before a segment: a matrix `[DV, F]`, and its normaliser `[F]`.
"""

from __future__ import annotations

from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels need Triton; without it attention runs in plain PyTorch") from error

from .triton_linear_layout import (
    Layout,
    begin,
    dot_state,
    heads_at_once,
    kept_decays,
    load_part,
    options,
    row_decay,
    store_part,
    strides,
    tile_rows,
    with_decays,
)
from .triton_linear_states import Slots, segment_states


@triton.jit
def _look(
    p_query, o_query, m_row, p_state, p_norm, p_keys, key_t, chunk, count, at_v,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr,
    PAGE: tl.constexpr, BEFORE: tl.constexpr, OWN: tl.constexpr, MASS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One pass over the features: what rows find in a state, with the sums of its weights, and their products with keys
    of the chunk before theirs and of their own, each where it is asked for."""
    # [ROWS, BLOCK_V], [ROWS], [ROWS, PAGE] twice
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    before = tl.zeros([ROWS, PAGE], tl.float32)
    own = tl.zeros([ROWS, PAGE], tl.float32)
    o_v = at_v + tl.arange(0, BLOCK_V)
    j = (chunk * PAGE + tl.arange(0, PAGE)).to(tl.int64)
    for at_f in tl.range(0, FEATURES, BLOCK_F, num_stages=STAGES):
        # [ROWS, BLOCK_F], [BLOCK_V, BLOCK_F]
        b_query = load_part(p_query, o_query, m_row, at_f, FEATURES, BLOCK_F)
        b_state = load_part(p_state, o_v * FEATURES, o_v < VALUE_DIM, at_f, FEATURES, BLOCK_F)
        acc = dot_state(b_query, b_state.T, acc, PRECISION)
        if BEFORE:
            b_key = load_part(p_keys, (j - PAGE) * key_t, j - PAGE < count, at_f, FEATURES, BLOCK_F)
            before = tl.dot(b_query, b_key.T, before, input_precision=PRECISION)
        if OWN:
            b_key = load_part(p_keys, j * key_t, j < count, at_f, FEATURES, BLOCK_F)
            own = tl.dot(b_query, b_key.T, own, input_precision=PRECISION)
        if MASS:
            o_f = at_f + tl.arange(0, BLOCK_F)
            b_norm = tl.load(p_norm + o_f, mask=o_f < FEATURES, other=0.0)
            mass += tl.sum(b_query.to(tl.float32) * b_norm[None, :], 1)
    return acc, mass, before, own


@triton.jit
def _read(
    p_query,  # [B, H, T, F] features
    p_key,  # [B, G, M, F] features
    p_value,  # [B, G, M, DV]
    p_sums,  # [B, G, S * SEGMENT * PAGE] float32, where DECAY
    p_states,  # [B, G, S + 1, DV, F]
    p_norms,  # [B, G, S + 1, F] float32, where MASS
    p_chunk,  # [B, G, P] int32
    p_runs,  # [B, 3] int32: position of the first new token in its page, its column, and how many there are
    p_tokens,  # [B, G, 2] int32: tokens of the stream, and those that go into the state
    p_window,  # [B, H, T, DV] what the window's softmax gives, where MERGE
    p_lse,  # [B, H, T] float32, where MERGE
    p_gain,  # [B, H, T] float32, where MERGE
    p_out,  # [B, H, T, DV]
    p_mass,  # [B, H, T] float32
    pages,
    columns,
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
    window_b,
    window_h,
    window_t,
    out_b,
    out_h,
    out_t,
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
    MERGE: tl.constexpr,
    MEAN: tl.constexpr,
    MASS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """BLOCK_V numbers of the outputs of HEADS heads for one page of queries; those that are no token are left alone.

    With MASS the sums of the weights are written as well. With MEAN, which needs them, what is read is divided by them,
    and with MERGE joined with the window's output.
    """
    begin(OVERLAP)
    sets: tl.constexpr = SHARE // HEADS
    rows: tl.constexpr = PAGE * HEADS
    page = tl.program_id(0) // sets
    at_v = tl.program_id(1) * BLOCK_V
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
    p_norm = p_norms + slot * FEATURES
    p_keys = p_key + b * key_b + g * key_g
    p_values = p_value + b * value_b + g * value_g
    o_query = b * query_b + head * query_h + column * query_t
    o_token = tl.arange(0, PAGE)
    # [PAGE]
    j = (chunk * PAGE + o_token).to(tl.int64)
    m_j = j < count
    if DECAY:  # all of them ahead of the products, so that nothing waits for them behind those
        reach = row_decay(p_decays, chunk, token, SEGMENT, OWN, PAGE)
        end = tl.load(p_decays + chunk * PAGE - 1, mask=(chunk % SEGMENT) > 0, other=0.0)
        m_before = (j % (SEGMENT * PAGE) >= PAGE) & (j - PAGE < count)
        fade_before = tl.load(p_decays + j - PAGE, mask=m_before, other=0.0)
        fade = tl.load(p_decays + j, mask=m_j, other=0.0)

    # [rows, BLOCK_V], [rows], [rows, PAGE]
    if (SEGMENT == 2) & (chunk % SEGMENT > 0):
        acc, mass, b_weight, own = _look(
            p_query, o_query, m_row, p_state, p_norm, p_keys, key_t, chunk, count, at_v,
            rows, FEATURES, VALUE_DIM, BLOCK_F, BLOCK_V, PAGE, True, OWN, MASS, STAGES, PRECISION,
        )  # fmt: skip
        if DECAY:
            # The decay from a key to the end of its chunk, and from there on: neither can overflow.
            acc = acc * tl.exp(reach)[:, None]
            mass = mass * tl.exp(reach)
            b_weight = b_weight * tl.exp(reach - end)[:, None] * tl.exp(end - fade_before)[None, :]
        if MASS:
            mass += tl.sum(b_weight, 1)
        b_value = load_part(p_values, (j - PAGE) * value_t, j - PAGE < count, at_v, VALUE_DIM, BLOCK_V)
        acc = tl.dot(b_weight.to(b_value.dtype), b_value, acc, input_precision=PRECISION)
    else:
        acc, mass, b_weight, own = _look(
            p_query, o_query, m_row, p_state, p_norm, p_keys, key_t, chunk, count, at_v,
            rows, FEATURES, VALUE_DIM, BLOCK_F, BLOCK_V, PAGE, False, OWN, MASS, STAGES, PRECISION,
        )  # fmt: skip
        if DECAY:
            acc = acc * tl.exp(reach)[:, None]
            mass = mass * tl.exp(reach)
    if OWN:
        b_value = load_part(p_values, j * value_t, m_j, at_v, VALUE_DIM, BLOCK_V)
        m_pair = o_token[None, :] <= token[:, None]
        if DECAY:
            own = own * tl.exp(tl.where(m_pair, reach[:, None] - fade[None, :], 0.0))
        own = tl.where(m_pair, own, 0.0)
        if MASS:
            mass += tl.sum(own, 1)
        acc = tl.dot(own.to(b_value.dtype), b_value, acc, input_precision=PRECISION)

    out = acc
    if MEAN:
        some = mass > 0
        total = tl.where(some, mass, 1.0)
        out = tl.where(some[:, None], acc / total[:, None], 0.0)
    o_number = (b * GROUPS * SHARE + head) * columns + column
    if MERGE:
        b_lse = tl.load(p_lse + o_number, mask=m_row, other=0.0)
        b_gain = tl.load(p_gain + o_number, mask=m_row, other=0.0)
        share = tl.where(some, tl.sigmoid(b_lse - tl.log(total) - b_gain), 1.0)
        o_window = b * window_b + head * window_h + column * window_t
        b_window = load_part(p_window, o_window, m_row, at_v, VALUE_DIM, BLOCK_V).to(tl.float32)
        out = share[:, None] * b_window + (1.0 - share)[:, None] * out
    store_part(p_out, b * out_b + head * out_h + column * out_t, out, m_row, at_v, VALUE_DIM, BLOCK_V)
    if MASS and at_v == 0:
        tl.store(p_mass + o_number, mass, mask=m_row)


def read(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slots: Slots,
    where: Layout,
    window: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    *,
    mean: bool,
    mass: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs `[B, H, T, DV]`, in value's dtype, and with `mass` the sums of weights; without `mean` the former is then
    in float32, because they are divided later."""
    batch, heads, columns, _ = query.shape
    groups, value_dim = key.shape[1], value.shape[-1]
    make = value.new_empty if where.rows.is_whole(columns) else value.new_zeros
    dtype = torch.float32 if mass and not mean else value.dtype
    out = make(batch, columns, heads, value_dim, dtype=dtype).transpose(1, 2)
    make_mass = slots.norms.new_empty if where.rows.is_whole(columns) else slots.norms.new_zeros
    masses = make_mass((batch, heads, columns) if mass else (1,))
    share = heads // groups
    at_once = heads_at_once("read", share, value)
    # Sums of weights take the queries through registers; without them a program's shared memory holds these as well.
    opts = options("read_sum" if where.own and not mass else "read", query, value, groups, where, at_once)
    over, lse, gain = (out, masses, masses) if window is None else window
    _read[(where.pages * (share // at_once), triton.cdiv(value_dim, opts["BLOCK_V"]), batch * groups)](
        query,
        key,
        value,
        where.decays(slots.norms)[0],
        slots.matrices,
        slots.norms,
        where.chunk,
        where.runs,
        where.tokens,
        over,
        lse,
        gain,
        out,
        masses,
        where.pages,
        columns,
        where.segments,
        *strides(query, key, value, over, out),
        HEADS=at_once,
        MERGE=window is not None,
        MEAN=mean,
        MASS=mass,
        **opts,
    )
    return out, masses


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        first: torch.Tensor | None,
        out: torch.Tensor | None,
        lse: torch.Tensor | None,
        log_gain: torch.Tensor | None,
        where: Layout,
        mean: bool,
        mass: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        slots, last = segment_states(key, value, first, where)
        window = None if out is None or lse is None or log_gain is None else (out, lse, log_gain)
        result, masses = read(query, key, value, slots, where, window, mean=mean, mass=mass)
        kept = (slots.matrices, slots.norms, out, lse, log_gain, result if mean else None, masses)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.where, ctx.first = where, first is not None
        if mean or not mass:
            ctx.mark_non_differentiable(masses)
        ctx.set_materialize_grads(False)
        return result, masses, last

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        from .triton_linear_backward import backward

        query, key, value, matrices, norms, *others = ctx.saved_tensors
        given: Any = (*grads, query, key, value, Slots(matrices, norms), *others, ctx.where)
        return (*backward(*given, with_first=ctx.first), None, None, None)


def additive(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    first: torch.Tensor | None,
    where: Layout,
    *,
    log_decay: torch.Tensor | None = None,
    mean: bool = True,
    mass: bool = True,
    window: tuple[torch.Tensor, torch.Tensor] | None = None,
    log_gain: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Additive linear attention of T new columns, differentiable in all but `where` and `log_decay`.

    Args:
        query: features `[B, H, T, F]`.
        key: features `[B, G, M, F]` of the stream of keys, which starts at a whole page; M > 0.
        value: `[B, G, M, DV]`; the features are rounded to its dtype, but for float16, where all is in float32.
        first: the state before the stream, `[B, G, F, DV + 1]` float32; None when it is empty.
        where: what `layout` made.
        log_decay: see `with_decays`.
        mean: divide by the sums of the weights; else the result is the weighted sum, with `mass` in float32.
        mass: whether the sums of weights are asked for; with `mean` they are computed anyway.
        window: output `[B, H, T, DV]` and natural log-sum-exp `[B, H, T]` of the softmax over the keys in sight, which
            the mean is merged with as by `merge.merge`; None for heads without one.
        log_gain: `[B, H, T]` or what broadcasts to it, float32: logarithm of the factor on the state's weights.

    Returns:
        `[B, H, T, DV]` and the sums of weights `[B, H, T]` float32, which have a gradient without `mean`; both zero in
        columns that are no token; without `mass` and `mean` the latter is one number that means nothing. Then the last
        state, `[B, G, F, DV + 1]` float32.
    """
    dtype = value.dtype
    if dtype == torch.float16:
        value = value.float()
        window = None if window is None else (window[0].float(), window[1])
    query, key = query.to(value.dtype), key.to(value.dtype)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out = lse = gain = None
    if window is not None:
        out = window[0] if window[0].stride(-1) == 1 else window[0].contiguous()
        lse = window[1].float().contiguous()
        gain = torch.zeros_like(lse) if log_gain is None else log_gain.float().expand_as(lse).contiguous()
    if log_decay is not None:
        kept = log_decay.dim() == 1 and not log_decay.requires_grad
        where = (kept_decays if kept else with_decays)(where, log_decay, key.shape[2])
    given = (query, key, value, first, out, lse, gain)
    mass = mass or mean
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        found, masses, last = _Linear.apply(*given, where, mean, mass)
    else:
        slots, last = segment_states(key, value, first, where)
        joined = None if out is None or lse is None or gain is None else (out, lse, gain)
        found, masses = read(query, key, value, slots, where, joined, mean=mean, mass=mass)
    return found.to(dtype) if mean else found, masses, last
