"""Gradients of the prefill kernel: one pass over keys for dK and dV, one over queries for dQ.

TAKEN says what keys do that have left the window: 0 none takes part but the sinks; 1 they take part with a weight,
whose logarithm is added to their scores; 2 they take part or not. With 1 and 2 every query is met with every key before
it, since what is left out has a gradient too (`retain_training.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels need Triton; without it attention runs in plain PyTorch") from error

from .span import Span
from .triton_scores import row_shift, sigmoid, unnormed
from .triton_span import (
    causal,
    columns_at,
    first_key,
    last_query,
    load_block,
    packed_rows,
    place,
    sees,
    span_rules,
    store_block,
    tanh,
)
from .tuned import backward_config

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def within_cap(b_query, b_key, scale, cap, CAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """Scores of the softmax in base 2 `[M, N]`, within the cap, and their slope by the products of query and key."""
    b_score = tl.dot(b_query, b_key.T, input_precision=PRECISION)
    if CAPPED:
        b_share = tanh(b_score * scale / cap)
        b_score = b_share * (cap * LOG2E)
        slope = scale * (1.0 - b_share * b_share)
    else:
        b_score = b_score * (scale * LOG2E)
        slope = scale
    return b_score, slope


@triton.jit
def with_decisions(b_score, b_taken, m_seen, m_older, TAKEN: tl.constexpr):
    """Scores `[M, N]` of the keys that are seen, with the decisions `[N]` about those that have left the window; -inf
    where a key takes no part."""
    if TAKEN == 1:
        b_score += tl.where(m_older, (b_taken * LOG2E)[None, :], 0.0)
    if TAKEN == 2:
        m_seen = m_seen & (~m_older | (b_taken != 0.0)[None, :])
    return tl.where(m_seen, b_score, float("-inf"))


@triton.jit
def _score_gradient(
    b_query, b_key, b_value, b_grad, b_lse, b_delta, b_taken, m_seen, m_older, scale, cap, shift,
    CAPPED: tl.constexpr, SCORE: tl.constexpr, TAKEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weights, and the gradients of the products of query and key and of the decisions, each `[M, N]` float32."""
    if SCORE == 0:
        b_score, slope = within_cap(b_query, b_key, scale, cap, CAPPED, PRECISION)
        b_weight = tl.exp2(with_decisions(b_score - b_lse[:, None], b_taken, m_seen, m_older, TAKEN))
        b_change = tl.dot(b_grad, b_value.T, input_precision=PRECISION) - b_delta[:, None]
        b_grad_score = b_weight * b_change * slope
        b_grad_taken = b_weight
        if TAKEN == 1:
            b_grad_taken = tl.where(m_seen & m_older, b_weight * b_change, 0.0)
        if TAKEN == 2:  # of a key that is left out what it would change to keep it, by the share that it would have
            b_share = tl.where((b_taken != 0.0)[None, :], b_weight, sigmoid(b_score - b_lse[:, None]))
            b_grad_taken = tl.where(m_seen & m_older, b_share * b_change, 0.0)
    else:
        b_score = tl.dot(b_query, b_key.T, input_precision=PRECISION) * (scale * LOG2E) + shift[:, None]
        b_weight = tl.where(m_seen, unnormed(b_score, SCORE), 0.0)
        b_grad_weight = tl.dot(b_grad, b_value.T, input_precision=PRECISION)
        b_grad_taken = b_weight
        if SCORE == 3:  # softplus over its sum: the slope of the softplus is the sigmoid
            b_weight = b_weight * tl.exp2(-b_lse)[:, None]
            slope = tl.where(m_seen, sigmoid(b_score), 0.0) * tl.exp2(-b_lse)[:, None] * (scale * LOG2E)
            b_grad_score = slope * (b_grad_weight - b_delta[:, None])
        else:
            b_grad_score = b_weight * (1.0 - b_weight) * b_grad_weight * scale
    return b_weight, b_grad_score, b_grad_taken


