"""Additive linear attention in Triton: chunk states of the keys, and their read-out merged with a window's softmax.

Keys come as a stream of features that is cut into chunks of 64 tokens, and chunks into segments of four. One launch
sums every segment by itself, one runs over the segments and leaves the state before each of them, and one reads: a
query takes the state of its segment, and the chunks between that state and its own boundary as products with their
keys. So what lies in memory between the launches is one float32 state for 256 tokens, and nothing walks along the
sequence but that sum.

Queries are worked on in pages of 64 positions, because all queries of a page read the state at the same chunk.

Names as in `triton_span.py`; besides there are F features, M tokens in the stream of keys, P pages of queries and S
segments. A slot is a state `[F, DV]` and behind it its normaliser `[F]`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels need Triton; without it attention runs in plain PyTorch") from error

from .reference import Rows
from .span import PAGE, kept_table
from .tuned import linear_config

SEGMENT = 4  # chunks; twice as many halve the bytes of the states in between, and double the products with keys


@triton.jit
def load_part(p_base, o_rows, m_rows, at, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """As `load_block`, of the numbers from `at` on of rows of DIM numbers."""
    o_dims = at + tl.arange(0, BLOCK)
    return tl.load(
        p_base + o_rows[:, None] + o_dims[None, :], mask=m_rows[:, None] & (o_dims < DIM)[None, :], other=0.0
    )


@triton.jit
def store_part(p_base, o_rows, block, m_rows, at, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Write what `load_part` reads, in the dtype that is there."""
    o_dims = at + tl.arange(0, BLOCK)
    m_block = m_rows[:, None] & (o_dims < DIM)[None, :]
    tl.store(p_base + o_rows[:, None] + o_dims[None, :], block.to(p_base.dtype.element_ty), mask=m_block)


@triton.jit
def load_state(p_state, at_f, at_v, FEATURES: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_F: tl.constexpr,
               BLOCK_V: tl.constexpr):  # fmt: skip
    """A block `[BLOCK_F, BLOCK_V]` of a slot."""
    o_f = at_f + tl.arange(0, BLOCK_F)
    return load_part(p_state, o_f * VALUE_DIM, o_f < FEATURES, at_v, VALUE_DIM, BLOCK_V)


