"""Attention of `retain` heads while their decisions are trained in Triton; gradients are those of `triton_backward`.

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

from .reference import Rows
from .retain_training import prefill as reference_prefill
from .scores import KernelScores, Scores
from .span import Span
from .triton_backward import backward, with_decisions, within_cap
from .triton_prefill import NEVER, add_to_softmax
from .triton_span import causal, columns_at, first_key, load_block, packed_rows, place, span_rules, store_block
from .tuned_retain import retain_training_config

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _forward(
    p_query,  # [B, H, T, D]
    p_key,  # [B, G, T, D]
    p_value,  # [B, G, T, DV]
    p_taken,  # [B, G, T] float32 contiguous: with TAKEN 1 logarithms of weights, with 2 whether a key is kept
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
    TAKEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Outputs of BLOCK_M rows of (token, head of the group)."""
    b, g, _sink, alpha, beta, mask, start, count = place(p_rules, p_rows, GROUPS)
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
        b_score, _slope = within_cap(b_query, b_key, scale, cap, CAPPED, PRECISION)
        m_seen = causal(t, j) & m_j[None, :]
        b_score = with_decisions(b_score, b_taken, m_seen, j[None, :] < first[:, None], TAKEN)
        acc, top, total = add_to_softmax(acc, top, total, b_score, b_value, 1.0, PRECISION)
    o_rows = columns_at(b, head, start + t, GROUPS * SHARE * columns, columns, 1)
    store_block(p_out, o_rows * VALUE_DIM, acc / total[:, None], m_t, VALUE_DIM, BLOCK_V)
    tl.store(p_lse + o_rows, top + tl.log2(total), mask=m_t)


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
        config = retain_training_config(max(query.shape[-1], value.shape[-1]), query.element_size(), query.device)
        groups, share = key.shape[1], heads // key.shape[1]
        strides = [stride for x in (query, key, value) for stride in x.stride()[:3]]
        rules = span_rules(spans, query.device)
        _forward[(triton.cdiv(columns * share, config["block_m"]), batch * groups)](
            query, key, value, decided, out, lse, rules, rows, rules if extra is None else extra,
            columns, scale, 1.0 if cap is None else cap, *strides,
            SHARE=share,
            GROUPS=groups,
            DIM=query.shape[-1],
            VALUE_DIM=value.shape[-1],
            BLOCK_D=max(16, triton.next_power_of_2(query.shape[-1])),
            BLOCK_V=max(16, triton.next_power_of_2(value.shape[-1])),
            BLOCK_M=config["block_m"],
            BLOCK_N=config["block_n"],
            CAPPED=cap is not None,
            EXTRA=extra is not None,
            TAKEN=1 + hard,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=config["warps"],
            num_stages=config["stages"],
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, decided, rows, out, lse, extra)
        ctx.spans, ctx.hard, ctx.scale, ctx.cap, ctx.dtype = spans, hard, scale, cap, taken.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, key, value, taken, rows, out, lse, extra = ctx.saved_tensors
        *found, of_extra, of_taken = backward(
            grads[0],
            query,
            key,
            value,
            out,
            lse,
            ctx.spans,
            rows,
            ctx.scale,
            ctx.cap,
            extra,
            taken=taken,
            hard=ctx.hard,
        )
        assert of_taken is not None
        return (*found, of_taken.to(ctx.dtype), None, None, None, None, None, of_extra)


def prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    taken: torch.Tensor,
    spans: Sequence[Span],
    rows: Rows,
    *,
    hard: bool,
    scale: float | None = None,
    dropout: float = 0.0,
    scores: Scores | None = None,
) -> torch.Tensor:
    """As `retain_training.prefill`, which it calls for dropout and for scores without a kernel."""
    form = KernelScores() if scores is None else scores.for_kernels
    if form is None or form.score != 0 or dropout > 0:
        options: dict[str, Any] = {"hard": hard, "scale": scale, "dropout": dropout, "scores": scores}
        return reference_prefill(query, key, value, taken, spans, rows, **options)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out: torch.Tensor = _Trained.apply(
        query, key, value, taken, tuple(spans), rows.tensor(query.device), hard, scale, form.cap, form.by_head
    )
    return out
