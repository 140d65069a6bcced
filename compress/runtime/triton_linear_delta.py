"""The gated delta rule in Triton: what each chunk writes, the states along the chunks, and their gradients.

With L the logarithm of the decays since the chunk began, b the write strengths and S the state before the chunk, a
chunk writes U = V' - K' S where (V', K') = (I + tril(b K K^T e^{L_i - L_j}, -1))^-1 b (V, e^L K), and leaves
e^{L_C} S + (e^{L_C - L} K)^T U (Gated DeltaNet, arXiv 2412.06464). The inverse of every chunk is found by itself; the
states follow each other. Gradients run backwards along the chunks, and then inside each, whose inverse is found anew.
Inside of the chunks they have a kernel where that has been checked on a GPU, and are computed in plain PyTorch else.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels need Triton; without it attention runs in plain PyTorch") from error

from .linear_states import delta_writes
from .span import PAGE
from .triton_linear import read
from .triton_linear_backward import of_keys, of_queries
from .triton_linear_layout import (
    Layout,
    begin,
    dot_state,
    inner,
    limits,
    load_part,
    overlapped,
    store_part,
    strides,
    with_decays,
)
from .triton_linear_states import Slots, sums_of_queries
from .tuned_linear import linear_config, linear_inside


@triton.jit
def _group(GROUPS: tl.constexpr):
    """What a program works for: sequence and group as one number, the sequence, the group."""
    bg = tl.program_id(1).to(tl.int64)
    return bg, bg // GROUPS, bg % GROUPS


@triton.jit
def _chunk(p_tokens, bg, n, PAGE: tl.constexpr):
    """The tokens of chunk n `[PAGE]`, how many there are of all chunks, and which of its own they are."""
    j = (n * PAGE + tl.arange(0, PAGE)).to(tl.int64)
    count = tl.load(p_tokens + bg * 2)
    return j, count, j < count


@triton.jit
def _columns(at_v, FEATURES: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr):
    """Features and columns of the part of a state `[DV, F]` that a program follows along the chunks, and of its block
    `[BLOCK_F, BLOCK_V]` the offsets and what is there."""
    o_f = tl.arange(0, BLOCK_F)
    o_v = at_v + tl.arange(0, BLOCK_V)
    return o_f, o_v, o_v[None, :] * FEATURES + o_f[:, None], (o_f < FEATURES)[:, None] & (o_v < VALUE_DIM)[None, :]


@triton.jit
def _passed(passed, below):
    """The decays from later tokens of a chunk, where `below` says so, to earlier ones: `[PAGE, PAGE]`, 1 elsewhere."""
    return tl.exp(tl.where(below, passed[:, None] - passed[None, :], 0.0))


@triton.jit
def _update(
    p_written, o_written, b_erased, state, m_j, at_v,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """U = V' - K' S of a chunk, `[PAGE, BLOCK_V]` float32, which is stored in the place of V'."""
    b_written = load_part(p_written, o_written, m_j, at_v, VALUE_DIM, BLOCK_V).to(tl.float32)
    update = b_written - dot_state(b_erased, state, b_written * 0.0, PRECISION)
    store_part(p_written, o_written, update, m_j, at_v, VALUE_DIM, BLOCK_V)
    return update


