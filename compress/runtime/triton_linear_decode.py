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
from .triton_linear_features import KINDS, activate, root, sides
from .triton_linear_layout import begin, fetch_ahead, limits, load_part, overlapped
from .triton_span import first_key, load_rule, span_rules
from .tuned import launches_overlap
from .tuned_linear import linear_absorb_config, linear_decode_config

TF32 = tl.constexpr(-1 << 13)  # the bits of a float32 number that a matrix unit takes


@triton.jit
def _read_one(
    p_query,  # [B, H, F] features
    p_state,  # [B, G, F, DV + 1] float32, without MEAN the last column may be missing
    p_lengths,  # [B] int32, 0 where a sequence takes no part
    p_window,  # [B, H, DV] what the softmax over the keys in sight gives, where MERGE
    p_lse,  # [B, H] float32, where MERGE
    p_gain,  # [B, H] float32, where MERGE
    p_out,  # [B, H, DV]
    query_b,
    query_h,
    state_b,
    state_g,
    state_f,
    state_e,
    window_b,
    window_h,
    gain_b,
    gain_h,
    out_b,
    out_h,
    SHARE: tl.constexpr,
    GROUPS: tl.constexpr,
    FEATURES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PIECE: tl.constexpr,
    MERGE: tl.constexpr,
    MEAN: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
    AHEAD: tl.constexpr,
    ROUND: tl.constexpr,
):
    """BLOCK_V numbers of the outputs of all query heads of one (sequence, group), from one look at the state.

    With MEAN what is read is divided by the normaliser, in the state's last column, and with MERGE merged. With DOT the
    heads are the columns of a product, to whose rows the state goes through shared memory, block after block; else a
    block has all features and stays in registers for one head after the other. The first AHEAD programs have the cache
    fetch what they read of the state while the launch ahead of this one still runs, whatever it writes.
    """
    blocks: tl.constexpr = (VALUE_DIM + BLOCK_V - 1) // BLOCK_V
    at_v = tl.program_id(0) % blocks * BLOCK_V
    o_v = at_v + tl.arange(0, BLOCK_V)
    bg = (tl.program_id(0) // blocks).to(tl.int64)
    b = bg // GROUPS
    g = bg % GROUPS
    p_held = p_state + b * state_b + g * state_g
    if AHEAD > 0:
        size = tl.minimum(VALUE_DIM - at_v, BLOCK_V) * FEATURES * 4
        fetch_ahead(p_held + at_v * state_e, tl.where(tl.program_id(0) < AHEAD, size, 0))
    begin(OVERLAP)
    p_norm = p_held + VALUE_DIM * state_e
    p_row = p_query + b * query_b + g * SHARE * query_h
    # [BLOCK_M] query heads of the group, [BLOCK_M, BLOCK_V]
    o_row = tl.arange(0, BLOCK_M)
    m_row = o_row < SHARE
    head = g * SHARE + o_row
    m_block = m_row[:, None] & (o_v < VALUE_DIM)[None, :]
    # What is merged is on its way before the state, or the last programs would wait for it behind all else.
    length = tl.load(p_lengths + b)
    if MERGE:
        b_lse = tl.load(p_lse + b * GROUPS * SHARE + head, mask=m_row, other=0.0)
        b_gain = tl.load(p_gain + b * gain_b + head * gain_h, mask=m_row, other=0.0)
        o_window = head[:, None] * window_h + o_v[None, :]
        b_window = tl.load(p_window + b * window_b + o_window, mask=m_block, other=0.0)
    if DOT:
        # [BLOCK_V, BLOCK_M] what is read, of a state in two parts where the queries are one TF32 number
        out = tl.zeros([BLOCK_V, BLOCK_M], tl.float32)
        rest = tl.zeros([BLOCK_V, BLOCK_M], tl.float32)
        # [BLOCK_M, BLOCK_F] what is summed to the normalisers, once for all blocks
        weights = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
        for at_f in tl.range(0, FEATURES, BLOCK_F, num_stages=STAGES):
            # [BLOCK_V, BLOCK_F], [BLOCK_M, BLOCK_F]
            o_f = at_f + tl.arange(0, BLOCK_F)
            m_f = o_f < FEATURES
            m_held = (o_v < VALUE_DIM)[:, None] & m_f[None, :]
            b_state = tl.load(p_held + o_v[:, None] * state_e + o_f[None, :] * state_f, mask=m_held, other=0.0)
            b_query = load_part(p_row, o_row * query_h, m_row, at_f, FEATURES, BLOCK_F)
            if ROUND:
                b_query = b_query.to(tl.bfloat16).to(tl.float32)
                high = (b_state.to(tl.int32, bitcast=True) & TF32).to(tl.float32, bitcast=True)
                out = tl.dot(high, b_query.T, out, input_precision="tf32")
                rest = tl.dot(b_state - high, b_query.T, rest, input_precision="tf32")
            else:
                b_query = b_query.to(tl.float32)
                out = tl.dot(b_state, b_query.T, out, input_precision="tf32x3")
            if MEAN:
                b_norm = tl.load(p_norm + o_f * state_f, mask=m_f, other=0.0)
                weights += b_query * b_norm[None, :]
        out = (out + rest).T
        mass = tl.sum(weights, 1)
    else:
        out = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        mass = tl.zeros([BLOCK_M], tl.float32)
        # [BLOCK_V, BLOCK_F // PIECE, PIECE]: few threads share a row, so that most of its sum needs no exchange
        o_part = tl.arange(0, BLOCK_F // PIECE)[:, None] * PIECE + tl.arange(0, PIECE)[None, :]
        m_part = o_part < FEATURES
        o_held = (o_v * state_e)[:, None, None] + (o_part * state_f)[None, :, :]
        b_state = tl.load(p_held + o_held, mask=(o_v < VALUE_DIM)[:, None, None] & m_part[None, :, :], other=0.0)
        if MEAN:  # of all heads at once, whose rows are then near
            b_norm = tl.load(p_norm + o_part * state_f, mask=m_part, other=0.0)
            m_rows = m_row[:, None, None] & m_part[None, :, :]
            b_rows = tl.load(p_row + (o_row * query_h)[:, None, None] + o_part[None, :, :], mask=m_rows, other=0.0)
            if ROUND:
                b_rows = b_rows.to(tl.bfloat16)
            mass = tl.sum(tl.sum(b_rows.to(tl.float32) * b_norm[None, :, :], 1), 1)
        for row in tl.static_range(SHARE):
            b_query = tl.load(p_row + row * query_h + o_part, mask=m_part, other=0.0)
            if ROUND:
                b_query = b_query.to(tl.bfloat16)
            b_read = tl.sum(tl.sum(b_state * b_query.to(tl.float32)[None, :, :], 1), 1)
            out = tl.where((o_row == row)[:, None], b_read[None, :], out)
    some = mass > 0
    total = tl.where(some, mass, 1.0)
    if MEAN:
        out = tl.where(some[:, None], out / total[:, None], 0.0)
    if MERGE:
        share = tl.where(some, tl.sigmoid(b_lse - tl.log(total) - b_gain), 1.0)
        out = share[:, None] * b_window.to(tl.float32) + (1.0 - share)[:, None] * out
    out = tl.where(length > 0, out, 0.0).to(p_out.dtype.element_ty)
    tl.store(p_out + b * out_b + head[:, None] * out_h + o_v[None, :], out, mask=m_block)


def fetchable(state: torch.Tensor) -> bool:
    """Whether `fetch_ahead` takes columns of a state `[B, G, F, E]` that follow each other: they lie in one piece."""
    count = state.shape[2]
    places = (count, state.storage_offset(), *state.stride()[:2])  # in numbers, of which 16 bytes hold four
    one = state.stride()[2:] == (1, count) and not any(place % 4 for place in places)
    return one and launches_overlap(state.device)


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
        state: `[B, G, F, DV + 1]` float32, or without the normaliser `[B, G, F, DV]`; fastest where the features of a
            column follow each other in memory, as in `LinearState`.
        lengths: `[B]`.
        dtype: that of the cache; the numbers that are multiplied with the state are rounded to it.
        mean: divide by the normaliser; the result is then in `dtype`, else in float32.
        window, log_gain: as in `triton_linear.additive`, without the axis of tokens.
    """
    batch, heads, count = query.shape
    groups = state.shape[1]
    share = heads // groups
    query = query if query.stride(-1) == 1 else query.contiguous()
    out = query.new_empty(batch, heads, value_dim, dtype=dtype if mean else torch.float32)
    over, lse = (out, out) if window is None else window
    gain = lse
    if window is not None:
        over = over if over.stride(-1) == 1 else over.contiguous()
        lse = lse.float().contiguous()
        gain = torch.zeros_like(lse) if log_gain is None else log_gain.float().expand_as(lse)
    config = linear_decode_config(share, count, query.device)
    block_f = triton.next_power_of_2(count)
    block_f = max(16, min(config["features"], block_f)) if config["dot"] else block_f
    block_v = max(16 if config["dot"] else 1, min(config["numbers"] // block_f, triton.next_power_of_2(value_dim)))
    _read_one[(triton.cdiv(value_dim, block_v) * batch * groups,)](
        query,
        state,
        lengths,
        over,
        lse,
        gain,
        out,
        *query.stride()[:2],
        *state.stride(),
        *over.stride()[:2],
        *gain.stride()[:2],
        *out.stride()[:2],
        SHARE=share,
        GROUPS=groups,
        FEATURES=count,
        VALUE_DIM=value_dim,
        BLOCK_M=max(8 if config["dot"] else 1, triton.next_power_of_2(share)),
        BLOCK_F=block_f,
        BLOCK_V=block_v,
        PIECE=min(config["piece"], block_f),
        MERGE=window is not None,
        MEAN=mean,
        DOT=config["dot"],
        STAGES=min(config["stages"], triton.cdiv(count, block_f) + 1),
        AHEAD=config["ahead"] // (4 * count * block_v) if fetchable(state) else 0,
        ROUND=dtype == torch.bfloat16,
        num_warps=config["warps"],
        **limits(config),
        **overlapped(query.device),
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
    state_b,
    state_g,
    state_f,
    state_e,
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
    NARROW: tl.constexpr,
    SPLIT: tl.constexpr,
    OVERLAP: tl.constexpr,
    AHEAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A state takes in the page that the new token does not see any more, BLOCK_V columns at once, if there is one.

    NARROW: the map is in bfloat16 as the keys are, so that their product is exact but for its sum. AHEAD: the cache
    fetches the state while the features of the keys are computed.
    """
    begin(OVERLAP)
    bg = tl.program_id(0).to(tl.int64)
    b = bg // GROUPS
    g = bg % GROUPS
    t = tl.load(p_lengths + b) - 1
    if (t <= 0) | (t % PAGE != 0):
        return
    sink, alpha, beta, mask = load_rule(p_rules, g)
    before = tl.maximum(first_key(t - 1, alpha, beta, mask), sink)
    if tl.maximum(first_key(t, alpha, beta, mask), sink) <= before:
        return
    p_held = p_state + b * state_b + g * state_g
    if AHEAD:
        fetch_ahead(p_held, (VALUE_DIM + 1) * SIDES * WIDTH * 4)
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
        b_map = tl.load(p_weights, mask=m_w[:, None] & (o_d < DIM)[None, :], other=0.0)
        if not NARROW:
            b_map = b_map.to(tl.float32)
        if NARROW:
            projected = tl.dot(b_map, b_key.T, projected)
        elif SPLIT:
            high = b_map.to(tl.bfloat16)
            low = (b_map - high.to(tl.float32)).to(tl.bfloat16)
            projected = tl.dot(high, b_key.T, projected)
            projected = tl.dot(low, b_key.T, projected)
        else:
            projected = tl.dot(b_map, b_key.to(tl.float32).T, projected, input_precision=PRECISION)
    if BIASED:
        projected += tl.load(p_bias + g * WIDTH + o_w, mask=m_w, other=0.0).to(tl.float32)[:, None]
    projected = projected * root
    dtype: tl.constexpr = tl.bfloat16 if SPLIT else tl.float32
    for side in tl.static_range(SIDES):
        # [BLOCK_W, PAGE]
        b_key = activate(projected, side, m_w, KIND, 0).to(dtype)
        if DECAY:
            decay = tl.load(p_decay + g)
            b_key = (b_key.to(tl.float32) * tl.exp(decay * (PAGE - 1 - o_slot))[None, :]).to(dtype)
        p_norm = p_held + VALUE_DIM * state_e + (side * WIDTH + o_w) * state_f
        b_norm = tl.load(p_norm, mask=m_w, other=0.0)
        if DECAY:
            b_norm = b_norm * tl.exp(decay * PAGE)
        tl.store(p_norm, b_norm + tl.sum(b_key.to(tl.float32), 1), mask=m_w)
        for at_v in tl.range(0, VALUE_DIM, BLOCK_V, num_stages=1):  # more would take more registers than there are
            # [PAGE, BLOCK_V], [BLOCK_W, BLOCK_V]
            p_value = p_value_pages + place * PAGE * VALUE_DIM
            b_value = load_part(p_value, o_slot * VALUE_DIM, m_slot, at_v, VALUE_DIM, BLOCK_V).to(dtype)
            o_v = at_v + tl.arange(0, BLOCK_V)
            p_block = p_held + (side * WIDTH + o_w[:, None]) * state_f + o_v[None, :] * state_e
            m_block = m_w[:, None] & (o_v < VALUE_DIM)[None, :]
            b_state = tl.load(p_block, mask=m_block, other=0.0)
            if DECAY:
                b_state = b_state * tl.exp(decay * PAGE)
            b_state = tl.dot(b_key, b_value, b_state, input_precision=PRECISION)
            tl.store(p_block, b_state, mask=m_block)


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
        state: `[B, G, F, DV + 1]` float32, as of `read_one`.
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
    assert columns == value_dim + 1
    width = count // sides(kind)
    split = pages.values.dtype == torch.bfloat16
    block_w = max(16, triton.next_power_of_2(width))
    block_v = max(16, min(8192 // block_w, 64, triton.next_power_of_2(value_dim)))
    config = linear_absorb_config(block_w, split, state.device)
    weight = weight.contiguous()
    options: dict[str, Any] = {"BIASED": bias is not None, "DECAY": log_decay is not None, "SPLIT": split}
    options["NARROW"] = split and weight.dtype == torch.bfloat16
    _absorb[(batch * groups,)](
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
        *state.stride(),
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
        AHEAD=fetchable(state),
        PRECISION="tf32x3",
        num_warps=config["warps"],
        **limits(config),
        **overlapped(state.device),
        **options,
    )
