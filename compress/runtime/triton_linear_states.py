"""The states of additive linear attention in Triton: one for every segment of the keys, and those of the gradients.

Two ways: sums of every segment by itself and one pass over them, which fills a GPU with a single sequence; or blocks
of the state that walk along the keys by themselves, which move a quarter of the bytes and want many sequences or heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels need Triton; without it attention runs in plain PyTorch") from error

from .triton_linear_layout import (
    Layout,
    begin,
    load_part,
    options,
    overlapped,
    row_decay,
    store_part,
    strides,
    tile_rows,
)
from .tuned_linear import linear_few, linear_scans


@triton.jit
def _store_sum(
    p_states, p_norms, slot, acc, side, at_f, at_v,
    FEATURES: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write a block `[BLOCK_V, BLOCK_F]` of a slot's matrix, and the first of a row of blocks the normaliser, too."""
    o_f = at_f + tl.arange(0, BLOCK_F)
    o_v = at_v + tl.arange(0, BLOCK_V)
    p_slot = p_states + slot * (FEATURES * VALUE_DIM)
    store_part(p_slot, o_v * FEATURES, acc, o_v < VALUE_DIM, at_f, FEATURES, BLOCK_F)
    if at_v == 0:
        tl.store(p_norms + slot * FEATURES + o_f, side, mask=o_f < FEATURES)