@triton.jit
def _near(
    p_keys, key_t, p_strength, p_passed, at, count,
    FEATURES: tl.constexpr, BLOCK_F: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The inverses `[PAGE // BLOCK, BLOCK, BLOCK]` of the blocks on the diagonal of a chunk's system.

    Row by row and all blocks at once, each in one warp, which needs no barrier. Row i of an inverse is that of minus
    the system, plus its products with the rows above; it is read from the transposed system, whose layout fits them.
    """
    blocks: tl.constexpr = PAGE // BLOCK
    o = tl.arange(0, BLOCK)
    # [blocks, BLOCK], [blocks, BLOCK, BLOCK]
    j = (at + tl.arange(0, blocks)[:, None] * BLOCK + o[None, :]).to(tl.int64)
    m_j = j < count
    products = tl.zeros([blocks, BLOCK, BLOCK], tl.float32)
    for at_f in tl.static_range(0, FEATURES, BLOCK_F):
        o_f = at_f + tl.arange(0, BLOCK_F)
        m_key = m_j[:, :, None] & (o_f < FEATURES)[None, None, :]
        b_key = tl.load(p_keys + (j * key_t)[:, :, None] + o_f[None, None, :], mask=m_key, other=0.0)
        products = tl.dot(b_key, tl.permute(b_key, (0, 2, 1)), products, input_precision=PRECISION)
    strength = tl.load(p_strength + j, mask=m_j, other=0.0)
    below = (o[:, None] > o[None, :])[None, :, :]
    above = (o[:, None] < o[None, :])[None, :, :]
    inverse = -products * strength[:, :, None]
    turned = -products * strength[:, None, :]
    if DECAY:
        passed = tl.load(p_passed + j)
        inverse = inverse * tl.exp(tl.where(below, passed[:, :, None] - passed[:, None, :], 0.0))
        turned = turned * tl.exp(tl.where(above, passed[:, None, :] - passed[:, :, None], 0.0))
    inverse = tl.where(below, inverse, 0.0)
    turned = tl.where(above, turned, 0.0)
    for i in tl.static_range(1, BLOCK):
        # [blocks, BLOCK]: of row i, by the number of the row that it is multiplied with, and by column
        factors = tl.sum(tl.where((o == i)[None, None, :], turned, 0.0), 2)
        more = tl.sum(factors[:, :, None] * inverse, 1)
        inverse += tl.where((o == i)[None, :, None], more[:, None, :], 0.0)
    return tl.where((o[:, None] == o[None, :])[None, :, :], 1.0, inverse)


@triton.jit
def _inverse(
    p_keys, key_t, p_strength, p_passed, n, count,
    FEATURES: tl.constexpr, BLOCK_F: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The inverse `[PAGE, PAGE]` of I + tril(b K K^T e^{L_i - L_j}, -1) for chunk n, in blocks of BLOCK rows."""
    blocks: tl.constexpr = PAGE // BLOCK
    o = tl.arange(0, PAGE)
    o_block = tl.arange(0, blocks)
    j = (n * PAGE + o).to(tl.int64)
    m_j = j < count
    # [PAGE, PAGE]: the blocks on its diagonal, and what lies below them in I - (the system).
    near = _near(p_keys, key_t, p_strength, p_passed, n * PAGE, count, FEATURES, BLOCK_F, PAGE, BLOCK, DECAY, PRECISION)
    same = (o_block[:, None] == o_block[None, :])[:, None, :, None]
    near = tl.reshape(tl.where(same, near[:, :, None, :], 0.0), [PAGE, PAGE])
    below = o[:, None] // BLOCK > o[None, :] // BLOCK
    far = inner(p_keys, j * key_t, m_j, p_keys, j * key_t, m_j, PAGE, PAGE, FEATURES, BLOCK_F, PRECISION)
    far = -far * tl.load(p_strength + j, mask=m_j, other=0.0)[:, None]
    if DECAY:
        far = far * _passed(tl.load(p_passed + j), below)
    # With X = near far, all of it is (I - X)^-1 near = (I + X)(I + X^2) near: X^4 is 0.
    far = tl.dot(near, tl.where(below, far, 0.0), input_precision=PRECISION)
    twice = tl.dot(far, tl.dot(far, near, input_precision=PRECISION), near, input_precision=PRECISION)
    return tl.dot(far, twice, twice, input_precision=PRECISION)


@triton.jit
def _writes(
    p_key,  # [B, G, M, F]
    p_value,  # [B, G, M, DV]
    p_strength,  # [B, G, M] float32
    p_sums,  # [B, G, S * SEGMENT * PAGE] float32: L, where DECAY
    p_tokens,  # [B, G, 2] int32: tokens of the stream, and those that go into the state
    p_written,  # [B, G, M, DV]: V'
    p_erased,  # [B, G, M, F]: K'
    tokens,
    length,  # S * SEGMENT * PAGE
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
    BLOCK: tl.constexpr,
    DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One chunk, the inverse in blocks of BLOCK rows, a quarter of PAGE."""
    begin(OVERLAP)
    n = tl.program_id(0)
    bg, b, g = _group(GROUPS)
    j, count, m_j = _chunk(p_tokens, bg, n, PAGE)
    p_keys = p_key + b * key_b + g * key_g
    p_values = p_value + b * value_b + g * value_g
    p_strengths = p_strength + bg * tokens
    p_passed = p_sums + bg * length
    inverse = _inverse(p_keys, key_t, p_strengths, p_passed, n, count, FEATURES, BLOCK_F, PAGE, BLOCK, DECAY, PRECISION)
    inverse = inverse * tl.load(p_strengths + j, mask=m_j, other=0.0)[None, :]
    passed = tl.zeros([PAGE], tl.float32)
    if DECAY:
        passed = tl.load(p_passed + j) - tl.load(p_passed + n * PAGE - 1, mask=(n % SEGMENT) > 0, other=0.0)
    for at in tl.static_range(0, VALUE_DIM, BLOCK_V):
        b_value = load_part(p_values, j * value_t, m_j, at, VALUE_DIM, BLOCK_V)
        written = tl.dot(inverse.to(b_value.dtype), b_value, input_precision=PRECISION)
        store_part(p_written, (bg * tokens + j) * VALUE_DIM, written, m_j | ~m_j, at, VALUE_DIM, BLOCK_V)
    inverse = inverse * tl.exp(passed)[None, :]
    for at in tl.static_range(0, FEATURES, BLOCK_F):
        b_key = load_part(p_keys, j * key_t, m_j, at, FEATURES, BLOCK_F)
        erased = tl.dot(inverse.to(b_key.dtype), b_key, input_precision=PRECISION)
        store_part(p_erased, (bg * tokens + j) * FEATURES, erased, m_j | ~m_j, at, FEATURES, BLOCK_F)


@triton.jit
def _states(
    p_key,  # [B, G, M, F]
    p_written,  # [B, G, M, DV]: V', and then U
    p_erased,  # [B, G, M, F]: K'
    p_sums,  # [B, G, S * SEGMENT * PAGE] float32: L, where DECAY
    p_states,  # [B, G, S + 1, DV, F]
    p_first,  # [B, G, F, DV] float32: the state to begin with, where FIRST
    p_last,  # [B, G, DV, F] float32: the state behind the last token that goes into it
    p_tokens,  # [B, G, 2] int32
    chunks,
    segments,
    key_b,
    key_g,
    key_t,
    first_b,
    first_g,
    first_f,
    first_v,
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
    """BLOCK_V columns of the states, from the first slot on.

    The state is float32. In a product it is rounded as K' is: the errors of V' and K', which are stored, are larger.
    """
    begin(OVERLAP)
    at_v = tl.program_id(0) * BLOCK_V
    bg, b, g = _group(GROUPS)
    tokens = chunks * PAGE
    o = tl.arange(0, PAGE)
    o_f, o_v, o_state, m_state = _columns(at_v, FEATURES, VALUE_DIM, BLOCK_F, BLOCK_V)
    size: tl.constexpr = FEATURES * VALUE_DIM
    dtype = p_states.dtype.element_ty
    p_keys = p_key + b * key_b + g * key_g
    p_slots = p_states + bg * (segments + 1) * size
    p_passed = p_sums + bg * segments * SEGMENT * PAGE
    # Chunks that go into the state as a whole; one behind them may be read, and leaves the state as it is.
    end = tl.load(p_tokens + bg * 2 + 1) // PAGE
    state = tl.zeros([BLOCK_F, BLOCK_V], tl.float32)
    if FIRST:
        p_begin = p_first + b * first_b + g * first_g
        state = tl.load(p_begin + o_f[:, None] * first_f + o_v[None, :] * first_v, mask=m_state, other=0.0)
    tl.store(p_slots + o_state, state.to(dtype), mask=m_state)
    if DECAY:  # L of a chunk's tokens and at its end, loaded a step ahead, and that before it
        passed = tl.load(p_passed + o)
        total = tl.load(p_passed + PAGE - 1)
        before = total * 0.0
    for n in tl.range(0, end, num_stages=STAGES):
        j = (n * PAGE + o).to(tl.int64)
        m_j = o >= 0
        # [PAGE, BLOCK_F] twice, [PAGE, BLOCK_V]
        b_erased = load_part(p_erased, (bg * tokens + j) * FEATURES, m_j, 0, FEATURES, BLOCK_F)
        b_key = load_part(p_keys, j * key_t, m_j, 0, FEATURES, BLOCK_F)
        o_written = (bg * tokens + j) * VALUE_DIM
        update = _update(p_written, o_written, b_erased, state, m_j, at_v, VALUE_DIM, BLOCK_V, PRECISION)
        if DECAY:
            update = update * tl.exp(total - passed)[:, None]
            state = state * tl.exp(total - before)
            before = tl.where((n + 1) % SEGMENT > 0, total, 0.0)
            ahead = tl.minimum(n + 1, chunks - 1) * PAGE
            passed = tl.load(p_passed + ahead + o)
            total = tl.load(p_passed + ahead + PAGE - 1)
        state = dot_state(b_key.T, update, state, PRECISION)
        if (n + 1) % SEGMENT == 0:
            tl.store(p_slots + (n + 1) // SEGMENT * (bg * 0 + size) + o_state, state.to(dtype), mask=m_state)
    tl.store(p_last + bg * size + o_state, state, mask=m_state)
    for n in tl.range(end, chunks, num_stages=1):
        j = (n * PAGE + o).to(tl.int64)
        m_j = o >= 0
        b_erased = load_part(p_erased, (bg * tokens + j) * FEATURES, m_j, 0, FEATURES, BLOCK_F)
        o_written = (bg * tokens + j) * VALUE_DIM
        _update(p_written, o_written, b_erased, state, m_j, at_v, VALUE_DIM, BLOCK_V, PRECISION)
        slot = (n + SEGMENT) // SEGMENT
        tl.store(p_slots + slot * (bg * 0 + size) + o_state, state.to(dtype), mask=m_state)


@triton.jit
def _flows(
    p_key,  # [B, G, M, F]
    p_update,  # [B, G, M, DV] float32: the gradient of U, first of what queries read of it, and then all of it
    p_erased,  # [B, G, M, F]: K'
    p_sums,  # [B, G, N * PAGE] float32: L, where DECAY
    p_flows,  # [B, G, N + 1, DV, F] float32: gradients of states, first of what queries read, and then all of them
    p_tokens,  # [B, G, 2] int32
    chunks,
    key_b,
    key_g,
    key_t,
    GROUPS: tl.constexpr,
    FEATURES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PAGE: tl.constexpr,
    DECAY: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """`_states` backwards, from the last slot on, with a slot for every chunk: BLOCK_V columns."""
    begin(OVERLAP)
    at_v = tl.program_id(0) * BLOCK_V
    bg = tl.program_id(1).to(tl.int64)
    tokens = chunks * PAGE
    o = tl.arange(0, PAGE)
    _o_f, _o_v, o_state, m_state = _columns(at_v, FEATURES, VALUE_DIM, BLOCK_F, BLOCK_V)
    size: tl.constexpr = FEATURES * VALUE_DIM
    p_keys = p_key + bg // GROUPS * key_b + bg % GROUPS * key_g
    p_slots = p_flows + bg * (chunks + 1) * size
    p_passed = p_sums + bg * tokens
    held = tl.load(p_tokens + bg * 2 + 1)
    flow = tl.load(p_slots + chunks * (bg * 0 + size) + o_state, mask=m_state, other=0.0)
    for i in tl.range(0, chunks, num_stages=STAGES):
        n = chunks - 1 - i
        j = (n * PAGE + o).to(tl.int64)
        m_j = o >= 0
        # [PAGE, BLOCK_F] twice, [PAGE, BLOCK_V]; what does not go into the state gets nothing from it
        b_erased = load_part(p_erased, (bg * tokens + j) * FEATURES, m_j, 0, FEATURES, BLOCK_F)
        b_key = load_part(p_keys, j * key_t, j < held, 0, FEATURES, BLOCK_F)
        o_update = (bg * tokens + j) * VALUE_DIM
        update = dot_state(b_key, flow, tl.zeros([PAGE, BLOCK_V], tl.float32), PRECISION)
        if DECAY:
            total = tl.load(p_passed + n * PAGE + PAGE - 1)
            update = update * tl.exp(total - tl.load(p_passed + j))[:, None]
            flow = flow * tl.exp(total)
        update += load_part(p_update, o_update, m_j, at_v, VALUE_DIM, BLOCK_V)
        store_part(p_update, o_update, update, m_j, at_v, VALUE_DIM, BLOCK_V)
        p_slot = p_slots + n * (bg * 0 + size) + o_state
        flow = dot_state(b_erased.T, -update, flow + tl.load(p_slot, mask=m_state, other=0.0), PRECISION)
        tl.store(p_slot, flow, mask=m_state)


@triton.jit
def _inside(
    p_key,  # [B, G, M, F]
    p_value,  # [B, G, M, DV]
    p_strength,  # [B, G, M] float32
    p_sums,  # [B, G, N * PAGE] float32: L, where DECAY
    p_tokens,  # [B, G, 2] int32
    p_update,  # [B, G, M, DV]: U
    p_states,  # [B, G, N + 1, DV, F]
    p_of_update,  # [B, G, M, DV] float32
    p_flows,  # [B, G, N + 1, DV, F] float32: gradients of the states
    p_own,  # [B, G, M, F]: a gradient of the keys that is added, where OWN
    p_own_sums,  # [B, G, M] float32: and one of L, where OWN and DECAY
    p_of_key,  # [B, G, M, F]
    p_of_value,  # [B, G, M, DV]
    p_of_strength,  # [B, G, M] float32
    p_of_decay,  # [B, G, M] float32, where DECAY
    chunks,
    key_b,
    key_g,
    key_t,
    value_b,
    value_g,
    value_t,
    own_b,
    own_g,
    own_t,
    GROUPS: tl.constexpr,
    FEATURES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    DECAY: tl.constexpr,
    OWN: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The gradients of what one chunk takes, from those of what it writes and of the state behind it.

    With N the inverse, X = N^T dU is the gradient of b V, and Y = -X S^T that of b e^L K; that of the system is
    -tril(X V'^T + Y K'^T, -1) = -tril(X U^T, -1), because V' = U + K' S. BLOCK_V numbers are all of a value.
    """
    begin(OVERLAP)
    n = tl.program_id(0)
    bg, b, g = _group(GROUPS)
    tokens = chunks * PAGE
    o = tl.arange(0, PAGE)
    j, count, m_j = _chunk(p_tokens, bg, n, PAGE)
    row = bg * tokens + j
    p_keys = p_key + b * key_b + g * key_g
    p_strengths = p_strength + bg * tokens
    p_passed = p_sums + bg * tokens
    p_slot = p_states + (bg * (chunks + 1) + n) * (FEATURES * VALUE_DIM)
    p_flow = p_flows + (bg * (chunks + 1) + n + 1) * (FEATURES * VALUE_DIM)
    dtype = p_update.dtype.element_ty
    strength = tl.load(p_strengths + j, mask=m_j, other=0.0)
    inverse = _inverse(p_keys, key_t, p_strengths, p_passed, n, count, FEATURES, BLOCK_F, PAGE, BLOCK, DECAY, PRECISION)
    # [PAGE, BLOCK_V]
    o_v = tl.arange(0, BLOCK_V)
    b_value = load_part(p_value + b * value_b + g * value_g, j * value_t, m_j, 0, VALUE_DIM, BLOCK_V)
    b_update = load_part(p_update, row * VALUE_DIM, m_j, 0, VALUE_DIM, BLOCK_V)
    b_of = load_part(p_of_update, row * VALUE_DIM, m_j, 0, VALUE_DIM, BLOCK_V)
    b_of = tl.dot(inverse.to(dtype).T, b_of.to(dtype), input_precision=PRECISION)
    store_part(p_of_value, row * VALUE_DIM, b_of * strength[:, None], o >= 0, 0, VALUE_DIM, BLOCK_V)
    of_strength = tl.sum(b_of * b_value.to(tl.float32), 1)
    b_of = b_of.to(dtype)
    # [PAGE, PAGE]: the gradient of the system, and without b what it is made of
    below = o[:, None] > o[None, :]
    of_system = tl.where(below, -tl.dot(b_of, b_update.T, input_precision=PRECISION), 0.0)
    products = inner(p_keys, j * key_t, m_j, p_keys, j * key_t, m_j, PAGE, PAGE, FEATURES, BLOCK_F, PRECISION)
    passed = tl.zeros([PAGE], tl.float32)
    rest = tl.zeros([PAGE], tl.float32)
    if DECAY:
        passed = tl.load(p_passed + j)
        rest = tl.load(p_passed + n * PAGE + PAGE - 1) - passed
        of_system = of_system * _passed(passed, below)
    of_strength += tl.sum(of_system * products, 1)
    of_system = of_system * strength[:, None]
    products = products * of_system
    both = (of_system + of_system.T).to(dtype)
    of_erased = tl.zeros([PAGE], tl.float32)
    of_kept = tl.zeros([PAGE], tl.float32)
    through = tl.zeros([BLOCK_V], tl.float32)
    for at in tl.range(0, FEATURES, BLOCK_F, num_stages=1):  # all of them at once would not fit in shared memory
        # [PAGE, BLOCK_F], [BLOCK_V, BLOCK_F] twice
        b_key = load_part(p_keys, j * key_t, m_j, at, FEATURES, BLOCK_F)
        b_state = load_part(p_slot, o_v * FEATURES, o_v < VALUE_DIM, at, FEATURES, BLOCK_F)
        b_flow = load_part(p_flow, o_v * FEATURES, o_v < VALUE_DIM, at, FEATURES, BLOCK_F)
        erased = -tl.dot(b_of, b_state, input_precision=PRECISION) * tl.exp(passed)[:, None]
        kept = tl.dot(b_update, b_flow.to(dtype), input_precision=PRECISION) * tl.exp(rest)[:, None]
        b_wide = b_key.to(tl.float32)
        of_erased += tl.sum(erased * b_wide, 1)
        of_kept += tl.sum(kept * b_wide, 1)
        through += tl.sum(b_state.to(tl.float32) * b_flow, 1)
        of_key = tl.dot(both, b_key, erased * strength[:, None] + kept, input_precision=PRECISION)
        if OWN:
            b_own = load_part(p_own + b * own_b + g * own_g, j * own_t, m_j, at, FEATURES, BLOCK_F)
            of_key += b_own.to(tl.float32)
        store_part(p_of_key, row * FEATURES, of_key, o >= 0, at, FEATURES, BLOCK_F)
    of_strength += of_erased
    tl.store(p_of_strength + row, of_strength)
    if DECAY:
        of_sums = strength * of_erased + tl.sum(products, 1) - tl.sum(products, 0) - of_kept
        if OWN:
            of_sums += tl.load(p_own_sums + row, mask=m_j, other=0.0)
        # The sum at a chunk's end has what all of it passes on, and a decay is in its own sum and all behind it.
        total = tl.sum(of_kept, 0) + tl.sum(through, 0) * tl.exp(tl.load(p_passed + n * PAGE + PAGE - 1))
        of_decay = tl.sum(tl.where(o[:, None] >= o[None, :], of_sums[:, None], 0.0), 0) + total
        tl.store(p_of_decay + row, tl.where(m_j, of_decay, 0.0))


def chunk_writes(
    key: torch.Tensor, value: torch.Tensor, strength: torch.Tensor, where: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """V' `[B, G, M, DV]` and K' `[B, G, M, F]` of all chunks, zero where there is no token."""
    batch, groups, tokens, features = key.shape
    value_dim = value.shape[-1]
    written = value.new_empty(batch, groups, tokens, value_dim)
    erased = key.new_empty(batch, groups, tokens, features)
    block_f, block_v = (max(16, min(64, triton.next_power_of_2(size))) for size in (features, value_dim))
    config = linear_config(key.itemsize, key.device)["writes"]
    _writes[(tokens // PAGE, batch * groups)](
        key,
        value,
        strength,
        where.decays(strength)[0],
        where.tokens,
        written,
        erased,
        tokens,
        where.segments * where.segment * PAGE,
        *strides(key, value),
        GROUPS=groups,
        FEATURES=features,
        VALUE_DIM=value_dim,
        BLOCK_F=block_f,
        BLOCK_V=block_v,
        SEGMENT=where.segment,
        PAGE=PAGE,
        BLOCK=PAGE // 4,
        DECAY=where.sums is not None,
        PRECISION="tf32x3" if key.dtype == torch.float32 else "tf32",
        num_warps=config["warps"],
        **limits(config),
        **overlapped(key.device),
    )
    return written, erased


def _walk_options(what: str, key: torch.Tensor, value_dim: int, where: Layout) -> dict[str, Any]:
    """Block sizes of a walk along the chunks, and what both walks share."""
    config = linear_config(key.itemsize, key.device)[what]
    return {
        "GROUPS": key.shape[1],
        "FEATURES": key.shape[-1],
        "VALUE_DIM": value_dim,
        "BLOCK_F": max(16, triton.next_power_of_2(key.shape[-1])),
        "BLOCK_V": max(16, min(config["values"], triton.next_power_of_2(value_dim))),
        "PAGE": PAGE,
        "DECAY": where.sums is not None,
        "STAGES": config["stages"] if key.shape[-1] <= 128 else min(config["stages"], 2),  # what shared memory holds
        "PRECISION": "tf32x3",
        "num_warps": config["warps"],
        **overlapped(key.device),
    }


def chunk_updates(
    key: torch.Tensor, written: torch.Tensor, erased: torch.Tensor, first: torch.Tensor | None, where: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """The states along the chunks: one for every segment `[B, G, S + 1, DV, F]`, in the dtype of the values, and the
    last `[B, G, F, DV]` float32. In place of V' `written` gets what the chunks write, U."""
    batch, groups, tokens, _ = key.shape
    value_dim = written.shape[-1]
    states = Slots.like(key, written, where.segments, written.dtype).matrices  # there is no normaliser
    last = states.new_empty(batch, groups, value_dim, key.shape[-1], dtype=torch.float32)
    begin_at = last.mT if first is None else first
    opts = _walk_options("delta", key, value_dim, where)
    _states[(triton.cdiv(value_dim, opts["BLOCK_V"]), batch * groups)](
        key,
        written,
        erased,
        where.decays(last)[0],
        states,
        begin_at,
        last,
        where.tokens,
        tokens // PAGE,
        where.segments,
        *strides(key),
        *begin_at.stride(),
        SEGMENT=where.segment,
        FIRST=first is not None,
        **opts,
    )
    return states, last.mT


def chunk_flows(
    key: torch.Tensor, of_update: torch.Tensor, erased: torch.Tensor, flow: torch.Tensor, where: Layout
) -> None:
    """Gradients along the chunks, in place: of what they write `[B, G, M, DV]`, and of their states `[B, G, N + 1, DV,
    F]`, both float32, from what queries add to them."""
    batch, groups, tokens, _ = key.shape
    opts = _walk_options("delta_back", key, of_update.shape[-1], where)
    _flows[(triton.cdiv(of_update.shape[-1], opts["BLOCK_V"]), batch * groups)](
        key,
        of_update,
        erased,
        where.decays(flow)[0],
        flow,
        where.tokens,
        tokens // PAGE,
        *strides(key),
        **opts,
    )


def chunk_gradients(
    key: torch.Tensor,
    value: torch.Tensor,
    strength: torch.Tensor,
    update: torch.Tensor,
    states: torch.Tensor,
    of_update: torch.Tensor,
    flow: torch.Tensor,
    own: tuple[torch.Tensor, torch.Tensor | None] | None,
    where: Layout,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of keys, values, strengths and logarithms of decays, zero where there is no token, in one launch.

    Args:
        update, states: U and the state before every chunk.
        of_update, flow: what `chunk_flows` has filled.
        own: gradients of the keys, and with decays of their sums L `[B, G, M]`, that are added.
    """
    batch, groups, tokens, features = key.shape
    value_dim = value.shape[-1]
    of_key = key.new_empty(batch, groups, tokens, features)
    of_value = value.new_empty(batch, groups, tokens, value_dim)
    of_strength, of_decay = (strength.new_empty(batch, groups, tokens) for _ in range(2))
    own_key, own_sums = (of_key, None) if own is None else own
    config = linear_config(key.itemsize, key.device)["inside"]
    block_f = config["features"] // (2 if value_dim > 128 else 1)
    _inside[(tokens // PAGE, batch * groups)](
        key,
        value,
        strength,
        where.decays(strength)[0],
        where.tokens,
        update,
        states,
        of_update,
        flow,
        own_key,
        strength if own_sums is None else own_sums,
        of_key,
        of_value,
        of_strength,
        of_decay,
        tokens // PAGE,
        *strides(key, value, own_key),
        GROUPS=groups,
        FEATURES=features,
        VALUE_DIM=value_dim,
        BLOCK_F=max(16, min(block_f, triton.next_power_of_2(features))),
        BLOCK_V=max(16, triton.next_power_of_2(value_dim)),
        PAGE=PAGE,
        BLOCK=PAGE // 4,
        DECAY=where.sums is not None,
        OWN=own is not None,
        PRECISION="tf32x3" if key.dtype == torch.float32 else "tf32",
        num_warps=config["warps"],
        **overlapped(key.device),
    )
    return of_key, of_value, of_strength, of_decay


def plain_gradients(
    key: torch.Tensor,
    value: torch.Tensor,
    strength: torch.Tensor,
    log_decay: torch.Tensor | None,
    update: torch.Tensor,
    states: torch.Tensor,
    of_update: torch.Tensor,
    flow: torch.Tensor,
    own: tuple[torch.Tensor, torch.Tensor | None] | None,
    where: Layout,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`chunk_gradients` in plain PyTorch; what is returned for decays means nothing where there are none."""
    before, after = states[:, :, :-1].float().mT, flow[:, :, 1:].mT
    by_chunk = of_update.unflatten(2, (-1, PAGE))
    of_erased = -by_chunk @ before.mT
    of_kept = update.float().unflatten(2, (-1, PAGE)) @ after.mT
    present = torch.arange(key.shape[2], device=key.device) < where.tokens[..., :1]
    own_key, own_sums = (None, None) if own is None else own
    with torch.enable_grad():
        leaves = [x.detach().float().masked_fill(~present[..., None], 0) for x in (key, value)]
        leaves += [x.detach().masked_fill(~present, 0) for x in (strength, log_decay) if x is not None]
        for leaf in leaves:
            leaf.requires_grad_()
        k, v, b, *d = (x.unflatten(2, (-1, PAGE)) for x in leaves)
        sums = d[0].cumsum(-1) if d else None
        found, of_found = [*delta_writes(k, v, sums, b)], [by_chunk, of_erased]
        if sums is None:
            found, of_found = [*found, k], [*of_found, of_kept]
        else:
            total = sums[..., -1]
            through = torch.exp(total) * (before * after).sum((-1, -2))
            found += [k * torch.exp(total[..., None] - sums)[..., None], total]
            of_found += [of_kept, through.detach()]
            if own_sums is not None:
                found, of_found = [*found, sums], [*of_found, own_sums.unflatten(2, (-1, PAGE))]
        of_key, of_value, of_strength, *of_decay = torch.autograd.grad(found, leaves, of_found)
    of_key, of_value = (x.masked_fill(~present[..., None], 0) for x in (of_key, of_value))
    if own_key is not None:
        of_key = of_key + own_key
    of_strength, of_last = (x.masked_fill(~present, 0) for x in (of_strength, [of_strength, *of_decay][-1]))
    return of_key.to(key.dtype), of_value.to(value.dtype), of_strength, of_last


class _Delta(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        log_decay: torch.Tensor | None,
        strength: torch.Tensor,
        first: torch.Tensor | None,
        where: Layout,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        written, erased = chunk_writes(key, value, strength, where)
        states, last = chunk_updates(key, written, erased, first, where)
        slots = Slots(states, strength)  # a normaliser that nothing reads
        result, _ = read(query, key, written, slots, where, None, mean=False, mass=False)
        ctx.save_for_backward(query, key, value, log_decay, strength, states, written, erased, result)
        ctx.where, ctx.first = where, first is not None
        ctx.set_materialize_grads(False)
        return result, last

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        query, key, value, log_decay, strength, states, update, erased, result = ctx.saved_tensors
        where = ctx.where
        assert where.segment == 1
        tokens = key.shape[2]
        grad = torch.zeros_like(result) if grads[0] is None else grads[0]
        narrow = grad.to(value.dtype)
        narrow = narrow if narrow.stride(-1) == 1 else narrow.contiguous()
        weight = states.new_ones(query.shape[:3])
        extra = torch.zeros_like(weight)
        flows = sums_of_queries(narrow, query, value, weight, extra, where)
        flow = flows.matrices
        if grads[1] is not None:
            flow.scatter_add_(2, _last_slot(states, where), grads[1].mT[:, :, None].contiguous())
        slots = Slots(states, weight)
        grad_query = of_queries(narrow, query, key, update, slots, weight, extra, where, mass=False)
        of_update = torch.zeros(update.shape, dtype=torch.float32, device=update.device)
        own_key = of_sums = None
        if where.own:  # what queries have read of the tokens of their own chunk, and of its decays
            unheld = replace(where, tokens=where.tokens * torch.arange(1, -1, -1, dtype=torch.int32, device=key.device))
            own_key, own_update = of_keys(narrow, query, key, update, flows, weight, extra, unheld, mass=False)
            of_update += own_update
            if log_decay is not None:
                of_sums = _of_rows((grad.float() * result.float()).sum(-1), where, tokens, key.shape[1])
                of_sums -= (own_update.float() * update.float()).sum(-1)
        chunk_flows(key, of_update, erased, flow, where)

        own = None if own_key is None else (own_key, of_sums)
        more = (update, states, of_update, flow, own, where)
        if linear_inside(max(key.shape[-1], value.shape[-1]), log_decay is not None, key.device):
            of_key, of_value, of_strength, of_decay = chunk_gradients(key, value, strength, *more)
        else:
            of_key, of_value, of_strength, of_decay = plain_gradients(key, value, strength, log_decay, *more)
        of_first = flow[:, :, 0].mT if ctx.first else None
        return grad_query, of_key, of_value, None if log_decay is None else of_decay, of_strength, of_first, None


def _last_slot(states: torch.Tensor, where: Layout) -> torch.Tensor:
    """Indices `[B, G, 1, DV, F]` of the slot behind the last token that goes into the state."""
    slot = (where.tokens[..., 1].long() + PAGE - 1) // PAGE
    return slot[..., None, None, None].expand(-1, -1, 1, *states.shape[3:])


def _of_rows(rows: torch.Tensor, where: Layout, tokens: int, groups: int) -> torch.Tensor:
    """Numbers of queries `[B, H, T]`, summed over the heads of a group, where their own keys are: `[B, G, M]`."""
    shift, start, count = where.runs.long().unbind(1)
    order = torch.arange(rows.shape[2], device=rows.device) - start[:, None]
    absent = (order < 0) | (order >= count[:, None])
    place = (order + shift[:, None]).clamp(0, tokens - 1)[:, None].expand(-1, groups, -1)
    summed = rows.masked_fill(absent[:, None], 0).unflatten(1, (groups, -1)).sum(2)
    return summed.new_zeros(*summed.shape[:2], tokens).scatter_add_(2, place, summed)


def gated_delta(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    first: torch.Tensor | None,
    where: Layout,
    *,
    log_decay: torch.Tensor | None,
    strength: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What T new columns read by the gated delta rule, q^T S at the boundary of each; has all gradients.

    Args:
        query: features `[B, H, T, F]`.
        key, value: `[B, G, M, F]` and `[B, G, M, DV]`, as in `triton_linear.additive`; M is a multiple of 64.
        first: the state before, `[B, G, F, DV]` float32; None when it is empty.
        where: what `layout` made; with segments of one chunk where gradients are asked for.
        log_decay: `[B, G, M]` or `[G]`, logarithms of decays; None without.
        strength: `[B, G, M]`; None is 1.

    Returns:
        `[B, H, T, DV]` in the dtype of the values, for float16 in float32, zero in columns that are no token, and the
        last state `[B, G, F, DV]` float32.
    """
    if value.dtype == torch.float16:
        value = value.float()
    query, key = query.to(value.dtype), key.to(value.dtype)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    shape = key.shape[:3]
    strength = key.new_ones(shape, dtype=torch.float32) if strength is None else strength.float().contiguous()
    if log_decay is not None:
        log_decay = (log_decay[:, None] if log_decay.dim() == 1 else log_decay).float().expand(shape)
        where = with_decays(where, log_decay, key.shape[2])
    found: tuple[torch.Tensor, torch.Tensor] = _Delta.apply(query, key, value, log_decay, strength, first, where)
    return found