@triton.jit
def _keys(
    p_query,  # [B, H, T, D]
    p_key,  # [B, G, ahead + T, D]
    p_value,  # [B, G, ahead + T, DV]
    p_grad,  # [B, H, T, DV]
    p_lse,  # [B, H, T] float32
    p_delta,  # [B, H, T] float32
    p_grad_key,  # [B, G, ahead + T, D] contiguous
    p_grad_value,  # [B, G, ahead + T, DV] contiguous
    p_taken,  # [B, G, T] float32 contiguous, where TAKEN
    p_grad_taken,  # [B, G, T] float32 contiguous, where TAKEN
    p_rules,  # [G, 4] int32
    p_rows,  # [B, 3] int32
    p_bias,  # [H], with SCORE 1 and 2
    columns,
    ahead,  # keys before those of the queries' columns
    scale,
    cap,
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
    SHARE: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr,
    SCORE: tl.constexpr,
    TAKEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK and dV of BLOCK_N keys of one group: the queries that see any of them are one run."""
    b, g, sink, alpha, beta, mask, start, count = place(p_rules, p_rows, GROUPS)
    low = tl.program_id(0) * BLOCK_N
    whole = ahead + count
    if low >= whole:
        return
    # [BLOCK_N]
    j = low + tl.arange(0, BLOCK_N)
    m_j = j < whole
    # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_V]
    b_key = load_block(p_key, columns_at(b, g, start + j, key_b, key_g, key_t), m_j, DIM, BLOCK_D)
    b_value = load_block(p_value, columns_at(b, g, start + j, value_b, value_g, value_t), m_j, VALUE_DIM, BLOCK_V)
    last = last_query(tl.minimum(low + BLOCK_N, whole) - 1, alpha, beta, mask)
    last = tl.minimum(tl.where(low < sink, whole - 1, last), whole - 1)
    o_rows = columns_at(b, g, start + j, GROUPS * (ahead + columns), ahead + columns, 1)
    b_taken = tl.zeros([BLOCK_N], tl.float32)
    if TAKEN:
        last = whole - 1
        b_taken = tl.load(p_taken + o_rows, mask=m_j, other=0.0)
    b_grad_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_grad_value = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    b_grad_taken = tl.zeros([BLOCK_N], tl.float32)
    # Queries are numbered from the first one, `ahead` positions behind the first key.
    begin, end = tl.maximum(low - ahead, 0), tl.maximum(last + 1 - ahead, 0)
    for tile in range(begin * SHARE // BLOCK_M, (end * SHARE + BLOCK_M - 1) // BLOCK_M):
        # [BLOCK_M], [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_V]
        q, head, m_t = packed_rows(tile, g, count, SHARE, BLOCK_M)
        b_query = load_block(p_query, columns_at(b, head, start + q, query_b, query_h, query_t), m_t, DIM, BLOCK_D)
        b_grad = load_block(p_grad, columns_at(b, head, start + q, grad_b, grad_h, grad_t), m_t, VALUE_DIM, BLOCK_V)
        o_queries = columns_at(b, head, start + q, GROUPS * SHARE * columns, columns, 1)
        b_lse = tl.load(p_lse + o_queries, mask=m_t, other=0.0)
        b_delta = tl.load(p_delta + o_queries, mask=m_t, other=0.0)
        t = ahead + q
        # [BLOCK_M, BLOCK_N]
        first = first_key(t, alpha, beta, mask)
        m_older = j[None, :] < first[:, None]
        m_seen = causal(t, j) if TAKEN else sees(t, j, sink, first)
        m_seen = m_seen & m_t[:, None] & m_j[None, :]
        shift = row_shift(p_bias, head, m_t, t, first, sink, SCORE)
        b_weight, b_grad_score, b_moved = _score_gradient(
            b_query, b_key, b_value, b_grad, b_lse, b_delta, b_taken, m_seen, m_older, scale, cap, shift, CAPPED,
            SCORE, TAKEN, PRECISION,
        )  # fmt: skip
        b_grad_value = tl.dot(b_weight.to(b_grad.dtype).T, b_grad, b_grad_value, input_precision=PRECISION)
        b_grad_key = tl.dot(b_grad_score.to(b_query.dtype).T, b_query, b_grad_key, input_precision=PRECISION)
        if TAKEN:
            b_grad_taken += tl.sum(b_moved, 0)
    store_block(p_grad_key, o_rows * DIM, b_grad_key, m_j, DIM, BLOCK_D)
    store_block(p_grad_value, o_rows * VALUE_DIM, b_grad_value, m_j, VALUE_DIM, BLOCK_V)
    if TAKEN:
        tl.store(p_grad_taken + o_rows, b_grad_taken, mask=m_j)


@triton.jit
def _queries(
    p_query,  # [B, H, T, D]
    p_key,  # [B, G, ahead + T, D]
    p_value,  # [B, G, ahead + T, DV]
    p_grad,  # [B, H, T, DV]
    p_lse,  # [B, H, T] float32
    p_delta,  # [B, H, T] float32
    p_grad_query,  # [B, H, T, D] contiguous
    p_grad_shift,  # [B, H, T] float32, with SCORE 1 and 2
    p_taken,  # [B, G, T] float32 contiguous, where TAKEN
    p_rules,  # [G, 4] int32
    p_rows,  # [B, 3] int32
    p_bias,  # [H], with SCORE 1 and 2
    columns,
    ahead,  # keys before those of the queries' columns
    scale,
    cap,
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
    SHARE: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr,
    SCORE: tl.constexpr,
    TAKEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ of BLOCK_M rows of (token, head of the group), over the key tiles that the forward pass visits."""
    b, g, sink, alpha, beta, mask, start, count = place(p_rules, p_rows, GROUPS)
    low = tl.program_id(0) * BLOCK_M // SHARE
    if low >= count:
        return
    high = tl.minimum((tl.program_id(0) * BLOCK_M + BLOCK_M - 1) // SHARE, count - 1)
    # [BLOCK_M], [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_V]
    q, head, m_t = packed_rows(tl.program_id(0), g, count, SHARE, BLOCK_M)
    b_query = load_block(p_query, columns_at(b, head, start + q, query_b, query_h, query_t), m_t, DIM, BLOCK_D)
    b_grad = load_block(p_grad, columns_at(b, head, start + q, grad_b, grad_h, grad_t), m_t, VALUE_DIM, BLOCK_V)
    o_rows = columns_at(b, head, start + q, GROUPS * SHARE * columns, columns, 1)
    b_lse = tl.load(p_lse + o_rows, mask=m_t, other=0.0)
    b_delta = tl.load(p_delta + o_rows, mask=m_t, other=0.0)
    # From here on all is in positions, which start at the first key.
    t, low, high, count = ahead + q, ahead + low, ahead + high, ahead + count
    first = first_key(t, alpha, beta, mask)
    begin = 0 if TAKEN else first_key(low, alpha, beta, mask) // BLOCK_N
    end = (high + BLOCK_N) // BLOCK_N
    sinks = tl.minimum((tl.minimum(sink, high + 1) + BLOCK_N - 1) // BLOCK_N, begin)
    b_grad_query = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_grad_shift = tl.zeros([BLOCK_M], tl.float32)
    shift = row_shift(p_bias, head, m_t, t, first, sink, SCORE)
    for i in range(sinks + end - begin):
        # [BLOCK_N], [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_V]
        j = tl.where(i < sinks, i, begin + i - sinks) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_j = j < count
        b_key = load_block(p_key, columns_at(b, g, start + j, key_b, key_g, key_t), m_j, DIM, BLOCK_D)
        b_value = load_block(p_value, columns_at(b, g, start + j, value_b, value_g, value_t), m_j, VALUE_DIM, BLOCK_V)
        b_taken = tl.zeros([BLOCK_N], tl.float32)
        if TAKEN:
            o_keys = columns_at(b, g, start + j, GROUPS * (ahead + columns), ahead + columns, 1)
            b_taken = tl.load(p_taken + o_keys, mask=m_j, other=0.0)
        # [BLOCK_M, BLOCK_N]
        m_older = j[None, :] < first[:, None]
        m_seen = causal(t, j) if TAKEN else sees(t, j, sink, first)
        m_seen = m_seen & m_t[:, None]
        _, b_grad_score, _ = _score_gradient(
            b_query, b_key, b_value, b_grad, b_lse, b_delta, b_taken, m_seen, m_older, scale, cap, shift, CAPPED,
            SCORE, TAKEN, PRECISION,
        )  # fmt: skip
        if (SCORE == 1) | (SCORE == 2):
            b_grad_shift += tl.sum(b_grad_score, 1)
        b_grad_query = tl.dot(b_grad_score.to(b_key.dtype), b_key, b_grad_query, input_precision=PRECISION)
    store_block(p_grad_query, o_rows * DIM, b_grad_query, m_t, DIM, BLOCK_D)
    if (SCORE == 1) | (SCORE == 2):
        tl.store(p_grad_shift + o_rows, b_grad_shift / scale, mask=m_t)


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    spans: Sequence[Span],
    rows: torch.Tensor,
    scale: float,
    cap: float | None = None,
    extra: torch.Tensor | None = None,
    grad_lse: torch.Tensor | None = None,
    score: int = 0,
    taken: torch.Tensor | None = None,
    hard: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of query `[B, H, T, D]`, key and value `[B, G, T, D]`, and `extra` `[H]` and `taken` if there are any.

    They are zero in columns that are no token.

    Args:
        grad: gradient of `out`, `[B, H, T, D]`.
        lse: base-2 log-sum-exp of every row, `[B, H, T]`, as the forward kernel kept it.
        key, value: may have more columns than the queries, of the positions before.
        rows: `[B, 3]` int32: position of the first query behind the first key, first column and number of tokens.
        cap, extra, score: as of the forward kernel.
        grad_lse: gradient of the natural log-sum-exp, `[B, H, T]`; None where nothing was made of it.
        taken: `[B, G, T]` float32 contiguous, what keys take part with that have left the window, as
            `retain_training.prefill` takes it; None where the others are hidden. `hard`: whether it is 0 or 1.

    The formulas are those of FlashAttention-2 (arXiv 2307.08691), with the tiles of the span rule. The slope of the
    log-sum-exp by a score is the weight of its key, so its gradient enters as a part of `delta`.
    """
    query, key, value, grad = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value, grad))
    batch, heads, columns, dim = query.shape
    groups, keys, value_dim = key.shape[1], key.shape[2], value.shape[-1]
    share = heads // groups
    delta = (grad.float() * out.float()).sum(-1)
    if grad_lse is not None:
        delta = (delta - grad_lse).contiguous()
    grad_query = torch.zeros(batch, heads, columns, dim, dtype=query.dtype, device=query.device)
    grad_key = torch.zeros(batch, groups, keys, dim, dtype=key.dtype, device=key.device)
    grad_value = torch.zeros(batch, groups, keys, value_dim, dtype=value.dtype, device=value.device)
    grad_shift = delta if score == 0 else torch.zeros_like(delta)
    grad_taken = None if taken is None else torch.zeros_like(taken)
    config = backward_config(max(dim, value_dim), query.itemsize, query.device, taken is not None)
    shape = {
        "SHARE": share,
        "GROUPS": groups,
        "DIM": dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "BLOCK_V": max(16, triton.next_power_of_2(value_dim)),
        "BLOCK_M": config["block_m"],
        "BLOCK_N": config["block_n"],
        "CAPPED": cap is not None,
        "SCORE": score,
        "TAKEN": 0 if taken is None else 1 + hard,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        "num_warps": config["warps"],
        "num_stages": config["stages"],
    }
    strides = [stride for x in (query, key, value, grad) for stride in x.stride()[:3]]
    rules = span_rules(tuple(spans), query.device)
    bias = rules if extra is None else extra
    rest = (rules, rows, bias, columns, keys - columns, scale, 1.0 if cap is None else cap, *strides)
    _keys[(triton.cdiv(keys, config["block_n"]), batch * groups)](
        query, key, value, grad, lse, delta, grad_key, grad_value, taken, grad_taken, *rest, **shape
    )
    _queries[(triton.cdiv(columns * share, config["block_m"]), batch * groups)](
        query, key, value, grad, lse, delta, grad_query, grad_shift, taken, *rest, **shape
    )
    grad_extra = None
    if extra is not None and score != 0:
        grad_extra = grad_shift.sum((0, 2)).to(extra.dtype)
    elif extra is not None:  # its weight times (0 - delta), as of a key whose value is zero
        column = torch.arange(columns, device=rows.device)
        live = (column >= rows[:, 1:2]) & (column < rows[:, 1:2] + rows[:, 2:])
        weight = torch.exp2(extra.float()[:, None] * LOG2E.value - lse)
        grad_extra = -torch.where(live[:, None], weight * delta, 0).sum((0, 2)).to(extra.dtype)
    return grad_query, grad_key, grad_value, grad_extra, grad_taken
