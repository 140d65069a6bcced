"""The gated delta rule in Triton: what each chunk writes, the states along the chunks, and their gradients.

With L the logarithm of the decays since the chunk began, b the write strengths and S the state before the chunk, a
chunk writes U = V' - K' S where (V', K') = (I + tril(b K K^T e^{L_i - L_j}, -1))^-1 b (V, e^L K), and leaves
e^{L_C} S + (e^{L_C - L} K)^T U (Gated DeltaNet, arXiv 2412.06464). The inverse of every chunk is found by itself; the
states follow each other. Gradients run backwards along the chunks in a kernel; those inside a chunk are computed anew
in plain PyTorch.
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
from .tuned import linear_config


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
    blocks: tl.constexpr = PAGE // BLOCK
    n = tl.program_id(0)
    bg = tl.program_id(1).to(tl.int64)
    b = bg // GROUPS
    g = bg % GROUPS
    o = tl.arange(0, PAGE)
    o_block = tl.arange(0, blocks)
    j = (n * PAGE + o).to(tl.int64)
    count = tl.load(p_tokens + bg * 2)
    m_j = j < count
    p_keys = p_key + b * key_b + g * key_g
    p_values = p_value + b * value_b + g * value_g
    p_strengths = p_strength + bg * tokens
    p_passed = p_sums + bg * length
    strength = tl.load(p_strengths + j, mask=m_j, other=0.0)
    # [PAGE, PAGE]: the blocks on the diagonal of the inverse, and what lies below them in I - (the system).
    near = _near(
        p_keys, key_t, p_strengths, p_passed, n * PAGE, count, FEATURES, BLOCK_F, PAGE, BLOCK, DECAY, PRECISION
    )
    same = (o_block[:, None] == o_block[None, :])[:, None, :, None]
    near = tl.reshape(tl.where(same, near[:, :, None, :], 0.0), [PAGE, PAGE])
    below = o[:, None] // BLOCK > o[None, :] // BLOCK
    far = inner(p_keys, j * key_t, m_j, p_keys, j * key_t, m_j, PAGE, PAGE, FEATURES, BLOCK_F, PRECISION)
    far = -far * strength[:, None]
    passed = tl.zeros([PAGE], tl.float32)
    if DECAY:
        passed = tl.load(p_passed + j)
        far = far * tl.exp(tl.where(below, passed[:, None] - passed[None, :], 0.0))
        before = tl.load(p_passed + n * PAGE - 1, mask=(n % SEGMENT) > 0, other=0.0)
        passed = passed - before
    # With X = near far, all of the inverse is (I - X)^-1 near = (I + X)(I + X^2) near: X^4 is 0.
    far = tl.dot(near, tl.where(below, far, 0.0), input_precision=PRECISION)
    twice = tl.dot(far, tl.dot(far, near, input_precision=PRECISION), near, input_precision=PRECISION)
    inverse = tl.dot(far, twice, twice, input_precision=PRECISION) * strength[None, :]
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
    bg = tl.program_id(1).to(tl.int64)
    b = bg // GROUPS
    g = bg % GROUPS
    tokens = chunks * PAGE
    o = tl.arange(0, PAGE)
    o_f = tl.arange(0, BLOCK_F)
    o_v = at_v + tl.arange(0, BLOCK_V)
    # [BLOCK_F, BLOCK_V]
    o_state = o_v[None, :] * FEATURES + o_f[:, None]
    m_state = (o_f < FEATURES)[:, None] & (o_v < VALUE_DIM)[None, :]
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
        b_written = load_part(p_written, o_written, m_j, at_v, VALUE_DIM, BLOCK_V).to(tl.float32)
        update = b_written - dot_state(b_erased, state, b_written * 0.0, PRECISION)
        store_part(p_written, o_written, update, m_j, at_v, VALUE_DIM, BLOCK_V)
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
        b_written = load_part(p_written, o_written, m_j, at_v, VALUE_DIM, BLOCK_V).to(tl.float32)
        update = b_written - dot_state(b_erased, state, b_written * 0.0, PRECISION)
        store_part(p_written, o_written, update, m_j, at_v, VALUE_DIM, BLOCK_V)
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
    o_f = tl.arange(0, BLOCK_F)
    o_v = at_v + tl.arange(0, BLOCK_V)
    # [BLOCK_F, BLOCK_V]
    o_state = o_v[None, :] * FEATURES + o_f[:, None]
    m_state = (o_f < FEATURES)[:, None] & (o_v < VALUE_DIM)[None, :]
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
            unheld = replace(where, tokens=where.tokens * where.tokens.new_tensor([1, 0]))
            own_key, own_update = of_keys(narrow, query, key, update, flows, weight, extra, unheld, mass=False)
            of_update += own_update
            if log_decay is not None:
                of_sums = _of_rows((grad.float() * result.float()).sum(-1), where, tokens, key.shape[1])
                of_sums -= (own_update.float() * update.float()).sum(-1)
        chunk_flows(key, of_update, erased, flow, where)

        # Inside the chunks: the update U = V' - K' S, and what it leaves.
        before, after = states[:, :, :-1].float().mT, flow[:, :, 1:].mT
        by_chunk = of_update.unflatten(2, (-1, PAGE))
        of_erased = -by_chunk @ before.transpose(-1, -2)
        of_kept = update.float().unflatten(2, (-1, PAGE)) @ after.transpose(-1, -2)
        present = torch.arange(tokens, device=key.device) < where.tokens[..., :1]
        with torch.enable_grad():
            leaves = [x.detach().float().masked_fill(~present[..., None], 0) for x in (key, value)]
            leaves += [strength.detach().masked_fill(~present, 0)]
            if log_decay is not None:
                leaves += [log_decay.detach().masked_fill(~present, 0)]
            for leaf in leaves:
                leaf.requires_grad_()
            k, v, b = (x.unflatten(2, (-1, PAGE)) for x in leaves[:3])
            decay = None if log_decay is None else leaves[3].unflatten(2, (-1, PAGE)).cumsum(-1)
            new, old = delta_writes(k, v, decay, b)
            found, of_found = [new, old], [by_chunk, of_erased]
            if decay is None:
                found, of_found = [*found, k], [*of_found, of_kept]
            else:
                total = decay[..., -1]
                through = torch.exp(total) * (before * after).sum((-1, -2))
                found += [k * torch.exp(total[..., None] - decay)[..., None], total]
                of_found += [of_kept, through.detach()]
            if decay is not None and of_sums is not None:
                found, of_found = [*found, decay], [*of_found, of_sums.unflatten(2, (-1, PAGE))]
            of_leaves = torch.autograd.grad(found, leaves, of_found)
        masked = [x.masked_fill(~present.view(*present.shape, *(1,) * (x.dim() - 3)), 0) for x in of_leaves]
        grad_key = masked[0] if own_key is None else masked[0] + own_key
        of_first = flow[:, :, 0].mT if ctx.first else None
        of_decay = None if log_decay is None else masked[3]
        return grad_query, grad_key.to(key.dtype), masked[1].to(value.dtype), of_decay, masked[2], of_first, None


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
