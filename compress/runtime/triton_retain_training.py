"""Attention of `retain` heads while their decisions are trained as Triton kernels: forward and all gradients.

`retain_training.prefill` is the specification. Every query is met with every key before it, since also a key that is
left out has a gradient: nothing is skipped, as in dense attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels need Triton; without it attention runs in plain PyTorch") from error

from .retain_training import prefill as reference_prefill
from .scores import KernelScores, Scores
from .span import Span
from .triton_backward import extra_gradient
from .triton_prefill import NEVER
from .triton_scores import sigmoid
from .triton_span import columns_at, first_key, load_block, packed_rows, place, span_rules, store_block, tanh
from .tuned import retain_training_config

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scores(b_query, b_key, scale, cap, CAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """Scores within the cap in base 2, and their slope by the products of query and key, `[M, N]` each."""
    b_product = tl.dot(b_query, b_key.T, input_precision=PRECISION)
    if CAPPED:
        b_share = tanh(b_product * scale / cap)
        return b_share * (cap * LOG2E), scale * (1.0 - b_share * b_share)
    return b_product * (scale * LOG2E), tl.zeros_like(b_product) + scale


@triton.jit
def _taken(b_score, b_taken, m_causal, m_older, HARD: tl.constexpr):
    """Scores `[M, N]` with the decisions `[N]` of keys that have left the window; -inf where a key takes no part."""
    if HARD:
        return tl.where(m_causal & (~m_older | (b_taken != 0.0)[None, :]), b_score, float("-inf"))
    return tl.where(m_causal, b_score + tl.where(m_older, (b_taken * LOG2E)[None, :], 0.0), float("-inf"))


@triton.jit
def _forward(
    p_query,  # [B, H, T, D]
    p_key,  # [B, G, T, D]
    p_value,  # [B, G, T, DV]
    p_taken,  # [B, G, T] float32 contiguous: 0 or 1 where HARD, else logarithms of weights
    p_out,  # [B, H, T, DV] contiguous
    p_lse,  # [B, H, T] float32: log-sum-exp in base 2
    p_rules,  # [G, 4] int32
    p_rows,  # [B, 3] int32
    p_extra,  # [H], where EXTRA
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
    SHARE: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr,
    EXTRA: tl.constexpr,
    HARD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Outputs of BLOCK_M rows of (token, head of the group)."""
    b, g, _, alpha, beta, mask, start, count = place(p_rules, p_rows, GROUPS)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # long ones first
    if tile * BLOCK_M // SHARE >= count:
        return
    high = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // SHARE, count - 1)
    # [BLOCK_M], [BLOCK_M, BLOCK_D]
    t, head, m_t = packed_rows(tile, g, count, SHARE, BLOCK_M)
    b_query = load_block(p_query, columns_at(b, head, start + t, query_b, query_h, query_t), m_t, DIM, BLOCK_D)
    first = first_key(t, alpha, beta, mask)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    top = tl.full([BLOCK_M], NEVER, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if EXTRA:
        top = tl.load(p_extra + head).to(tl.float32) * LOG2E
        total += 1.0
    for i in range((high + BLOCK_N) // BLOCK_N):
        # [BLOCK_N], [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_V]
        j = i * BLOCK_N + tl.arange(0, BLOCK_N)
        m_j = j < count
        b_key = load_block(p_key, columns_at(b, g, start + j, key_b, key_g, key_t), m_j, DIM, BLOCK_D)
        b_value = load_block(p_value, columns_at(b, g, start + j, value_b, value_g, value_t), m_j, VALUE_DIM, BLOCK_V)
        b_taken = tl.load(p_taken + columns_at(b, g, start + j, GROUPS * columns, columns, 1), mask=m_j, other=0.0)
        # [BLOCK_M, BLOCK_N]
        b_score, _slope = _scores(b_query, b_key, scale, cap, CAPPED, PRECISION)
        m_causal = (j[None, :] <= t[:, None]) & m_j[None, :]
        b_score = _taken(b_score, b_taken, m_causal, j[None, :] < first[:, None], HARD)
        best = tl.maximum(top, tl.max(b_score, 1))
        weight = tl.exp2(b_score - best[:, None])
        shrink = tl.exp2(top - best)
        acc = tl.dot(weight.to(b_value.dtype), b_value, acc * shrink[:, None], input_precision=PRECISION)
        total = total * shrink + tl.sum(weight, 1)
        top = best
    o_rows = columns_at(b, head, start + t, GROUPS * SHARE * columns, columns, 1)
    store_block(p_out, o_rows * VALUE_DIM, acc / total[:, None], m_t, VALUE_DIM, BLOCK_V)
    tl.store(p_lse + o_rows, top + tl.log2(total), mask=m_t)


@triton.jit
def _gradients(
    b_query, b_key, b_value, b_grad, b_lse, b_delta, b_taken, m_causal, m_older, scale, cap,
    CAPPED: tl.constexpr, HARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weights, and the gradients of the products of query and key and of the decisions, `[M, N]` float32 each."""
    b_score, slope = _scores(b_query, b_key, scale, cap, CAPPED, PRECISION)
    b_weight = tl.exp2(_taken(b_score, b_taken, m_causal, m_older, HARD) - b_lse[:, None])
    b_change = tl.dot(b_grad, b_value.T, input_precision=PRECISION) - b_delta[:, None]
    b_grad_score = b_weight * b_change
    b_grad_taken = b_grad_score
    if HARD:  # of a key that is left out what it would change to keep it, by the share that it would have
        b_share = tl.where((b_taken != 0.0)[None, :], b_weight, sigmoid(b_score - b_lse[:, None]))
        b_grad_taken = b_share * b_change
    return b_weight, b_grad_score * slope, tl.where(m_causal & m_older, b_grad_taken, 0.0)


@triton.jit
def _keys(
    p_query,  # [B, H, T, D]
    p_key,  # [B, G, T, D]
    p_value,  # [B, G, T, DV]
    p_taken,  # [B, G, T] float32 contiguous
    p_grad,  # [B, H, T, DV]
    p_lse,  # [B, H, T] float32
    p_delta,  # [B, H, T] float32
    p_grad_key,  # [B, G, T, D] contiguous
    p_grad_value,  # [B, G, T, DV] contiguous
    p_grad_taken,  # [B, G, T] float32 contiguous
    p_rules,  # [G, 4] int32
    p_rows,  # [B, 3] int32
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
    HARD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of BLOCK_N keys and values of one group, and of the decisions about them."""
    b, g, _, alpha, beta, mask, start, count = place(p_rules, p_rows, GROUPS)
    low = tl.program_id(0) * BLOCK_N
    if low >= count:
        return
    # [BLOCK_N], [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_V]
    j = low + tl.arange(0, BLOCK_N)
    m_j = j < count
    b_key = load_block(p_key, columns_at(b, g, start + j, key_b, key_g, key_t), m_j, DIM, BLOCK_D)
    b_value = load_block(p_value, columns_at(b, g, start + j, value_b, value_g, value_t), m_j, VALUE_DIM, BLOCK_V)
    o_keys = columns_at(b, g, start + j, GROUPS * columns, columns, 1)
    b_taken = tl.load(p_taken + o_keys, mask=m_j, other=0.0)
    b_grad_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_grad_value = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    b_grad_taken = tl.zeros([BLOCK_N], tl.float32)
    for tile in range(low * SHARE // BLOCK_M, (count * SHARE + BLOCK_M - 1) // BLOCK_M):
        # [BLOCK_M], [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_V]
        t, head, m_t = packed_rows(tile, g, count, SHARE, BLOCK_M)
        b_query = load_block(p_query, columns_at(b, head, start + t, query_b, query_h, query_t), m_t, DIM, BLOCK_D)
        b_grad = load_block(p_grad, columns_at(b, head, start + t, grad_b, grad_h, grad_t), m_t, VALUE_DIM, BLOCK_V)
        o_rows = columns_at(b, head, start + t, GROUPS * SHARE * columns, columns, 1)
        b_lse = tl.load(p_lse + o_rows, mask=m_t, other=0.0)
        b_delta = tl.load(p_delta + o_rows, mask=m_t, other=0.0)
        first = first_key(t, alpha, beta, mask)
        # [BLOCK_M, BLOCK_N]
        m_causal = (j[None, :] <= t[:, None]) & m_t[:, None] & m_j[None, :]
        b_weight, b_grad_score, b_moved = _gradients(
            b_query, b_key, b_value, b_grad, b_lse, b_delta, b_taken, m_causal, j[None, :] < first[:, None], scale,
            cap, CAPPED, HARD, PRECISION,
        )  # fmt: skip
        b_grad_value = tl.dot(b_weight.to(b_grad.dtype).T, b_grad, b_grad_value, input_precision=PRECISION)
        b_grad_key = tl.dot(b_grad_score.to(b_query.dtype).T, b_query, b_grad_key, input_precision=PRECISION)
        b_grad_taken += tl.sum(b_moved, 0)
    store_block(p_grad_key, o_keys * DIM, b_grad_key, m_j, DIM, BLOCK_D)
    store_block(p_grad_value, o_keys * VALUE_DIM, b_grad_value, m_j, VALUE_DIM, BLOCK_V)
    tl.store(p_grad_taken + o_keys, b_grad_taken, mask=m_j)


@triton.jit
def _queries(
    p_query,  # [B, H, T, D]
    p_key,  # [B, G, T, D]
    p_value,  # [B, G, T, DV]
    p_taken,  # [B, G, T] float32 contiguous
    p_grad,  # [B, H, T, DV]
    p_lse,  # [B, H, T] float32
    p_delta,  # [B, H, T] float32
    p_grad_query,  # [B, H, T, D] contiguous
    p_rules,  # [G, 4] int32
    p_rows,  # [B, 3] int32
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
    HARD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of BLOCK_M rows of (token, head of the group)."""
    b, g, _, alpha, beta, mask, start, count = place(p_rules, p_rows, GROUPS)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    if tile * BLOCK_M // SHARE >= count:
        return
    high = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // SHARE, count - 1)
    # [BLOCK_M], [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_V]
    t, head, m_t = packed_rows(tile, g, count, SHARE, BLOCK_M)
    b_query = load_block(p_query, columns_at(b, head, start + t, query_b, query_h, query_t), m_t, DIM, BLOCK_D)
    b_grad = load_block(p_grad, columns_at(b, head, start + t, grad_b, grad_h, grad_t), m_t, VALUE_DIM, BLOCK_V)
    o_rows = columns_at(b, head, start + t, GROUPS * SHARE * columns, columns, 1)
    b_lse = tl.load(p_lse + o_rows, mask=m_t, other=0.0)
    b_delta = tl.load(p_delta + o_rows, mask=m_t, other=0.0)
    first = first_key(t, alpha, beta, mask)
    b_grad_query = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in range((high + BLOCK_N) // BLOCK_N):
        # [BLOCK_N], [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_V]
        j = i * BLOCK_N + tl.arange(0, BLOCK_N)
        m_j = j < count
        b_key = load_block(p_key, columns_at(b, g, start + j, key_b, key_g, key_t), m_j, DIM, BLOCK_D)
        b_value = load_block(p_value, columns_at(b, g, start + j, value_b, value_g, value_t), m_j, VALUE_DIM, BLOCK_V)
        b_taken = tl.load(p_taken + columns_at(b, g, start + j, GROUPS * columns, columns, 1), mask=m_j, other=0.0)
        # [BLOCK_M, BLOCK_N]
        m_causal = (j[None, :] <= t[:, None]) & m_t[:, None] & m_j[None, :]
        _weight, b_grad_score, _moved = _gradients(
            b_query, b_key, b_value, b_grad, b_lse, b_delta, b_taken, m_causal, j[None, :] < first[:, None], scale,
            cap, CAPPED, HARD, PRECISION,
        )  # fmt: skip
        b_grad_query = tl.dot(b_grad_score.to(b_key.dtype), b_key, b_grad_query, input_precision=PRECISION)
    store_block(p_grad_query, o_rows * DIM, b_grad_query, m_t, DIM, BLOCK_D)


def _shape(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, part: str) -> dict[str, Any]:
    """What the three kernels are compiled for."""
    dim, value_dim = query.shape[-1], value.shape[-1]
    config = retain_training_config(max(dim, value_dim), query.element_size(), query.device)[part]
    return {
        "SHARE": query.shape[1] // key.shape[1],
        "GROUPS": key.shape[1],
        "DIM": dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "BLOCK_V": max(16, triton.next_power_of_2(value_dim)),
        "BLOCK_M": config["block_m"],
        "BLOCK_N": config["block_n"],
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        "num_warps": config["warps"],
        "num_stages": config["stages"],
    }


class _Trained(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        taken: torch.Tensor,
        spans: tuple[Span, ...],
        rows: torch.Tensor,
        hard: bool,
        scale: float,
        cap: float | None,
        extra: torch.Tensor | None,
    ) -> torch.Tensor:
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        decided = taken.float().contiguous()
        batch, heads, columns, _ = query.shape
        out = query.new_zeros(batch, heads, columns, value.shape[-1])
        lse = torch.zeros(batch, heads, columns, dtype=torch.float32, device=query.device)
        shape = _shape(query, key, value, "forward") | {"CAPPED": cap is not None, "EXTRA": extra is not None}
        strides = [stride for x in (query, key, value) for stride in x.stride()[:3]]
        rules = span_rules(spans, query.device)
        tiles = triton.cdiv(columns * shape["SHARE"], shape["BLOCK_M"])
        _forward[(tiles, batch * shape["GROUPS"])](
            query, key, value, decided, out, lse, rules, rows, rules if extra is None else extra,
            columns, scale, 1.0 if cap is None else cap, *strides, HARD=hard, **shape,
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, decided, rows, out, lse, extra)
        ctx.spans, ctx.hard, ctx.scale, ctx.cap, ctx.dtype = spans, hard, scale, cap, taken.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, key, value, taken, rows, out, lse, extra = ctx.saved_tensors
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        delta = (grad.float() * out.float()).sum(-1)
        batch, _, columns, _ = query.shape
        of_query, of_key, of_value, of_taken = (
            torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value, taken)
        )
        strides = [stride for x in (query, key, value, grad) for stride in x.stride()[:3]]
        rest = (span_rules(ctx.spans, query.device), rows, columns, ctx.scale, 1.0 if ctx.cap is None else ctx.cap)
        given = (query, key, value, taken, grad, lse, delta)
        forms = {"CAPPED": ctx.cap is not None, "HARD": ctx.hard}
        shape = _shape(query, key, value, "backward") | forms
        programs = batch * shape["GROUPS"]
        _keys[(triton.cdiv(columns, shape["BLOCK_N"]), programs)](
            *given, of_key, of_value, of_taken, *rest, *strides, **shape
        )
        _queries[(triton.cdiv(columns * shape["SHARE"], shape["BLOCK_M"]), programs)](
            *given, of_query, *rest, *strides, **shape
        )
        of_extra = None if extra is None else extra_gradient(extra, lse, delta, rows)
        return of_query, of_key, of_value, of_taken.to(ctx.dtype), None, None, None, None, None, of_extra


def prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    taken: torch.Tensor,
    spans: Sequence[Span],
    positions: torch.Tensor,
    *,
    hard: bool,
    scale: float | None = None,
    dropout: float = 0.0,
    scores: Scores | None = None,
) -> torch.Tensor:
    """As `retain_training.prefill`, which it calls for dropout and for scores without a kernel.

    Args:
        positions: `[B, T]`; the tokens of a sequence are one run of columns.
    """
    form = KernelScores() if scores is None else scores.for_kernels
    if form is None or form.score != 0 or dropout > 0:
        options: dict[str, Any] = {"hard": hard, "scale": scale, "dropout": dropout, "scores": scores}
        return reference_prefill(query, key, value, taken, spans, positions, **options)
    live = positions >= 0
    rows = torch.stack([torch.zeros_like(positions[:, 0]), live.int().argmax(1), live.sum(1)], 1).int()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out: torch.Tensor = _Trained.apply(
        query, key, value, taken, tuple(spans), rows, hard, scale, form.cap, form.by_head
    )
    return out