@triton.jit
def dot_wide(left, right, acc, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + left @ right for a float32 `right`; with SPLIT as two bfloat16 numbers, which keep 16 bits of it."""
    if SPLIT:
        high = right.to(tl.bfloat16)
        low = (right - high.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(left, high, acc)
        return tl.dot(left, low, acc)
    return tl.dot(left.to(tl.float32), right, acc, input_precision=PRECISION)


@triton.jit
def inner(
    p_left, o_left, m_left, p_right, o_right, m_right,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of rows of DIM numbers with others, `[ROWS, COLUMNS]` float32."""
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    if DIM <= 2 * BLOCK:
        for at in tl.static_range(0, DIM, BLOCK):
            b_left = load_part(p_left, o_left, m_left, at, DIM, BLOCK)
            b_right = load_part(p_right, o_right, m_right, at, DIM, BLOCK)
            product = tl.dot(b_left, b_right.T, product, input_precision=PRECISION)
    else:  # a loop that stays one, so that shared memory need not hold all blocks
        for at in tl.range(0, DIM, BLOCK, num_stages=2):
            b_left = load_part(p_left, o_left, m_left, at, DIM, BLOCK)
            b_right = load_part(p_right, o_right, m_right, at, DIM, BLOCK)
            product = tl.dot(b_left, b_right.T, product, input_precision=PRECISION)
    return product


@triton.jit
def tile_rows(page, head, p_runs, b, HEADS: tl.constexpr, PAGE: tl.constexpr):
    """Rows of HEADS heads and the tokens of a page: token of the page, head, column, whether it is one; `[M]` each."""
    shift, start, count = tl.load(p_runs + b * 3), tl.load(p_runs + b * 3 + 1), tl.load(p_runs + b * 3 + 2)
    o_row = tl.arange(0, PAGE * HEADS)
    token = o_row % PAGE
    order = page * PAGE + token - shift
    return token, head + o_row // PAGE, (start + order).to(tl.int64), (order >= 0) & (order < count)


@triton.jit
def row_decay(p_sums, chunk, token, SEGMENT: tl.constexpr, OWN: tl.constexpr, PAGE: tl.constexpr):
    """The logarithm of the decay from the start of a segment to where the queries of a page read; `[M]`."""
    if OWN:
        return tl.load(p_sums + chunk * PAGE + token)
    before = tl.load(p_sums + chunk * PAGE - 1, mask=(chunk % SEGMENT) > 0, other=0.0)
    return token * 0.0 + before


@triton.jit
def _outer(
    p_left,  # [B, heads, T or M, F] features
    p_right,  # [B, heads, T or M, DV]
    p_weight,  # [B, heads, T] float32 factors on what goes into the matrix; not with KEYS
    p_extra,  # [B, heads, T] float32 factors on what goes into the vector; not with KEYS
    p_sums,  # [B, G, S * SEGMENT * PAGE] float32, where DECAY
    p_totals,  # [B, G, S] float32, where DECAY
    p_states,  # [B, G, S + 1, F * DV + F] float32
    p_runs,  # [B, 3] int32; with KEYS [B, G, 2]: tokens of the stream, and those that go into the state
    p_first,  # [B, G, (S + 1) * SEGMENT + 1] int32: the first page of queries that reads at this chunk or later
    p_chunk,  # [B, G, P] int32: at which chunk a page of queries reads
    pages,
    columns,
    segments,
    left_b,
    left_h,
    left_t,
    right_b,
    right_h,
    right_t,
    SHARE: tl.constexpr,
    GROUPS: tl.constexpr,
    FEATURES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SEGMENT: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    DECAY: tl.constexpr,
    OWN: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block of the sum over a segment of feature rows times value rows.

    With KEYS: what the keys of segment s add to the state, into slot s + 1. Without: what the queries that read in
    segment s add to the gradient of the state before it, into slot s.
    """
    s = tl.program_id(0)
    blocks_v: tl.constexpr = (VALUE_DIM + BLOCK_V - 1) // BLOCK_V
    at_f = tl.program_id(1) // blocks_v * BLOCK_F
    at_v = tl.program_id(1) % blocks_v * BLOCK_V
    bg = tl.program_id(2).to(tl.int64)
    b = bg // GROUPS
    g = bg % GROUPS
    o_token = tl.arange(0, PAGE)
    p_decays = p_sums + bg * segments * SEGMENT * PAGE
    if KEYS:
        count = tl.load(p_runs + bg * 2 + 1)
        low = s * SEGMENT
        high = tl.minimum(low + SEGMENT, (count + PAGE - 1) // PAGE)
        if DECAY:
            total = tl.load(p_totals + bg * segments + s)
    else:
        p_pages = p_first + bg * ((segments + 1) * SEGMENT + 1) + s * SEGMENT
        low = tl.load(p_pages)
        high = tl.load(p_pages + SEGMENT)
    # [BLOCK_F, BLOCK_V], [BLOCK_F]
    acc = tl.zeros([BLOCK_F, BLOCK_V], tl.float32)
    side = tl.zeros([BLOCK_F], tl.float32)
    for item in tl.range(low * SHARE, high * SHARE, num_stages=STAGES):
        page = item // SHARE
        head = g * SHARE + item % SHARE
        if KEYS:
            column = (page * PAGE + o_token).to(tl.int64)
            m_row = column < count
        else:
            _, _, column, m_row = tile_rows(page, head, p_runs, b, 1, PAGE)
        # [PAGE, BLOCK_F], [PAGE, BLOCK_V]
        b_left = load_part(p_left + b * left_b + head * left_h, column * left_t, m_row, at_f, FEATURES, BLOCK_F)
        b_right = load_part(p_right + b * right_b + head * right_h, column * right_t, m_row, at_v, VALUE_DIM, BLOCK_V)
        b_wide = b_left.to(tl.float32)
        if KEYS:
            if DECAY:
                b_wide = b_wide * tl.exp(total - tl.load(p_decays + column, mask=m_row, other=0.0))[:, None]
            b_side = b_wide
        else:
            o_number = (b * GROUPS * SHARE + head) * columns + column
            b_weight = tl.load(p_weight + o_number, mask=m_row, other=0.0)
            b_extra = tl.load(p_extra + o_number, mask=m_row, other=0.0)
            if DECAY:
                chunk = tl.load(p_chunk + bg * pages + page)
                fade = tl.exp(row_decay(p_decays, chunk, o_token, SEGMENT, OWN, PAGE))
                b_weight = b_weight * fade
                b_extra = b_extra * fade
            b_side = b_wide * b_extra[:, None]
            b_wide = b_wide * b_weight[:, None]
        acc = tl.dot(b_wide.to(b_right.dtype).T, b_right, acc, input_precision=PRECISION)
        side += tl.sum(b_side, 0)
    slot = bg * (segments + 1) + s
    if KEYS:
        slot += 1
    p_state = p_states + slot * (FEATURES * (VALUE_DIM + 1))
    o_f = at_f + tl.arange(0, BLOCK_F)
    store_part(p_state, o_f * VALUE_DIM, acc, o_f < FEATURES, at_v, VALUE_DIM, BLOCK_V)
    if at_v == 0:
        tl.store(p_state + FEATURES * VALUE_DIM + o_f, side, mask=o_f < FEATURES)


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
def _running(
    p_states,  # [B, G, S + 1, F * DV + F] float32
    p_totals,  # [B, G, S] float32, where DECAY
    p_first,  # [B, G, F, DV + 1] float32: a state to begin with, or with REVERSE what the last slot gets besides
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
):
    """BLOCK numbers of the slots: each becomes itself and the (decayed) sum of those before it, or behind it."""
    size: tl.constexpr = FEATURES * (VALUE_DIM + 1)
    bg = tl.program_id(1).to(tl.int64)
    o_number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_number = o_number < size
    # Where the same number is in a state, whose last column is the normaliser.
    in_matrix = o_number < FEATURES * VALUE_DIM
    o_f = tl.where(in_matrix, o_number // VALUE_DIM, o_number - FEATURES * VALUE_DIM)
    o_e = tl.where(in_matrix, o_number % VALUE_DIM, VALUE_DIM)
    o_first = bg // GROUPS * first_b + bg % GROUPS * first_g + o_f * first_f + o_e * first_e
    step = bg * 0 + size  # 64 bits
    p_slots = p_states + bg * (segments + 1) * size + o_number
    p_total = p_totals + bg * segments
    carry = tl.zeros([BLOCK], tl.float32)
    if FIRST:
        carry = tl.load(p_first + o_first, mask=m_number, other=0.0)
    if REVERSE:
        p_slots += segments * step
        carry += tl.load(p_slots, mask=m_number, other=0.0)
    tl.store(p_slots, carry, mask=m_number)
    # Four slots are on their way at once, or a step would take as long as the memory takes to answer.
    if REVERSE:
        step = -step
    for i in tl.range(0, segments, 4):
        p_slot = p_slots + (i + 1) * step
        o_segment = o_number * 0 + i
        m_1, m_2 = m_number & (o_segment + 1 < segments), m_number & (o_segment + 2 < segments)
        m_3 = m_number & (o_segment + 3 < segments)
        own_0 = tl.load(p_slot, mask=m_number, other=0.0)
        own_1 = tl.load(p_slot + step, mask=m_1, other=0.0)
        own_2 = tl.load(p_slot + 2 * step, mask=m_2, other=0.0)
        own_3 = tl.load(p_slot + 3 * step, mask=m_3, other=0.0)
        carry = _faded(carry, m_number, p_total, i, segments, DECAY, REVERSE) + own_0
        tl.store(p_slot, carry, mask=m_number)
        carry = _faded(carry, m_1, p_total, i + 1, segments, DECAY, REVERSE) + own_1
        tl.store(p_slot + step, carry, mask=m_1)
        carry = _faded(carry, m_2, p_total, i + 2, segments, DECAY, REVERSE) + own_2
        tl.store(p_slot + 2 * step, carry, mask=m_2)
        carry = _faded(carry, m_3, p_total, i + 3, segments, DECAY, REVERSE) + own_3
        tl.store(p_slot + 3 * step, carry, mask=m_3)
    tl.store(p_last + bg * size + o_e * FEATURES + o_f, carry, mask=m_number)


@triton.jit
def _read(
    p_query,  # [B, H, T, F] features
    p_key,  # [B, G, M, F] features
    p_value,  # [B, G, M, DV]
    p_sums,  # [B, G, S * SEGMENT * PAGE] float32, where DECAY
    p_states,  # [B, G, S + 1, F * DV + F] float32
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
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_V numbers of the outputs of HEADS heads for one page of queries; those that are no token are left alone.

    With MASS the sums of the weights are written as well. With MEAN what is read is divided by them, and with MERGE
    joined with the window's output.
    """
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
    p_state = p_states + (bg * (segments + 1) + segment) * (FEATURES * (VALUE_DIM + 1))
    o_query = b * query_b + head * query_h + column * query_t

    # [rows, BLOCK_V], [rows]
    acc = tl.zeros([rows, BLOCK_V], tl.float32)
    mass = tl.zeros([rows], tl.float32)
    for at_f in tl.range(0, FEATURES, BLOCK_F, num_stages=STAGES):
        # [rows, BLOCK_F], [BLOCK_F, BLOCK_V], [BLOCK_F]
        b_query = load_part(p_query, o_query, m_row, at_f, FEATURES, BLOCK_F)
        b_state = load_state(p_state, at_f, at_v, FEATURES, VALUE_DIM, BLOCK_F, BLOCK_V)
        acc = dot_wide(b_query, b_state, acc, SPLIT, PRECISION)
        if MASS:
            o_f = at_f + tl.arange(0, BLOCK_F)
            b_norm = tl.load(p_state + FEATURES * VALUE_DIM + o_f, mask=o_f < FEATURES, other=0.0)
            mass += tl.sum(b_query.to(tl.float32) * b_norm[None, :], 1)
    if DECAY:
        reach = row_decay(p_decays, chunk, token, SEGMENT, OWN, PAGE)
        acc = acc * tl.exp(reach)[:, None]
        mass = mass * tl.exp(reach)

    end = chunk
    if OWN:
        end += 1
    o_token = tl.arange(0, PAGE)
    for n in tl.range(segment * SEGMENT, end, num_stages=STAGES):
        # [PAGE], [PAGE, BLOCK_V]
        j = (n * PAGE + o_token).to(tl.int64)
        m_j = j < count
        b_value = load_part(p_value + b * value_b + g * value_g, j * value_t, m_j, at_v, VALUE_DIM, BLOCK_V)
        p_keys = p_key + b * key_b + g * key_g
        # [rows, PAGE]
        b_weight = inner(p_query, o_query, m_row, p_keys, j * key_t, m_j, rows, PAGE, FEATURES, BLOCK_F, PRECISION)
        if DECAY:
            fade = tl.load(p_decays + j, mask=m_j, other=0.0)
            b_weight = b_weight * tl.exp(reach[:, None] - fade[None, :])
        if OWN:
            b_weight = tl.where((n < chunk) | (o_token[None, :] <= token[:, None]), b_weight, 0.0)
        mass += tl.sum(b_weight, 1)
        acc = tl.dot(b_weight.to(b_value.dtype), b_value, acc, input_precision=PRECISION)

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


@dataclass(frozen=True)
class Layout:
    """Which token is where, as the kernels read it.

    Attributes:
        rows: which columns are tokens.
        runs: `[B, 3]` int32: place of the first new token in its page of positions, its column, and how many there are.
        pages: P, pages of queries, the most of any sequence.
        chunk: `[B, G, P]` int32: at which chunk of the stream each page of queries reads; never decreases.
        tokens: `[B, G, 2]` int32: tokens of the stream of keys, and how many of them go into the state.
        first: `[B, G, (S + 1) * SEGMENT + 1]` int32: the first page of queries that reads at this chunk or later.
        sums: `[B, G, S * 256]` float32: sums of the logarithms of decays from the start of each segment; None without.
        totals: `[B, G, S]` float32: those of whole segments, of the tokens that go into the state.
        own: whether queries see the keys of their own chunk up to themselves, for heads without a window.
        segment: SEGMENT, chunks.
    """

    rows: Rows
    runs: torch.Tensor
    pages: int
    chunk: torch.Tensor
    tokens: torch.Tensor
    first: torch.Tensor
    sums: torch.Tensor | None
    totals: torch.Tensor | None
    own: bool
    segment: int

    @property
    def segments(self) -> int:
        """S."""
        return (self.first.shape[-1] - 1) // self.segment - 1

    def decays(self, instead: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`sums` and `totals`; another tensor, which no kernel reads, where there are no decays."""
        return (instead, instead) if self.sums is None or self.totals is None else (self.sums, self.totals)


def layout(
    rows: Rows,
    chunk: torch.Tensor,
    stream: int,
    *,
    count: torch.Tensor | None = None,
    absorbed: torch.Tensor | None = None,
    own: bool = False,
    segment: int = SEGMENT,
) -> Layout:
    """The layout of a pass, without decays.

    Args:
        rows: which columns are tokens.
        chunk: `[B, G, P]`, see `Layout`.
        stream: M, columns of the stream of keys.
        count: `[B, G]` tokens of the stream, M everywhere when None.
        absorbed: `[B, G]` tokens of it that the last state holds, whole chunks; all when None.
        own, segment: see `Layout`.
    """
    with torch.inference_mode(False):  # it is kept for later passes
        batch, groups, pages = chunk.shape
        segments = max(1, -(-stream // (segment * PAGE)))
        chunk = chunk.to(torch.int32).contiguous()
        steps = torch.arange((segments + 1) * segment + 1, dtype=torch.int32, device=chunk.device)
        first = torch.searchsorted(chunk, steps.expand(batch, groups, -1).contiguous(), out_int32=True)
        if count is None:
            count = chunk.new_full((batch, groups), stream)
        absorbed = count if absorbed is None else absorbed
        tokens = torch.stack([count, absorbed], dim=-1).to(torch.int32).contiguous()
        runs = zip(rows.past, rows.start, rows.count, strict=True)
        table = kept_table([(past % PAGE, start, count) for past, start, count in runs], chunk.device)
    return Layout(rows, table, pages, chunk, tokens, first, None, None, own, segment)


def with_decays(where: Layout, log_decay: torch.Tensor, stream: int) -> Layout:
    """A layout with the decays of a stream of M tokens, logarithms at most 0: `[B, G, M]`, or `[G]` for all tokens."""
    batch, groups = where.tokens.shape[:2]
    segments, length = where.segments, where.segment * PAGE
    decay = log_decay.detach().float()
    decay = (decay[:, None] if decay.dim() == 1 else decay).expand(batch, groups, stream)
    decay = decay.masked_fill(torch.arange(stream, device=decay.device) >= where.tokens[..., :1], 0)
    decay = torch.nn.functional.pad(decay, (0, segments * length - stream))
    sums = decay.unflatten(-1, (segments, length)).cumsum(-1)
    held = where.tokens[..., 1:] - torch.arange(segments, device=decay.device) * length
    totals = torch.nn.functional.pad(sums, (1, 0)).gather(-1, held.clamp(0, length)[..., None].long())[..., 0]
    return replace(where, sums=sums.flatten(-2).contiguous(), totals=totals.contiguous())


@lru_cache(maxsize=16)
def _kept_decays(where: Layout, log_decay: torch.Tensor, stream: int) -> Layout:
    """`with_decays` of decays that are the same in every pass."""
    with torch.inference_mode(False):
        return with_decays(where, log_decay, stream)


def options(
    what: str, query: torch.Tensor, value: torch.Tensor, groups: int, where: Layout, at_once: int | None = None
) -> dict[str, Any]:
    """Block sizes of the launch of that name in `linear_config`, and what else launches share.

    Args:
        at_once: query heads that a program works for, where it could be two; one takes half of the warps.
    """
    features, value_dim = query.shape[-1], value.shape[-1]
    config = linear_config(value.itemsize, value.device)[what]
    return {
        "SHARE": query.shape[1] // groups,
        "GROUPS": groups,
        "FEATURES": features,
        "VALUE_DIM": value_dim,
        "BLOCK_F": max(16, min(config["features"], triton.next_power_of_2(features))),
        "BLOCK_V": max(16, min(config["values"], triton.next_power_of_2(value_dim))),
        "SEGMENT": where.segment,
        "DECAY": where.sums is not None,
        "OWN": where.own,
        "PAGE": PAGE,
        "STAGES": config["stages"],
        "PRECISION": "tf32x3" if value.dtype == torch.float32 else "tf32",
        "num_warps": config["warps"] if at_once is None else max(4, config["warps"] * at_once // 2),
    }


def heads_at_once(what: str, share: int, value: torch.Tensor) -> int:
    """Query heads of a group that one program works for: two where that divides them and `linear_config` says so."""
    return 2 if share % 2 == 0 and linear_config(value.itemsize, value.device)[what]["heads"] == 2 else 1


def strides(*tensors: torch.Tensor) -> list[int]:
    """The first three strides of every tensor."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def segment_states(
    key: torch.Tensor, value: torch.Tensor, first: torch.Tensor | None, where: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state before every segment and after the last, `[B, G, S + 1, F * DV + F]`; the last, `[B, G, F, DV + 1]`."""
    batch, groups, _, features = key.shape
    value_dim, segments = value.shape[-1], where.segments
    states = key.new_empty(batch, groups, segments + 1, features * (value_dim + 1), dtype=torch.float32)
    opts = options("sums", key, value, groups, where)
    blocks = triton.cdiv(features, opts["BLOCK_F"]) * triton.cdiv(value_dim, opts["BLOCK_V"])
    sums, totals = where.decays(states)
    _outer[(segments, blocks, batch * groups)](
        key,
        value,
        states,
        states,
        sums,
        totals,
        states,
        where.tokens,
        where.first,
        where.chunk,
        where.pages,
        0,
        segments,
        *strides(key, value),
        KEYS=True,
        **opts,
    )
    return states, running(states, first, features, where, reverse=False)


def running(
    states: torch.Tensor, first: torch.Tensor | None, features: int, where: Layout, *, reverse: bool
) -> torch.Tensor:
    """Sum the slots `[B, G, S + 1, size]` along the segments, in place, with a state `first` at their begin.

    The sum of all of them, `[B, G, F, DV + 1]`.
    """
    batch, groups, slots, size = states.shape
    last = states.new_empty(batch, groups, size // features, features)  # as a cache has it
    first_of = last.mT if first is None else first
    block = 512
    _running[(triton.cdiv(size, block), batch * groups)](
        states,
        where.decays(states)[1],
        first_of,
        last,
        slots - 1,
        *first_of.stride(),
        GROUPS=groups,
        FEATURES=features,
        VALUE_DIM=size // features - 1,
        BLOCK=block,
        DECAY=where.sums is not None,
        FIRST=first is not None,
        REVERSE=reverse,
        num_warps=4,
    )
    return last.mT


def read(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    states: torch.Tensor,
    where: Layout,
    window: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    *,
    mean: bool,
    mass: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs `[B, H, T, DV]`, in value's dtype or without `mean` in float32, and with `mass` the sums of weights."""
    batch, heads, columns, _ = query.shape
    groups, value_dim = key.shape[1], value.shape[-1]
    make = value.new_empty if where.rows.is_whole(columns) else value.new_zeros
    out = make(batch, columns, heads, value_dim, dtype=value.dtype if mean else torch.float32).transpose(1, 2)
    make_mass = states.new_empty if where.rows.is_whole(columns) else states.new_zeros
    masses = make_mass((batch, heads, columns) if mass else (1,))
    share = heads // groups
    at_once = heads_at_once("read", share, value)
    opts = options("read", query, value, groups, where, at_once)
    over, lse, gain = (out, masses, masses) if window is None else window
    _read[(where.pages * (share // at_once), triton.cdiv(value_dim, opts["BLOCK_V"]), batch * groups)](
        query,
        key,
        value,
        where.decays(states)[0],
        states,
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
        SPLIT=value.dtype == torch.bfloat16,
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
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        states, last = segment_states(key, value, first, where)
        window = None if out is None or lse is None or log_gain is None else (out, lse, log_gain)
        result, mass = read(query, key, value, states, where, window, mean=mean, mass=True)
        ctx.save_for_backward(query, key, value, states, out, lse, log_gain, result if mean else None, mass)
        ctx.where, ctx.first = where, first is not None
        if mean:
            ctx.mark_non_differentiable(mass)
        ctx.set_materialize_grads(False)
        return result, mass, last

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        from .triton_linear_backward import backward

        given = (*grads, *ctx.saved_tensors, ctx.where)
        return (*backward(*given, with_first=ctx.first), None, None)


def additive(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    first: torch.Tensor | None,
    where: Layout,
    *,
    log_decay: torch.Tensor | None = None,
    mean: bool = True,
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
        mean: divide by the sums of the weights; else the result is the weighted sum, in float32.
        window: output `[B, H, T, DV]` and natural log-sum-exp `[B, H, T]` of the softmax over the keys in sight, which
            the mean is merged with as by `merge.merge`; None for heads without one.
        log_gain: `[B, H, T]` or what broadcasts to it, float32: logarithm of the factor on the state's weights.

    Returns:
        `[B, H, T, DV]` and the sums of weights `[B, H, T]` float32, which have a gradient without `mean`; both zero in
        columns that are no token. Then the last state, `[B, G, F, DV + 1]` float32.
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
        where = (_kept_decays if kept else with_decays)(where, log_decay, key.shape[2])
    given = (query, key, value, first, out, lse, gain)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        found, mass, last = _Linear.apply(*given, where, mean)
    else:
        states, last = segment_states(key, value, first, where)
        joined = None if out is None or lse is None or gain is None else (out, lse, gain)
        found, mass = read(query, key, value, states, where, joined, mean=mean, mass=True)
    return found.to(dtype) if mean else found, mass, last
