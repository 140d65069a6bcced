"""Linear heads in a decode step, in Triton: queries read the state, and a page that leaves the sight goes into it."""

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
from .span import PAGE, Span
from .triton_linear import load_part, store_part
from .triton_linear_features import KINDS, activate, root, sides
from .triton_span import first_key, load_rule, span_rules
from .tuned import linear_decode_config


@triton.jit
def _read_one(
    p_query,  # [B, H, F] features
    p_state,  # [B, G, F, COLUMNS] float32
    p_lengths,  # [B] int32, 0 where a sequence takes no part
    p_window,  # [B, H, DV] what the softmax over the keys in sight gives, where MERGE
    p_lse,  # [B, H] float32, where MERGE
    p_gain,  # [B, H] float32, where MERGE
    p_out,  # [B, H, DV]
    query_b,
    query_h,
    window_b,
    window_h,
    out_b,
    out_h,
    SHARE: tl.constexpr,
    GROUPS: tl.constexpr,
    FEATURES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MERGE: tl.constexpr,
    MEAN: tl.constexpr,
    STAGES: tl.constexpr,
    ROUND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_V numbers of the outputs of all query heads of one (sequence, group), from one look at the state.

    With MEAN what is read is divided by the normaliser, in the state's last column, and with MERGE merged.
    """
    at_v = tl.program_id(0) * BLOCK_V
    bg = tl.program_id(1).to(tl.int64)
    b = bg // GROUPS
    g = bg % GROUPS
    p_rows = p_state + bg * FEATURES * COLUMNS
    # [BLOCK_M] query heads of the group, [BLOCK_M, BLOCK_V]
    o_row = tl.arange(0, BLOCK_M)
    m_row = o_row < SHARE
    head = g * SHARE + o_row
    out = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    for at_f in tl.range(0, FEATURES, BLOCK_F, num_stages=STAGES):
        # [BLOCK_F, BLOCK_V], [BLOCK_M, BLOCK_F]
        o_f = at_f + tl.arange(0, BLOCK_F)
        b_state = load_part(p_rows, o_f * COLUMNS, o_f < FEATURES, at_v, VALUE_DIM, BLOCK_V)
        b_query = load_part(p_query + b * query_b, head * query_h, m_row, at_f, FEATURES, BLOCK_F)
        if ROUND:
            b_query = b_query.to(tl.bfloat16)
        b_query = b_query.to(tl.float32)
        out = tl.dot(b_query, b_state, out, input_precision=PRECISION)
        if MEAN:
            b_norm = tl.load(p_rows + o_f * COLUMNS + VALUE_DIM, mask=o_f < FEATURES, other=0.0)
            mass += tl.sum(b_query * b_norm[None, :], 1)
    if MEAN:
        some = mass > 0
        total = tl.where(some, mass, 1.0)
        out = tl.where(some[:, None], out / total[:, None], 0.0)
    if MERGE:
        o_head = b * GROUPS * SHARE + head
        b_lse = tl.load(p_lse + o_head, mask=m_row, other=0.0)
        b_gain = tl.load(p_gain + o_head, mask=m_row, other=0.0)
        share = tl.where(some, tl.sigmoid(b_lse - tl.log(total) - b_gain), 1.0)
        b_window = load_part(p_window + b * window_b, head * window_h, m_row, at_v, VALUE_DIM, BLOCK_V).to(tl.float32)
        out = share[:, None] * b_window + (1.0 - share)[:, None] * out
    out = tl.where(tl.load(p_lengths + b) > 0, out, 0.0)
    store_part(p_out + b * out_b, head * out_h, out, m_row, at_v, VALUE_DIM, BLOCK_V)


def read_one(
    query: torch.Tensor,
    state: torch.Tensor,
    lengths: torch.Tensor,
    value_dim: int,
    dtype: torch.dtype,
    *,
    mean: bool,
    window: tuple[torch.Tensor, torch.Tensor] | None = None,
    log_gain: torch.Tensor | None = None,
) -> torch.Tensor:
    """What one token a sequence reads, `[B, H, DV]`, zero where its length is 0; no host sync.

    Args:
        query: features `[B, H, F]`.
        state: `[B, G, F, DV + 1]` float32, or without the normaliser `[B, G, F, DV]`.
        lengths: `[B]`.
        dtype: that of the cache; the numbers that are multiplied with the state are rounded to it.
        mean: divide by the normaliser; the result is then in `dtype`, else in float32.
        window, log_gain: as in `triton_linear.additive`, without the axis of tokens.
    """
    batch, heads, count = query.shape
    groups, columns = state.shape[1], state.shape[-1]
    share = heads // groups
    query = query if query.stride(-1) == 1 else query.contiguous()
    state = state.contiguous()
    out = query.new_empty(batch, heads, value_dim, dtype=dtype if mean else torch.float32)
    over, lse = (out, out) if window is None else window
    gain = lse
    if window is not None:
        over = over if over.stride(-1) == 1 else over.contiguous()
        lse = lse.float().contiguous()
        gain = torch.zeros_like(lse) if log_gain is None else log_gain.float().expand_as(lse).contiguous()
    config = linear_decode_config(query.device)
    block_f, block_v = (max(16, min(config["block"], triton.next_power_of_2(size))) for size in (count, value_dim))
    _read_one[(triton.cdiv(value_dim, block_v), batch * groups)](
        query,
        state,
        lengths,
        over,
        lse,
        gain,
        out,
        query.stride(0),
        query.stride(1),
        over.stride(0),
        over.stride(1),
        out.stride(0),
        out.stride(1),
        SHARE=share,
        GROUPS=groups,
        FEATURES=count,
        VALUE_DIM=value_dim,
        COLUMNS=columns,
        BLOCK_M=max(16, triton.next_power_of_2(share)),
        BLOCK_F=block_f,
        BLOCK_V=block_v,
        MERGE=window is not None,
        MEAN=mean,
        STAGES=config["stages"],
        ROUND=dtype == torch.bfloat16,
        PRECISION="tf32" if dtype == torch.bfloat16 else "tf32x3",
        num_warps=config["warps"],
    )
    return out


@triton.jit
def _absorb(
    p_state,  # [B, G, F, DV + 1] float32
    p_key_pages,  # [places, PAGE, D]
    p_value_pages,  # [places, PAGE, DV]
    p_table,  # [B, G, numbers] int32
    p_lengths,  # [B] int32: tokens of each sequence with the new one, 0 where it takes no part
    p_rules,  # [G, 4] int32
    p_map,  # [G, D, WIDTH] float32 or the dtype of the model
    p_bias,  # [G, WIDTH], where BIASED
    p_decay,  # [G] float32 logarithms of decays, where DECAY
    numbers,
    root,  # what projected numbers are multiplied with
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SIDES: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PAGE: tl.constexpr,
    BIASED: tl.constexpr,
    DECAY: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_V columns of one state take in the page that the new token does not see any more; mostly there is none."""
    bg = tl.program_id(1).to(tl.int64)
    b = bg // GROUPS
    g = bg % GROUPS
    t = tl.load(p_lengths + b) - 1
    if (t <= 0) | (t % PAGE != 0):
        return
    sink, alpha, beta, mask = load_rule(p_rules, g)
    before = tl.maximum(first_key(t - 1, alpha, beta, mask), sink)
    if tl.maximum(first_key(t, alpha, beta, mask), sink) <= before:
        return
    at_v = tl.program_id(0) * BLOCK_V
    o_slot = tl.arange(0, PAGE)
    m_slot = o_slot >= 0
    place = tl.load(p_table + bg * numbers + before // PAGE).to(tl.int64)
    # [BLOCK_W, PAGE]: the features of a key are a column, and the products below take them from registers.
    o_w = tl.arange(0, BLOCK_W)
    m_w = o_w < WIDTH
    projected = tl.zeros([BLOCK_W, PAGE], tl.float32)
    for at in tl.static_range(0, DIM, BLOCK_D):
        o_d = at + tl.arange(0, BLOCK_D)
        b_key = load_part(p_key_pages + place * PAGE * DIM, o_slot * DIM, m_slot, at, DIM, BLOCK_D)
        p_weights = p_map + g * DIM * WIDTH + o_w[:, None] + o_d[None, :] * WIDTH
        b_map = tl.load(p_weights, mask=m_w[:, None] & (o_d < DIM)[None, :], other=0.0).to(tl.float32)
        if SPLIT:
            high = b_map.to(tl.bfloat16)
            low = (b_map - high.to(tl.float32)).to(tl.bfloat16)
            projected = tl.dot(high, b_key.T, projected)
            projected = tl.dot(low, b_key.T, projected)
        else:
            projected = tl.dot(b_map, b_key.to(tl.float32).T, projected, input_precision=PRECISION)
    if BIASED:
        projected += tl.load(p_bias + g * WIDTH + o_w, mask=m_w, other=0.0).to(tl.float32)[:, None]
    projected = projected * root
    # [PAGE, BLOCK_V]
    b_value = load_part(p_value_pages + place * PAGE * VALUE_DIM, o_slot * VALUE_DIM, m_slot, at_v, VALUE_DIM, BLOCK_V)
    if not SPLIT:
        b_value = b_value.to(tl.float32)
    for side in tl.static_range(SIDES):
        # [BLOCK_W, PAGE], [BLOCK_W, BLOCK_V]
        b_key = activate(projected, side, m_w, KIND, 0).to(b_value.dtype)
        o_f = side * WIDTH + o_w
        p_rows = p_state + bg * (SIDES * WIDTH) * (VALUE_DIM + 1)
        b_state = load_part(p_rows, o_f * (VALUE_DIM + 1), m_w, at_v, VALUE_DIM, BLOCK_V)
        if DECAY:
            decay = tl.load(p_decay + g)
            b_state = b_state * tl.exp(decay * PAGE)
            b_key = (b_key.to(tl.float32) * tl.exp(decay * (PAGE - 1 - o_slot))[None, :]).to(b_value.dtype)
        b_state = tl.dot(b_key, b_value, b_state, input_precision=PRECISION)
        store_part(p_rows, o_f * (VALUE_DIM + 1), b_state, m_w, at_v, VALUE_DIM, BLOCK_V)
        if at_v == 0:
            p_norm = p_rows + o_f * (VALUE_DIM + 1) + VALUE_DIM
            b_norm = tl.load(p_norm, mask=m_w, other=0.0)
            if DECAY:
                b_norm = b_norm * tl.exp(decay * PAGE)
            tl.store(p_norm, b_norm + tl.sum(b_key.to(tl.float32), 1), mask=m_w)


def absorb(
    state: torch.Tensor,
    pages: Pages,
    lengths: torch.Tensor,
    spans: Sequence[Span],
    kind: str,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    log_decay: torch.Tensor | None = None,
) -> None:
    """Add the page that leaves the sight with each sequence's new token to its state, in place; no host sync.

    It has to run before the page is freed or overwritten.

    Args:
        state: `[B, G, F, DV + 1]` float32, contiguous.
        pages: as they were before the new token.
        lengths: `[B]` tokens of each sequence with the new one, 0 where it takes no part.
        spans: one per head group, of whole pages.
        kind: name of the feature map, one of `KINDS`.
        weight, bias: the map's projection of keys, `[G, D, width]` and `[G, width]`.
        scale: the factor on the scores of a softmax.
        log_decay: `[G]` logarithms of the decay a token.
    """
    batch, groups, count, columns = state.shape
    dim, value_dim = pages.keys.shape[-1], pages.values.shape[-1]
    assert columns == value_dim + 1 and state.is_contiguous()
    width = count // sides(kind)
    split = pages.values.dtype == torch.bfloat16
    block_w = max(16, triton.next_power_of_2(width))
    block_v = max(16, min(8192 // block_w, 64, triton.next_power_of_2(value_dim)))
    weight = weight.contiguous()
    options: dict[str, Any] = {"BIASED": bias is not None, "DECAY": log_decay is not None, "SPLIT": split}
    _absorb[(triton.cdiv(value_dim, block_v), batch * groups)](
        state,
        pages.keys,
        pages.values,
        pages.table,
        lengths,
        span_rules(tuple(spans), state.device),
        weight,
        weight if bias is None else bias,
        state if log_decay is None else log_decay,
        pages.table.shape[-1],
        root(kind, scale),
        GROUPS=groups,
        DIM=dim,
        VALUE_DIM=value_dim,
        WIDTH=width,
        SIDES=sides(kind),
        KIND=KINDS[kind],
        BLOCK_D=max(16, min(64, triton.next_power_of_2(dim))),
        BLOCK_W=block_w,
        BLOCK_V=block_v,
        PAGE=PAGE,
        PRECISION="tf32x3",
        num_warps=8 if block_w > 128 else 4,
        **options,
    )