@triton.jit
def _of_keys(
    p_key,  # [B, G, M, F] features
    p_value,  # [B, G, M, DV]
    p_decays,  # [B, G, S * SEGMENT * PAGE] float32, where DECAY
    p_totals,  # [B, G, S] float32, where DECAY
    p_tokens,  # [B, G, 2] int32: tokens of the stream, and those that go into the state
    p_states,  # [B, G, S + 1, DV, F] float32
    p_norms,  # [B, G, S + 1, F] float32
    segments,
    key_b,
    key_g,
    key_t,
    value_b,
    value_g,
    value_t,
    GROUPS: tl.constexpr,
    FEATURES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SEGMENT: tl.constexpr,
    PAGE: tl.constexpr,
    DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A block of what the keys of segment s add to the state, for slot s + 1."""
    begin(OVERLAP)
    length: tl.constexpr = SEGMENT * PAGE
    blocks_v: tl.constexpr = (VALUE_DIM + BLOCK_V - 1) // BLOCK_V
    s = tl.program_id(0)
    at_f = tl.program_id(1) // blocks_v * BLOCK_F
    at_v = tl.program_id(1) % blocks_v * BLOCK_V
    bg = tl.program_id(2).to(tl.int64)
    b = bg // GROUPS
    g = bg % GROUPS
    # [length], [length, BLOCK_F], [length, BLOCK_V]
    j = (s * length + tl.arange(0, length)).to(tl.int64)
    m_j = j < tl.load(p_tokens + bg * 2 + 1)
    b_key = load_part(p_key + b * key_b + g * key_g, j * key_t, m_j, at_f, FEATURES, BLOCK_F)
    b_value = load_part(p_value + b * value_b + g * value_g, j * value_t, m_j, at_v, VALUE_DIM, BLOCK_V)
    b_wide = b_key.to(tl.float32)
    if DECAY:
        fade = tl.load(p_decays + bg * segments * length + j, mask=m_j, other=0.0)
        b_wide = b_wide * tl.exp(tl.load(p_totals + bg * segments + s) - fade)[:, None]
        b_key = b_wide.to(b_value.dtype)
    acc = tl.dot(b_value.T, b_key, input_precision=PRECISION)
    slot = bg * (segments + 1) + s + 1
    _store_sum(p_states, p_norms, slot, acc, tl.sum(b_wide, 0), at_f, at_v, FEATURES, VALUE_DIM, BLOCK_F, BLOCK_V)


@triton.jit
def _of_queries(
    p_query,  # [B, H, T, F] features
    p_grad,  # [B, H, T, DV]
    p_weight,  # [B, H, T] float32 factors on what goes into the matrix
    p_extra,  # [B, H, T] float32 factors on what goes into the vector
    p_decays,  # [B, G, S * SEGMENT * PAGE] float32, where DECAY
    p_states,  # [B, G, S + 1, DV, F] float32
    p_norms,  # [B, G, S + 1, F] float32
    p_runs,  # [B, 3] int32
    p_first,  # [B, G, (S + 1) * SEGMENT + 1] int32: the first page of queries that reads at this chunk or later
    p_chunk,  # [B, G, P] int32: at which chunk a page of queries reads
    pages,
    columns,
    segments,
    query_b,
    query_h,
    query_t,
    grad_b,
    grad_h,
    grad_t,
    SHARE: tl.constexpr,
    GROUPS: tl.constexpr,
    FEATURES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SEGMENT: tl.constexpr,
    PAGE: tl.constexpr,
    DECAY: tl.constexpr,
    OWN: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A block of what the queries that read in segment s add to the gradient of the state before it, for slot s."""
    begin(OVERLAP)
    blocks_v: tl.constexpr = (VALUE_DIM + BLOCK_V - 1) // BLOCK_V
    s = tl.program_id(0)
    at_f = tl.program_id(1) // blocks_v * BLOCK_F
    at_v = tl.program_id(1) % blocks_v * BLOCK_V
    bg = tl.program_id(2).to(tl.int64)
    b = bg // GROUPS
    g = bg % GROUPS
    p_pages = p_first + bg * ((segments + 1) * SEGMENT + 1) + s * SEGMENT
    low = tl.load(p_pages)
    high = tl.load(p_pages + SEGMENT)
    # [BLOCK_V, BLOCK_F], [BLOCK_F]
    acc = tl.zeros([BLOCK_V, BLOCK_F], tl.float32)
    side = tl.zeros([BLOCK_F], tl.float32)
    for item in tl.range(low * SHARE, high * SHARE, num_stages=STAGES):
        page = item // SHARE
        token, head, column, m_row = tile_rows(page, g * SHARE + item % SHARE, p_runs, b, 1, PAGE)
        # [PAGE, BLOCK_F], [PAGE, BLOCK_V], [PAGE]
        o_query = b * query_b + head * query_h + column * query_t
        o_grad = b * grad_b + head * grad_h + column * grad_t
        b_query = load_part(p_query, o_query, m_row, at_f, FEATURES, BLOCK_F).to(tl.float32)
        b_grad = load_part(p_grad, o_grad, m_row, at_v, VALUE_DIM, BLOCK_V)
        o_number = (b * GROUPS * SHARE + head) * columns + column
        b_weight = tl.load(p_weight + o_number, mask=m_row, other=0.0)
        b_extra = tl.load(p_extra + o_number, mask=m_row, other=0.0)
        if DECAY:
            chunk = tl.load(p_chunk + bg * pages + page)
            fade = tl.exp(row_decay(p_decays + bg * segments * SEGMENT * PAGE, chunk, token, SEGMENT, OWN, PAGE))
            b_weight = b_weight * fade
            b_extra = b_extra * fade
        side += tl.sum(b_query * b_extra[:, None], 0)
        b_query = (b_query * b_weight[:, None]).to(b_grad.dtype)
        acc = tl.dot(b_grad.T, b_query, acc, input_precision=PRECISION)
    slot = bg * (segments + 1) + s
    _store_sum(p_states, p_norms, slot, acc, side, at_f, at_v, FEATURES, VALUE_DIM, BLOCK_F, BLOCK_V)


@triton.jit
def _faded(carry, here, p_totals, i, segments, DECAY: tl.constexpr, REVERSE: tl.constexpr):
    """A sum after the decays of the i-th segment of the walk; as it is where `here` says that there is none."""
    if DECAY:
        s = tl.minimum(i, segments - 1)
        if REVERSE:
            s = segments - 1 - s
        carry = tl.where(here, carry * tl.exp(tl.load(p_totals + s)), carry)
    return carry


@triton.jit
def _load_slot(p_states, p_norms, o_number, m_number, MATRIX: tl.constexpr):
    """Numbers of a slot, the normaliser behind the matrix."""
    b_state = tl.load(p_states + o_number, mask=m_number & (o_number < MATRIX), other=0.0)
    b_norm = tl.load(p_norms + o_number - MATRIX, mask=m_number & (o_number >= MATRIX), other=0.0)
    return b_state + b_norm


@triton.jit
def _store_slot(p_states, p_norms, o_number, numbers, m_number, MATRIX: tl.constexpr):
    """Write what `_load_slot` reads, the matrix in the dtype that is there."""
    b_state = numbers.to(p_states.dtype.element_ty)
    tl.store(p_states + o_number, b_state, mask=m_number & (o_number < MATRIX))
    tl.store(p_norms + o_number - MATRIX, numbers, mask=m_number & (o_number >= MATRIX))


@triton.jit
def _running(
    p_sums,  # [B, G, S + 1, DV, F] float32: of the segments by themselves
    p_sides,  # [B, G, S + 1, F] float32
    p_totals,  # [B, G, S] float32, where DECAY
    p_first,  # [B, G, F, DV + 1] float32: a state to begin with, or with REVERSE what the last slot gets besides
    p_states,  # [B, G, S + 1, DV, F]
    p_norms,  # [B, G, S + 1, F] float32
    p_last,  # [B, G, DV + 1, F] float32: where the last sum goes
    segments,
    first_b,
    first_g,
    first_f,
    first_e,
    GROUPS: tl.constexpr,
    FEATURES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    DECAY: tl.constexpr,
    FIRST: tl.constexpr,
    REVERSE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """BLOCK numbers of the slots: each becomes itself and the (decayed) sum of those before it, or behind it."""
    begin(OVERLAP)
    matrix: tl.constexpr = FEATURES * VALUE_DIM
    bg = tl.program_id(1).to(tl.int64)
    o_number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_number = o_number < matrix + FEATURES
    slot = bg * (segments + 1)
    step = bg * 0 + 1  # slots, in 64 bits
    p_total = p_totals + bg * segments
    carry = tl.zeros([BLOCK], tl.float32)
    if FIRST:
        o_first = bg // GROUPS * first_b + bg % GROUPS * first_g
        o_first += o_number % FEATURES * first_f + o_number // FEATURES * first_e
        carry = tl.load(p_first + o_first, mask=m_number, other=0.0)
    if REVERSE:
        slot += segments
        carry += _load_slot(p_sums + slot * matrix, p_sides + slot * FEATURES, o_number, m_number, matrix)
        step = -step
    _store_slot(p_states + slot * matrix, p_norms + slot * FEATURES, o_number, carry, m_number, matrix)
    # Four slots are on their way at once, or a step would take as long as the memory takes to answer.
    for i in tl.range(0, segments, 4):
        o_segment = o_number * 0 + i
        m_1, m_2 = m_number & (o_segment + 1 < segments), m_number & (o_segment + 2 < segments)
        m_3 = m_number & (o_segment + 3 < segments)
        slot_0 = slot + (i + 1) * step
        slot_1, slot_2, slot_3 = slot_0 + step, slot_0 + 2 * step, slot_0 + 3 * step
        own_0 = _load_slot(p_sums + slot_0 * matrix, p_sides + slot_0 * FEATURES, o_number, m_number, matrix)
        own_1 = _load_slot(p_sums + slot_1 * matrix, p_sides + slot_1 * FEATURES, o_number, m_1, matrix)
        own_2 = _load_slot(p_sums + slot_2 * matrix, p_sides + slot_2 * FEATURES, o_number, m_2, matrix)
        own_3 = _load_slot(p_sums + slot_3 * matrix, p_sides + slot_3 * FEATURES, o_number, m_3, matrix)
        carry = _faded(carry, m_number, p_total, i, segments, DECAY, REVERSE) + own_0
        _store_slot(p_states + slot_0 * matrix, p_norms + slot_0 * FEATURES, o_number, carry, m_number, matrix)
        carry = _faded(carry, m_1, p_total, i + 1, segments, DECAY, REVERSE) + own_1
        _store_slot(p_states + slot_1 * matrix, p_norms + slot_1 * FEATURES, o_number, carry, m_1, matrix)
        carry = _faded(carry, m_2, p_total, i + 2, segments, DECAY, REVERSE) + own_2
        _store_slot(p_states + slot_2 * matrix, p_norms + slot_2 * FEATURES, o_number, carry, m_2, matrix)
        carry = _faded(carry, m_3, p_total, i + 3, segments, DECAY, REVERSE) + own_3
        _store_slot(p_states + slot_3 * matrix, p_norms + slot_3 * FEATURES, o_number, carry, m_3, matrix)
    tl.store(p_last + bg * (matrix + FEATURES) + o_number, carry, mask=m_number)


@triton.jit
def _next_decays(p_total, p_fades, s, segments, o_token, count, LENGTH: tl.constexpr):
    """Logarithms of the decays of the segment behind s, whole and from its start.

    A walk that loaded them where it needs them would wait for the memory in every step.
    """
    s = tl.minimum(s + 1, segments - 1)
    j = (s * LENGTH + o_token).to(tl.int64)
    return tl.load(p_total + s), tl.load(p_fades + j, mask=j < count, other=0.0)


@triton.jit
def _scan(
    p_key,  # [B, G, M, F] features
    p_value,  # [B, G, M, DV]
    p_decays,  # [B, G, S * SEGMENT * PAGE] float32, where DECAY
    p_totals,  # [B, G, S] float32, where DECAY
    p_first,  # [B, G, F, DV + 1] float32, where FIRST
    p_tokens,  # [B, G, 2] int32: tokens of the stream, and those that go into the state
    p_states,  # [B, G, S + 1, DV, F]
    p_norms,  # [B, G, S + 1, F] float32
    p_last,  # [B, G, DV + 1, F] float32
    segments,
    key_b,
    key_g,
    key_t,
    value_b,
    value_g,
    value_t,
    first_b,
    first_g,
    first_f,
    first_e,
    GROUPS: tl.constexpr,
    FEATURES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SEGMENT: tl.constexpr,
    PAGE: tl.constexpr,
    DECAY: tl.constexpr,
    FIRST: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A block of a state, or of its normaliser, walks along all segments in float32 and is written before each.

    The same as `_of_keys` and `_running` with a quarter of what they move, where there are blocks enough for a GPU.
    """
    begin(OVERLAP)
    length: tl.constexpr = SEGMENT * PAGE
    blocks_f: tl.constexpr = (FEATURES + BLOCK_F - 1) // BLOCK_F
    blocks_v: tl.constexpr = (VALUE_DIM + BLOCK_V - 1) // BLOCK_V
    # Blocks of matrices come first, so that no processor has two of them while others have those of normalisers alone.
    matrices = tl.num_programs(0) // (blocks_v + 1) * blocks_v
    matrix = tl.program_id(0) < matrices
    block = tl.where(matrix, tl.program_id(0), (tl.program_id(0) - matrices) * blocks_v)
    bg = (block // (blocks_f * blocks_v)).to(tl.int64)
    b = bg // GROUPS
    g = bg % GROUPS
    at_f = block // blocks_v % blocks_f * BLOCK_F
    at_v = block % blocks_v * BLOCK_V
    count = tl.load(p_tokens + bg * 2 + 1)
    o_f = at_f + tl.arange(0, BLOCK_F)
    o_v = at_v + tl.arange(0, BLOCK_V)
    m_f = o_f < FEATURES
    o_token = tl.arange(0, length)
    p_keys = p_key + b * key_b + g * key_g
    p_values = p_value + b * value_b + g * value_g
    p_fades = p_decays + bg * segments * length
    p_total = p_totals + bg * segments
    p_begin = p_first + b * first_b + g * first_g
    p_end = p_last + bg * FEATURES * (VALUE_DIM + 1)
    slot = bg * (segments + 1)
    if matrix:
        # [BLOCK_V, BLOCK_F]
        state = tl.zeros([BLOCK_V, BLOCK_F], tl.float32)
        m_state = (o_v < VALUE_DIM)[:, None] & m_f[None, :]
        if FIRST:
            state = tl.load(p_begin + o_v[:, None] * first_e + o_f[None, :] * first_f, mask=m_state, other=0.0)
        if DECAY:
            total = tl.load(p_total)
            fade = tl.load(p_fades + o_token, mask=o_token < count, other=0.0)
        for s in tl.range(0, segments, num_stages=STAGES):
            p_slot = p_states + (slot + s) * (FEATURES * VALUE_DIM)
            store_part(p_slot, o_v * FEATURES, state, o_v < VALUE_DIM, at_f, FEATURES, BLOCK_F)
            # [length, BLOCK_F], [length, BLOCK_V]
            j = (s * length + o_token).to(tl.int64)
            m_j = j < count
            b_key = load_part(p_keys, j * key_t, m_j, at_f, FEATURES, BLOCK_F)
            b_value = load_part(p_values, j * value_t, m_j, at_v, VALUE_DIM, BLOCK_V)
            if DECAY:
                b_key = (b_key.to(tl.float32) * tl.exp(total - fade)[:, None]).to(b_key.dtype)
                state = state * tl.exp(total)
                total, fade = _next_decays(p_total, p_fades, s, segments, o_token, count, length)
            state = tl.dot(b_value.T, b_key, state, input_precision=PRECISION)
        p_slot = p_states + (slot + segments) * (FEATURES * VALUE_DIM)
        store_part(p_slot, o_v * FEATURES, state, o_v < VALUE_DIM, at_f, FEATURES, BLOCK_F)
        tl.store(p_end + o_v[:, None] * FEATURES + o_f[None, :], state, mask=m_state)
    else:
        # [BLOCK_F]
        norm = tl.zeros([BLOCK_F], tl.float32)
        if FIRST:
            norm = tl.load(p_begin + VALUE_DIM * first_e + o_f * first_f, mask=m_f, other=0.0)
        if DECAY:
            total = tl.load(p_total)
            fade = tl.load(p_fades + o_token, mask=o_token < count, other=0.0)
        for s in tl.range(0, segments, num_stages=STAGES):
            tl.store(p_norms + (slot + s) * FEATURES + o_f, norm, mask=m_f)
            j = (s * length + o_token).to(tl.int64)
            b_key = load_part(p_keys, j * key_t, j < count, at_f, FEATURES, BLOCK_F).to(tl.float32)
            if DECAY:
                b_key = b_key * tl.exp(total - fade)[:, None]
                norm = norm * tl.exp(total)
                total, fade = _next_decays(p_total, p_fades, s, segments, o_token, count, length)
            norm += tl.sum(b_key, 0)
        tl.store(p_norms + (slot + segments) * FEATURES + o_f, norm, mask=m_f)
        tl.store(p_end + VALUE_DIM * FEATURES + o_f, norm, mask=m_f)


@dataclass(frozen=True)
class Slots:
    """A state for every segment and one more: matrices `[B, G, S + 1, DV, F]`, sums of features `[B, G, S + 1, F]`.

    Matrices that are only read are in the dtype of what they are multiplied with, sums are float32.
    """

    matrices: torch.Tensor
    norms: torch.Tensor

    @classmethod
    def like(cls, key: torch.Tensor, value: torch.Tensor, segments: int, dtype: torch.dtype) -> Slots:
        """New ones for keys `[B, G, M, F]` and values `[B, G, M, DV]`."""
        batch, groups, _, features = key.shape
        shape = (batch, groups, segments + 1)
        matrices = key.new_empty(*shape, value.shape[-1], features, dtype=dtype)
        return cls(matrices, key.new_empty(*shape, features, dtype=torch.float32))


def segment_states(
    key: torch.Tensor, value: torch.Tensor, first: torch.Tensor | None, where: Layout
) -> tuple[Slots, torch.Tensor]:
    """The state before every segment and after the last; the last also by itself, `[B, G, F, DV + 1]` float32."""
    batch, groups, _, features = key.shape
    value_dim, segments = value.shape[-1], where.segments
    slots = Slots.like(key, value, segments, value.dtype)
    opts = options("scan", key, value, groups, where)
    blocks_f, blocks_v = triton.cdiv(features, opts["BLOCK_F"]), triton.cdiv(value_dim, opts["BLOCK_V"])
    if not linear_scans(blocks_f * blocks_v * batch * groups, key.device):
        sums = Slots.like(key, value, segments, torch.float32)
        opts = options("sums", key, value, groups, where)
        blocks = triton.cdiv(features, opts["BLOCK_F"]) * triton.cdiv(value_dim, opts["BLOCK_V"])
        for name in ("SHARE", "OWN", "STAGES"):
            del opts[name]
        _of_keys[(segments, blocks, batch * groups)](
            key,
            value,
            *where.decays(sums.norms),
            where.tokens,
            sums.matrices,
            sums.norms,
            segments,
            *strides(key, value),
            **opts,
        )
        return slots, running(sums, slots, first, where, reverse=False)
    last = key.new_empty(batch, groups, value_dim + 1, features, dtype=torch.float32)  # as a cache has it
    begin = last.mT if first is None else first
    programs = blocks_f * (blocks_v + 1) * batch * groups
    if linear_few(programs, key.device):  # the same blocks
        opts = options("scan_few", key, value, groups, where)
    del opts["SHARE"], opts["OWN"]
    _scan[(programs,)](
        key,
        value,
        *where.decays(slots.norms),
        begin,
        where.tokens,
        slots.matrices,
        slots.norms,
        last,
        segments,
        *strides(key, value),
        *begin.stride(),
        FIRST=first is not None,
        **opts,
    )
    return slots, last.mT


def sums_of_queries(
    grad: torch.Tensor,
    query: torch.Tensor,
    value: torch.Tensor,
    weight: torch.Tensor,
    extra: torch.Tensor,
    where: Layout,
) -> Slots:
    """What the queries of every segment add to the gradient of the state before it, in float32.

    Args:
        grad: `[B, H, T, DV]`, of what queries read.
        query: features `[B, H, T, F]`.
        value: `[B, G, M, DV]`.
        weight, extra: `[B, H, T]` float32, the factor on `grad` for values, and the gradient of the normaliser.
    """
    batch, _, columns, features = query.shape
    groups, value_dim = value.shape[1:4:2]
    opts = options("query_sums", query, value, groups, where)
    blocks = triton.cdiv(features, opts["BLOCK_F"]) * triton.cdiv(value_dim, opts["BLOCK_V"])
    found = Slots.like(query[:, :groups], value, where.segments, torch.float32)
    _of_queries[(where.segments + 1, blocks, batch * groups)](
        query,
        grad,
        weight,
        extra,
        where.decays(weight)[0],
        found.matrices,
        found.norms,
        where.runs,
        where.first,
        where.chunk,
        where.pages,
        columns,
        where.segments,
        *strides(query, grad),
        **opts,
    )
    return found


def running(sums: Slots, slots: Slots, first: torch.Tensor | None, where: Layout, *, reverse: bool) -> torch.Tensor:
    """Sum along the segments into other slots, with a state `first` at the begin; all in all `[B, G, F, DV + 1]`."""
    batch, groups, count, value_dim, features = sums.matrices.shape
    last = sums.norms.new_empty(batch, groups, value_dim + 1, features)
    begin = last.mT if first is None else first
    block = 512
    _running[(triton.cdiv(features * (value_dim + 1), block), batch * groups)](
        sums.matrices,
        sums.norms,
        where.decays(sums.norms)[1],
        begin,
        slots.matrices,
        slots.norms,
        last,
        count - 1,
        *begin.stride(),
        GROUPS=groups,
        FEATURES=features,
        VALUE_DIM=value_dim,
        BLOCK=block,
        DECAY=where.sums is not None,
        FIRST=first is not None,
        REVERSE=reverse,
        num_warps=4,
        **overlapped(last.device),
    )
    return last.mT
