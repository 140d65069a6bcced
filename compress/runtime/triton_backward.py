"""Gradients of the prefill kernel: one pass over keys for dK and dV, one over queries for dQ."""

from __future__ import annotations

from collections.abc import Sequence

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels need Triton; without it attention runs in plain PyTorch") from error

from .span import Span
from .triton_span import first_key, last_query, span_rules, tanh
from .tuned import backward_config

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(ptr, b, head, column, mask, stride_b, stride_h, stride_t, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `[rows, BLOCK_D]` of `[B, heads, T, D]`, zero where masked: what is no token may hold NaN."""
    dims = tl.arange(0, BLOCK_D)
    at = b.to(tl.int64) * stride_b + head * stride_h + column.to(tl.int64) * stride_t
    return tl.load(ptr + at[:, None] + dims[None, :], mask=mask[:, None] & (dims < DIM)[None, :], other=0.0)


@triton.jit
def _score_gradient(
    query, key, value, grad, lse, delta, seen, scale, cap, CAPPED: tl.constexpr, PRECISION: tl.constexpr
):
    """Weights and the gradient of the products of query and key, each `[rows, keys]` float32."""
    score = tl.dot(query, key.T, input_precision=PRECISION) * scale
    slope = scale
    if CAPPED:
        share = tanh(score / cap)
        score = cap * share
        slope = scale * (1.0 - share * share)
    weight = tl.exp2(tl.where(seen, score * LOG2E - lse[:, None], float("-inf")))
    return weight, weight * (tl.dot(grad, value.T, input_precision=PRECISION) - delta[:, None]) * slope


@triton.jit
def _keys(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_ptr,
    lse_ptr,  # [B, H, T]
    delta_ptr,  # [B, H, T]
    grad_key_ptr,
    grad_value_ptr,
    rules_ptr,
    rows_ptr,
    columns,
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
    PRECISION: tl.constexpr,
):
    """dK and dV of BLOCK_N keys of one group: the queries that see any of them are one run."""
    b = tl.program_id(1) // GROUPS
    g = tl.program_id(1) % GROUPS
    sink = tl.load(rules_ptr + g * 3)
    alpha = tl.load(rules_ptr + g * 3 + 1)
    beta = tl.load(rules_ptr + g * 3 + 2)
    start = tl.load(rows_ptr + b * 3 + 1)
    count = tl.load(rows_ptr + b * 3 + 2)
    low = tl.program_id(0) * BLOCK_N
    if low >= count:
        return
    j = low + tl.arange(0, BLOCK_N)
    live = j < count
    key = _tile(key_ptr, b, g, start + j, live, key_b, key_g, key_t, DIM, BLOCK_D)
    value = _tile(value_ptr, b, g, start + j, live, value_b, value_g, value_t, VALUE_DIM, BLOCK_V)
    last = last_query(tl.minimum(low + BLOCK_N, count) - 1, alpha, beta)
    last = tl.minimum(tl.where(low < sink, count - 1, last), count - 1)
    grad_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_value = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for tile in range(low * SHARE // BLOCK_M, ((last + 1) * SHARE + BLOCK_M - 1) // BLOCK_M):
        packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        t = packed // SHARE
        head = g * SHARE + packed % SHARE
        known = t < count
        query = _tile(query_ptr, b, head, start + t, known, query_b, query_h, query_t, DIM, BLOCK_D)
        grad = _tile(grad_ptr, b, head, start + t, known, grad_b, grad_h, grad_t, VALUE_DIM, BLOCK_V)
        at = (b * GROUPS * SHARE + head).to(tl.int64) * columns + start + t
        lse = tl.load(lse_ptr + at, mask=known, other=0.0)
        delta = tl.load(delta_ptr + at, mask=known, other=0.0)
        seen = (j[None, :] <= t[:, None]) & ((j[None, :] < sink) | (j[None, :] >= first_key(t, alpha, beta)[:, None]))
        seen = seen & known[:, None] & live[None, :]
        weight, grad_score = _score_gradient(query, key, value, grad, lse, delta, seen, scale, cap, CAPPED, PRECISION)
        grad_value = tl.dot(weight.to(grad.dtype).T, grad, grad_value, input_precision=PRECISION)
        grad_key = tl.dot(grad_score.to(query.dtype).T, query, grad_key, input_precision=PRECISION)
    at = (b * GROUPS + g).to(tl.int64) * columns + start + j
    dims = tl.arange(0, BLOCK_D)
    where = grad_key_ptr + at[:, None] * DIM + dims[None, :]
    tl.store(where, grad_key.to(grad_key_ptr.dtype.element_ty), mask=live[:, None] & (dims < DIM)[None, :])
    dims = tl.arange(0, BLOCK_V)
    where = grad_value_ptr + at[:, None] * VALUE_DIM + dims[None, :]
    tl.store(where, grad_value.to(grad_value_ptr.dtype.element_ty), mask=live[:, None] & (dims < VALUE_DIM)[None, :])


@triton.jit
def _queries(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    grad_query_ptr,
    rules_ptr,
    rows_ptr,
    columns,
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
    PRECISION: tl.constexpr,
):
    """dQ of BLOCK_M rows of (position, head of the group), over the key tiles that the forward pass visits."""
    b = tl.program_id(1) // GROUPS
    g = tl.program_id(1) % GROUPS
    sink = tl.load(rules_ptr + g * 3)
    alpha = tl.load(rules_ptr + g * 3 + 1)
    beta = tl.load(rules_ptr + g * 3 + 2)
    start = tl.load(rows_ptr + b * 3 + 1)
    count = tl.load(rows_ptr + b * 3 + 2)
    low = tl.program_id(0) * BLOCK_M // SHARE
    if low >= count:
        return
    high = tl.minimum((tl.program_id(0) * BLOCK_M + BLOCK_M - 1) // SHARE, count - 1)
    packed = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    t = packed // SHARE
    head = g * SHARE + packed % SHARE
    known = t < count
    query = _tile(query_ptr, b, head, start + t, known, query_b, query_h, query_t, DIM, BLOCK_D)
    grad = _tile(grad_ptr, b, head, start + t, known, grad_b, grad_h, grad_t, VALUE_DIM, BLOCK_V)
    at = (b * GROUPS * SHARE + head).to(tl.int64) * columns + start + t
    lse = tl.load(lse_ptr + at, mask=known, other=0.0)
    delta = tl.load(delta_ptr + at, mask=known, other=0.0)
    first = first_key(t, alpha, beta)
    begin = first_key(low, alpha, beta) // BLOCK_N
    end = (high + BLOCK_N) // BLOCK_N
    sinks = tl.minimum((tl.minimum(sink, high + 1) + BLOCK_N - 1) // BLOCK_N, begin)
    grad_query = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in range(sinks + end - begin):
        j = tl.where(i < sinks, i, begin + i - sinks) * BLOCK_N + tl.arange(0, BLOCK_N)
        live = j < count
        key = _tile(key_ptr, b, g, start + j, live, key_b, key_g, key_t, DIM, BLOCK_D)
        value = _tile(value_ptr, b, g, start + j, live, value_b, value_g, value_t, VALUE_DIM, BLOCK_V)
        seen = (j[None, :] <= t[:, None]) & ((j[None, :] < sink) | (j[None, :] >= first[:, None])) & known[:, None]
        _, grad_score = _score_gradient(query, key, value, grad, lse, delta, seen, scale, cap, CAPPED, PRECISION)
        grad_query = tl.dot(grad_score.to(key.dtype), key, grad_query, input_precision=PRECISION)
    dims = tl.arange(0, BLOCK_D)
    where = grad_query_ptr + at[:, None] * DIM + dims[None, :]
    tl.store(where, grad_query.to(grad_query_ptr.dtype.element_ty), mask=known[:, None] & (dims < DIM)[None, :])


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of query `[B, H, T, D]`, key and value `[B, G, T, D]`, and `extra` `[H]` if there is any.

    They are zero in columns that are no token.

    Args:
        grad: gradient of `out`, `[B, H, T, D]`.
        lse: base-2 log-sum-exp of every row, `[B, H, T]`, as the forward kernel kept it.
        rows: `[B, 3]` int32: 0 (there is no cache here), first column and number of tokens.
        cap, extra: of `scores.Scores`.

    The formulas are those of FlashAttention-2 (arXiv 2307.08691), with the tiles of the span rule.
    """
    query, key, value, grad = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value, grad))
    batch, heads, columns, dim = query.shape
    groups, value_dim = key.shape[1], value.shape[-1]
    share = heads // groups
    delta = (grad.float() * out.float()).sum(-1)
    grad_query = torch.zeros(batch, heads, columns, dim, dtype=query.dtype, device=query.device)
    grad_key = torch.zeros(batch, groups, columns, dim, dtype=key.dtype, device=key.device)
    grad_value = torch.zeros(batch, groups, columns, value_dim, dtype=value.dtype, device=value.device)
    config = backward_config(max(dim, value_dim), query.device)
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
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        "num_warps": config["warps"],
        "num_stages": config["stages"],
    }
    strides = [stride for x in (query, key, value, grad) for stride in x.stride()[:3]]
    rest = (span_rules(tuple(spans), query.device), rows, columns, scale, 1.0 if cap is None else cap, *strides)
    _keys[(triton.cdiv(columns, config["block_n"]), batch * groups)](
        query, key, value, grad, lse, delta, grad_key, grad_value, *rest, **shape
    )
    _queries[(triton.cdiv(columns * share, config["block_m"]), batch * groups)](
        query, key, value, grad, lse, delta, grad_query, *rest, **shape
    )
    grad_extra = None
    if extra is not None:  # its weight times (0 - delta), as of a key whose value is zero
        column = torch.arange(columns, device=rows.device)
        live = (column >= rows[:, 1:2]) & (column < rows[:, 1:2] + rows[:, 2:])
        weight = torch.exp2(extra.float()[:, None] * LOG2E.value - lse)
        grad_extra = -torch.where(live[:, None], weight * delta, 0).sum((0, 2)).to(extra.dtype)
    return grad_query, grad_key, grad_value, grad_extra
