"""Scorers of tokens as Triton kernels, and which tokens are kept by their scores: in prefill one launch and two."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels need Triton; without it attention runs in plain PyTorch") from error

from .scorer_key_norm import KeyNorm
from .scorer_mlp import Mlp
from .scorer_ridge import Ridge
from .scorer_value_norm import ValueNorm
from .scorers import Scorer
from .span import BETA_UNIT, kept_table
from .triton_span import load_block
from .tuned_retain import keep_block, scorer_config

_UNIT = tl.constexpr(BETA_UNIT)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_MOST = tl.constexpr(1 << 30)  # tokens; more than any sequence has


@triton.jit
def log_norm(p_base, o_rows, m_rows, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """`scorers.log_norm` of rows `[N]` of DIM numbers."""
    b_rows = load_block(p_base, o_rows, m_rows, DIM, BLOCK).to(tl.float32)
    return tl.log(tl.maximum(tl.sqrt(tl.sum(b_rows * b_rows, 1)), _TINY))


@triton.jit
def cap_at(position, base, units):
    """The most tokens behind the sink that are kept once the one at a position has come."""
    return tl.minimum(base, _MOST) + (position + 1) * units // _UNIT


@triton.jit
def _scores(
    p_hidden,  # [B, T, C], where HIDDEN
    p_key,  # [B, G, T, D]
    p_value,  # [B, G, T, DV]
    p_positions,  # [B, T] int64, -1 where a column is no token
    p_weight,  # [G, C], where HIDDEN
    p_scalars,  # [G, 3]: of log(position + 1), log ||k|| and log ||v||
    p_bias,  # [G]
    p_into,  # [G * WIDTH, C], where WIDTH
    p_into_bias,  # [G * WIDTH]
    p_last,  # [G * WIDTH]
    p_out,  # [B, G, T] float32
    columns,
    hidden_b,
    hidden_t,
    key_b,
    key_g,
    key_t,
    value_b,
    value_g,
    value_t,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    MANY: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of BLOCK_T tokens for MANY groups: linear in hidden state and scalars, and what an MLP adds to that."""
    b = tl.program_id(2)
    from_group = tl.program_id(1) * MANY
    # [BLOCK_T], [BLOCK_G]
    column = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    position = tl.load(p_positions + b.to(tl.int64) * columns + column, mask=column < columns, other=-1)
    m_token = position >= 0
    column = column.to(tl.int64)
    o_group = from_group + tl.arange(0, BLOCK_G)
    m_group = (tl.arange(0, BLOCK_G) < MANY) & (o_group < GROUPS)
    # [BLOCK_T, BLOCK_G]
    score = tl.zeros([BLOCK_T, BLOCK_G], tl.float32)
    if HIDDEN:
        if WIDTH > 0:
            # [MANY * WIDTH]
            o_unit = from_group * WIDTH + tl.arange(0, MANY * WIDTH)
            m_unit = o_unit < GROUPS * WIDTH
            middle = tl.zeros([BLOCK_T, MANY * WIDTH], tl.float32)
        p_rows = p_hidden + b.to(tl.int64) * hidden_b + column * hidden_t
        for base in tl.range(0, SIZE, BLOCK_C, num_stages=STAGES):
            o_size = base + tl.arange(0, BLOCK_C)
            m_size = o_size < SIZE
            # [BLOCK_T, BLOCK_C], [BLOCK_G, BLOCK_C], [MANY * WIDTH, BLOCK_C]
            b_hidden = tl.load(p_rows[:, None] + o_size[None, :], mask=m_token[:, None] & m_size[None, :], other=0.0)
            o_weight = o_group[:, None] * SIZE + o_size[None, :]
            b_weight = tl.load(p_weight + o_weight, mask=m_group[:, None] & m_size[None, :], other=0.0)
            score = tl.dot(b_hidden, b_weight.T, score, input_precision=PRECISION)
            if WIDTH > 0:
                o_into = o_unit[:, None] * SIZE + o_size[None, :]
                b_into = tl.load(p_into + o_into, mask=m_unit[:, None] & m_size[None, :], other=0.0)
                middle = tl.dot(b_hidden, b_into.T, middle, input_precision=PRECISION)
        if WIDTH > 0:
            middle += tl.load(p_into_bias + o_unit, mask=m_unit, other=0.0).to(tl.float32)[None, :]
            middle = 0.5 * middle * (1.0 + tl.erf(middle * 0.7071067811865476))
            middle *= tl.load(p_last + o_unit, mask=m_unit, other=0.0).to(tl.float32)[None, :]
    place = tl.log((tl.maximum(position, 0) + 1).to(tl.float32))
    for i in range(MANY):
        g = from_group + i
        if g < GROUPS:
            o_key = b.to(tl.int64) * key_b + g * key_g + column * key_t
            o_value = b.to(tl.int64) * value_b + g * value_g + column * value_t
            found = tl.sum(tl.where((o_group == g)[None, :], score, 0.0), 1)
            if HIDDEN and WIDTH > 0:
                found += tl.sum(tl.where((o_unit // WIDTH == g)[None, :], middle, 0.0), 1)
            found += tl.load(p_scalars + g * 3).to(tl.float32) * place
            by_key = tl.load(p_scalars + g * 3 + 1).to(tl.float32)
            found += by_key * log_norm(p_key, o_key, m_token, DIM, BLOCK_D)
            by_value = tl.load(p_scalars + g * 3 + 2).to(tl.float32)
            found += by_value * log_norm(p_value, o_value, m_token, VALUE_DIM, BLOCK_D)
            found += tl.load(p_bias + g).to(tl.float32)
            tl.store(p_out + (b * GROUPS + g).to(tl.int64) * columns + column, found, mask=column < columns)


@triton.jit
def _less(one, other):
    """The smaller of two."""
    return tl.minimum(one, other)


@triton.jit
def _wanted(
    p_scores, p_positions, p_thresholds, p_sinks, p_caps, b, segment, column, columns, GROUPS: tl.constexpr
):  # fmt: skip
    """Of columns `[N]` of a (sequence, group): position, whether the score suffices behind the sink, and the cap."""
    g = segment % GROUPS
    m_column = (column >= 0) & (column < columns)
    position = tl.load(p_positions + b.to(tl.int64) * columns + column, mask=m_column, other=-1).to(tl.int32)
    score = tl.load(p_scores + segment.to(tl.int64) * columns + column, mask=m_column, other=0.0)
    sink = tl.load(p_sinks + g).to(tl.int32)
    wanted = (position >= 0) & (position >= sink) & (score >= tl.load(p_thresholds + g))
    base = tl.minimum(tl.load(p_caps + g * 2), _MOST).to(tl.int32)
    cap = cap_at(position, base, tl.load(p_caps + g * 2 + 1).to(tl.int32))
    return position, wanted, tl.where(position >= 0, cap, _MOST)


@triton.jit
def _gain(
    p_scores,  # [B, G, T] float32
    p_positions,  # [B, T] int64
    p_thresholds,  # [G] float32
    p_sinks,  # [G] int64
    p_caps,  # [G, 2] int64
    p_gains,  # [B, G, 2, chunks] int32
    columns,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What BLOCK tokens of one (sequence, group) do to the count of those that are kept: a gain, and the least room.

    With w_i tokens that are wanted up to token i, the count c before them is w_i + min(c, min_j (cap_j - w_j)) behind
    it, j <= i: a wanted token adds one to the count where the cap allows it, and caps do not fall.
    """
    segment = tl.program_id(1)
    b = segment // GROUPS
    # [BLOCK]
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _position, wanted, cap = _wanted(
        p_scores, p_positions, p_thresholds, p_sinks, p_caps, b, segment, column, columns, GROUPS
    )
    wanted = wanted.to(tl.int32)
    p_own = p_gains + segment.to(tl.int64) * 2 * tl.num_programs(0) + tl.program_id(0)
    tl.store(p_own, tl.sum(wanted, 0))
    tl.store(p_own + tl.num_programs(0), tl.min(cap - tl.cumsum(wanted, 0), 0))


@triton.jit
def _keep(
    p_scores,  # [B, G, T] float32
    p_positions,  # [B, T] int64
    p_count,  # [B, G] int32
    p_thresholds,  # [G] float32
    p_sinks,  # [G] int64
    p_caps,  # [G, 2] int64
    p_gains,  # [B, G, 2, chunks] int32
    p_kept,  # [B, G, T] uint8
    p_counts,  # [B, G] int32, those behind the tokens
    columns,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The rule for BLOCK tokens of one (sequence, group), from what `_gain` says of the chunks before them."""
    segment = tl.program_id(1)
    b = segment // GROUPS
    chunk = tl.program_id(0)
    chunks = tl.num_programs(0)
    # [CHUNKS]
    every = tl.arange(0, CHUNKS)
    p_own = p_gains + segment.to(tl.int64) * 2 * chunks + every
    b_gain = tl.load(p_own, mask=every < chunks, other=0)
    b_room = tl.load(p_own + chunks, mask=every < chunks, other=_MOST) - tl.cumsum(b_gain, 0) + b_gain
    count = tl.load(p_count + segment)
    if chunk == 0:
        tl.store(p_counts + segment, tl.sum(b_gain, 0) + tl.minimum(count, tl.min(b_room, 0)))
    b_before = every < chunk
    room = tl.min(tl.where(b_before, b_room, _MOST), 0)
    count = tl.sum(tl.where(b_before, b_gain, 0), 0) + tl.minimum(count, room)
    # [BLOCK]; of the tokens before each, of which the first of the chunk has none
    column = chunk * BLOCK + tl.arange(0, BLOCK)
    start = chunk * BLOCK
    _position, wanted, cap = _wanted(
        p_scores, p_positions, p_thresholds, p_sinks, p_caps, b, segment, tl.where(column > start, column - 1, -1),
        columns, GROUPS,
    )  # fmt: skip
    gain = tl.cumsum(wanted.to(tl.int32), 0)
    before = gain + tl.minimum(count, tl.associative_scan(cap - gain, 0, _less))
    position, wanted, cap = _wanted(
        p_scores, p_positions, p_thresholds, p_sinks, p_caps, b, segment, column, columns, GROUPS
    )
    in_sink = (position >= 0) & (position < tl.load(p_sinks + segment % GROUPS))
    kept = in_sink | (wanted & (before < cap))
    tl.store(p_kept + segment.to(tl.int64) * columns + column, kept.to(tl.uint8), mask=column < columns)


def scores(
    scorer: Scorer, hidden: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor | None:
    """As `scorer` says of tokens, `[B, G, T]` in float32, in one launch that copies nothing.

    Args:
        hidden: `[B, T, hidden size]`; key, value: `[B, G, T, D]`.
        positions: `[B, T]`, -1 where a column is no token; what is said of it means nothing.

    Returns:
        None where no kernel has the scorer: another kind, other dtypes than the hidden states', or gradients.
    """
    made = linear_of(scorer, hidden, key)
    if made is None:
        return None
    weight, scalars, bias, into, into_bias, last = made
    batch, groups, columns, dim = key.shape
    value_dim, width = value.shape[-1], 0 if into is None else into.shape[1]
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    size, strides = 0, (0, 0)
    if weight is not None:
        assert hidden is not None
        hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
        size, strides = hidden.shape[-1], (hidden.stride(0), hidden.stride(1))
    config = scorer_config(width, key.itemsize if hidden is None else hidden.itemsize, key.device)
    many = math.gcd(groups, config["groups"]) if width else groups
    out = torch.empty(batch, groups, columns, dtype=torch.float32, device=key.device)
    # fmt: off
    _scores[(triton.cdiv(columns, config["tokens"]), triton.cdiv(groups, many), batch)](
        None if weight is None else hidden, key, value, positions.contiguous(), weight, scalars, bias,
        into, into_bias, last, out, columns, *strides, *key.stride()[:3], *value.stride()[:3],
        GROUPS=groups, SIZE=size, DIM=dim, VALUE_DIM=value_dim,
        BLOCK_D=triton.next_power_of_2(max(dim, value_dim)), WIDTH=width, HIDDEN=weight is not None, MANY=many,
        BLOCK_G=max(16, triton.next_power_of_2(many)), BLOCK_T=config["tokens"], BLOCK_C=config["block"],
        STAGES=config["stages"], num_warps=config["warps"],
        PRECISION="ieee" if key.dtype == torch.float32 else "tf32",
    )
    # fmt: on
    return out


Linear = tuple[Any, ...]


def linear_of(scorer: Scorer, hidden: torch.Tensor | None, key: torch.Tensor) -> Linear | None:
    """What the kernels read of a scorer: weight `[G, C]` of the hidden state or None, `[G, 3]` of the scalars, `[G]`
    bias, and of the MLP beside it the first layer `[G, WIDTH, C]`, its bias and the second, or None three times.

    None where no kernel has it; see `scores`.
    """
    given = (key, *(() if hidden is None else (hidden,)), *(parameters := list(scorer.parameters())))
    if torch.is_grad_enabled() and any(one.requires_grad for one in given):
        return None
    if isinstance(scorer, (KeyNorm, ValueNorm)):
        return None, *_of_norms(isinstance(scorer, KeyNorm), scorer.groups, key.device), None, None, None
    part = scorer.linear if isinstance(scorer, Mlp) else scorer
    if not isinstance(part, Ridge) or hidden is None:
        return None
    if any(one.dtype != hidden.dtype for one in (key, *parameters)):
        return None
    parts = (part.weight, part.scalars, part.bias)
    more = (scorer.into, scorer.into_bias, scorer.out) if isinstance(scorer, Mlp) else (None, None, None)
    return tuple(None if one is None else one.contiguous() for one in (*parts, *more))


@lru_cache(maxsize=64)
def _of_norms(keys: bool, groups: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the scalars, and biases, of the scorers by norms: -log ||k|| or log ||v||."""
    scalars = [[0.0, -1.0, 0.0] if keys else [0.0, 0.0, 1.0]] * groups
    return kept_table(scalars, device, torch.float32), kept_table([0.0] * groups, device, torch.float32)


def keep(
    scores: torch.Tensor,
    positions: torch.Tensor,
    count: torch.Tensor,
    thresholds: torch.Tensor,
    sinks: torch.Tensor,
    caps: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `retain_reference.keep`, in two launches: what chunks of tokens do to the count, and then the rule itself."""
    batch, groups, columns = scores.shape
    kept = torch.empty(scores.shape, dtype=torch.uint8, device=scores.device)
    counts = torch.empty(batch, groups, dtype=torch.int32, device=scores.device)
    block = keep_block(scores.device)
    chunks = triton.cdiv(columns, block)
    gains = torch.empty(batch, groups, 2, chunks, dtype=torch.int32, device=scores.device)
    scores, positions, grid = scores.contiguous(), positions.contiguous(), (chunks, batch * groups)
    _gain[grid](scores, positions, thresholds, sinks, caps, gains, columns, GROUPS=groups, BLOCK=block)
    # fmt: off
    _keep[grid](
        scores, positions, count.to(torch.int32).contiguous(), thresholds, sinks, caps, gains, kept, counts, columns,
        GROUPS=groups, BLOCK=block, CHUNKS=triton.next_power_of_2(chunks),
    )
    # fmt: on
    return kept.view(torch.bool), counts
