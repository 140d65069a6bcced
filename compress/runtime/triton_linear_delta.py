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
    load_part,
    overlapped,
    store_part,
    strides,
    with_decays,
)
from .triton_linear_states import Slots, sums_of_queries
from .tuned import linear_config


@triton.jit
def _writes(
    p_key,  # [B, G, M, F]
    p_value,  # [B, G, M, DV]
    p_strength,  # [B, G, M] float32
    p_sums,  # [B, G, M] float32: L, where DECAY
    p_tokens,  # [B, G, 2] int32: tokens of the stream, and those that go into the state
    p_written,  # [B, G, M, DV]: V'
    p_erased,  # [B, G, M, F]: K'
    p_kept,  # [B, G, M, F]: e^{L_C - L} K
    tokens,
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
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One chunk, the inverse in blocks of BLOCK rows, a quarter of PAGE."""
    begin(OVERLAP)
    bg = tl.program_id(1).to(tl.int64)
    b = bg // GROUPS
    g = bg % GROUPS
    o = tl.arange(0, PAGE)
    j = (tl.program_id(0) * PAGE + o).to(tl.int64)
    m_j = j < tl.load(p_tokens + bg * 2)
    p_keys = p_key + b * key_b + g * key_g
    p_values = p_value + b * value_b + g * value_g
    strength = tl.load(p_strength + bg * tokens + j, mask=m_j, other=0.0)
    # [PAGE, PAGE], with 1 on its diagonal the system is I - this.
    below = o[:, None] > o[None, :]
    near = o[:, None] // BLOCK == o[None, :] // BLOCK
    system = inner(p_keys, j * key_t, m_j, p_keys, j * key_t, m_j, PAGE, PAGE, FEATURES, BLOCK_F, PRECISION)
    system = -system * strength[:, None]
    passed = tl.zeros([PAGE], tl.float32)
    if DECAY:
        passed = tl.load(p_sums + bg * tokens + j)
        system = system * tl.exp(tl.where(below, passed[:, None] - passed[None, :], 0.0))
        total = tl.load(p_sums + bg * tokens + tl.program_id(0) * PAGE + PAGE - 1)
    system = tl.where(below, system, 0.0)
    # The inverses of the blocks on the diagonal, row by row and all at once; rows above row i are ready.
    inverse = tl.where(near, system, 0.0)
    for i in range(1, BLOCK):
        m_row = (o % BLOCK == i)[:, None] & near
        row = tl.sum(tl.where(m_row, inverse, 0.0), 0)
        row += tl.sum(row[:, None] * inverse, 0)
        inverse = tl.where(m_row, row[None, :], inverse)
    inverse = tl.where(o[:, None] == o[None, :], 1.0, inverse)
    # With X these times what lies below the blocks, all of it is (I - X)^-1 = (I + X)(I + X^2) times them: X^4 is 0.
    far = tl.dot(inverse, tl.where(near, 0.0, system), input_precision=PRECISION)
    twice = tl.dot(far, tl.dot(far, inverse, input_precision=PRECISION), inverse, input_precision=PRECISION)
    system = tl.dot(far, twice, twice, input_precision=PRECISION) * strength[None, :]
    for at in tl.static_range(0, VALUE_DIM, BLOCK_V):
        b_value = load_part(p_values, j * value_t, m_j, at, VALUE_DIM, BLOCK_V)
        high = system.to(b_value.dtype)
        low = (system - high.to(tl.float32)).to(b_value.dtype)
        written = tl.dot(high, b_value, input_precision=PRECISION) + tl.dot(low, b_value, input_precision=PRECISION)
        store_part(p_written, (bg * tokens + j) * VALUE_DIM, written, m_j | ~m_j, at, VALUE_DIM, BLOCK_V)
    system = system * tl.exp(passed)[None, :]
    for at in tl.static_range(0, FEATURES, BLOCK_F):
        b_key = load_part(p_keys, j * key_t, m_j, at, FEATURES, BLOCK_F)
        high = system.to(b_key.dtype)
        low = (system - high.to(tl.float32)).to(b_key.dtype)
        erased = tl.dot(high, b_key, input_precision=PRECISION) + tl.dot(low, b_key, input_precision=PRECISION)
        o_key = (bg * tokens + j) * FEATURES
        store_part(p_erased, o_key, erased, m_j | ~m_j, at, FEATURES, BLOCK_F)
        b_kept = b_key.to(tl.float32)
        if DECAY:
            b_kept = b_kept * tl.exp(total - passed)[:, None]
        store_part(p_kept, o_key, b_kept, m_j | ~m_j, at, FEATURES, BLOCK_F)


@triton.jit
def _states(
    p_written,  # [B, G, M, DV]: V', and then U; with REVERSE the gradient of U, so far of what queries read of it
    p_erased,  # [B, G, M, F]
    p_kept,  # [B, G, M, F]
    p_totals,  # [B, G, N] float32: L_C, where DECAY
    p_states,  # [B, G, N + 1, DV, F]; with REVERSE float32
    p_first,  # [B, G, F, DV] float32: the state to begin with, where FIRST
    p_last,  # [B, G, DV, F] float32: the state behind the last token that goes into it; not with REVERSE
    p_tokens,  # [B, G, 2] int32
    chunks,
    tokens,
    first_b,
    first_g,
    first_f,
    first_v,
    GROUPS: tl.constexpr,
    FEATURES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PAGE: tl.constexpr,
    DECAY: tl.constexpr,
    FIRST: tl.constexpr,
    REVERSE: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """BLOCK_V columns of the states, from the first slot on; or of their gradients, from the last slot back.

    With REVERSE the slots hold what the queries of each chunk add to the gradient, and get what all later ones do.
    The state is float32. In a product it is rounded as K' is: the errors of V' and K', which are stored, are larger.
    """
    begin(OVERLAP)
    at_v = tl.program_id(0) * BLOCK_V
    bg = tl.program_id(1).to(tl.int64)
    o = tl.arange(0, PAGE)
    o_f = tl.arange(0, BLOCK_F)
    o_v = at_v + tl.arange(0, BLOCK_V)
    # [BLOCK_F, BLOCK_V]
    o_state = o_v[None, :] * FEATURES + o_f[:, None]
    m_state = (o_f < FEATURES)[:, None] & (o_v < VALUE_DIM)[None, :]
    size: tl.constexpr = FEATURES * VALUE_DIM
    p_slots = p_states + bg * (chunks + 1) * size
    if REVERSE:
        state = tl.load(p_slots + chunks * (bg * 0 + size) + o_state, mask=m_state, other=0.0)
    else:
        end = (tl.load(p_tokens + bg * 2 + 1) + PAGE - 1) // PAGE
        state = tl.zeros([BLOCK_F, BLOCK_V], tl.float32)
        if FIRST:
            p_begin = p_first + bg // GROUPS * first_b + bg % GROUPS * first_g
            state = tl.load(p_begin + o_f[:, None] * first_f + o_v[None, :] * first_v, mask=m_state, other=0.0)
        tl.store(p_slots + o_state, state.to(p_states.dtype.element_ty), mask=m_state)
        tl.store(p_last + bg * size + o_state, state, mask=m_state & (o_state * 0 == end))
    for i in tl.range(0, chunks, num_stages=STAGES):
        n = i
        slot = n + 1
        if REVERSE:
            n = chunks - 1 - i
            slot = n
        j = bg * tokens + n * PAGE + o
        m_j = o >= 0
        # [PAGE, BLOCK_F] twice, [PAGE, BLOCK_V]
        b_erased = load_part(p_erased, j * FEATURES, m_j, 0, FEATURES, BLOCK_F)
        b_kept = load_part(p_kept, j * FEATURES, m_j, 0, FEATURES, BLOCK_F)
        scale = 1.0
        if DECAY:
            scale = tl.exp(tl.load(p_totals + bg * chunks + n))
        p_slot = p_slots + slot * (bg * 0 + size)
        b_written = load_part(p_written, j * VALUE_DIM, m_j, at_v, VALUE_DIM, BLOCK_V).to(tl.float32)
        if REVERSE:
            update = dot_state(b_kept, state, b_written, PRECISION)
            own = tl.load(p_slot + o_state, mask=m_state, other=0.0)
            state = dot_state(b_erased.T, -update, own + state * scale, PRECISION)
        else:
            update = b_written - dot_state(b_erased, state, b_written * 0.0, PRECISION)
            state = dot_state(b_kept.T, update, state * scale, PRECISION)
            tl.store(p_last + bg * size + o_state, state, mask=m_state & (o_state * 0 + slot == end))
        store_part(p_written, j * VALUE_DIM, update, m_j, at_v, VALUE_DIM, BLOCK_V)
        tl.store(p_slot + o_state, state.to(p_states.dtype.element_ty), mask=m_state)


def walk(
    written: torch.Tensor,
    erased: torch.Tensor,
    kept: torch.Tensor,
    states: torch.Tensor,
    first: torch.Tensor | None,
    where: Layout,
    *,
    reverse: bool,
) -> torch.Tensor:
    """Fill the slots; without `reverse` the result is the last state, `[B, G, F, DV]` float32."""
    batch, groups, tokens, features = kept.shape
    value_dim = written.shape[-1]
    config = linear_config(kept.itemsize, kept.device)["delta"]
    block_f = max(16, triton.next_power_of_2(features))
    block_v = max(16, min(config["values"], triton.next_power_of_2(value_dim)))
    last = states.new_empty(batch, groups, value_dim, features, dtype=torch.float32)
    begin_at = last.mT if first is None else first
    _states[(triton.cdiv(value_dim, block_v), batch * groups)](
        written,
        erased,
        kept,
        where.decays(states)[1],
        states,
        begin_at,
        last,
        where.tokens,
        tokens // PAGE,
        tokens,
        *begin_at.stride(),
        GROUPS=groups,
        FEATURES=features,
        VALUE_DIM=value_dim,
        BLOCK_F=block_f,
        BLOCK_V=block_v,
        PAGE=PAGE,
        DECAY=where.totals is not None,
        FIRST=first is not None,
        REVERSE=reverse,
        STAGES=config["stages"],
        PRECISION="tf32x3",
        num_warps=config["warps"],
        **overlapped(kept.device),
    )
    return last.mT


def chunk_writes(
    key: torch.Tensor, value: torch.Tensor, strength: torch.Tensor, where: Layout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """V' `[B, G, M, DV]`, K' and e^{L_C - L} K `[B, G, M, F]` of all chunks, zero where there is no token."""
    batch, groups, tokens, features = key.shape
    value_dim = value.shape[-1]
    written = value.new_empty(batch, groups, tokens, value_dim)
    erased, kept = (key.new_empty(batch, groups, tokens, features) for _ in range(2))
    block_f, block_v = (max(16, min(64, triton.next_power_of_2(size))) for size in (features, value_dim))
    _writes[(tokens // PAGE, batch * groups)](
        key,
        value,
        strength,
        strength if where.sums is None else where.sums,
        where.tokens,
        written,
        erased,
        kept,
        tokens,
        *strides(key, value),
        GROUPS=groups,
        FEATURES=features,
        VALUE_DIM=value_dim,
        BLOCK_F=block_f,
        BLOCK_V=block_v,
        PAGE=PAGE,
        BLOCK=PAGE // 4,
        DECAY=where.sums is not None,
        PRECISION="tf32x3",
        num_warps=4,
        **overlapped(key.device),
    )
    return written, erased, kept


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
        written, erased, kept = chunk_writes(key, value, strength, where)
        slots = Slots.like(key, value, key.shape[2] // PAGE, value.dtype)  # there is no normaliser
        states = slots.matrices
        last = walk(written, erased, kept, states, first, where, reverse=False)
        result, _ = read(query, key, written, slots, where, None, mean=False, mass=False)
        ctx.save_for_backward(query, key, value, log_decay, strength, states, written, erased, kept, result)
        ctx.where, ctx.first = where, first is not None
        ctx.set_materialize_grads(False)
        return result, last

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        query, key, value, log_decay, strength, states, update, erased, kept, result = ctx.saved_tensors
        where = ctx.where
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
                of_sums = _of_rows((grad * result).sum(-1), where, tokens, key.shape[1])
                of_sums -= (own_update.float() * update.float()).sum(-1)
        walk(of_update, erased, kept, flow, None, where, reverse=True)

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
        where: what `layout` made with segments of one chunk.
        log_decay: `[B, G, M]` or `[G]`, logarithms of decays; None without.
        strength: `[B, G, M]`; None is 1.

    Returns:
        `[B, H, T, DV]` float32, zero in columns that are no token, and the last state `[B, G, F, DV]` float32.
    """
    if value.dtype == torch.float16:
        value = value.float()
    query, key = query.to(value.dtype), key.to(value.dtype)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    shape = key.shape[:3]
    strength = key.new_ones(shape, dtype=torch.float32) if strength is None else strength.float().contiguous()
    if log_decay is not None:
        log_decay = (log_decay[:, None] if log_decay.dim() == 1 else log_decay).float().expand(shape).contiguous()
        where = with_decays(where, log_decay, key.shape[2])
    found: tuple[torch.Tensor, torch.Tensor] = _Delta.apply(query, key, value, log_decay, strength, first, where)
    return found
