"""What tokens choose in one launch: `routers.Router` without gradients, for prefill and for a decode step."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels need Triton; without it routers run in plain PyTorch") from error

from .span import kept_table
from .tuned_routed import router_config

if TYPE_CHECKING:
    from .routers import Router

FEW = 64  # tokens of a pass up to which each has a program of its own


@triton.jit
def _norms(
    p_query, o_token, m_token, query_h,
    UNITS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Norms of the queries of all units, `[BLOCK_T, BLOCK_U]`, of tokens that start at `o_token` `[BLOCK_T]`."""
    unit = tl.arange(0, BLOCK_U)[:, None]
    o_number = tl.arange(0, BLOCK_H * BLOCK_D)[None, :]
    head, dim = o_number // BLOCK_D, o_number % BLOCK_D
    # [BLOCK_U, BLOCK_H * BLOCK_D], [BLOCK_T, BLOCK_U, BLOCK_H * BLOCK_D]
    m_number = (unit < UNITS) & (head < HEADS) & (dim < DIM)
    o_query = o_token[:, None, None] + ((unit * HEADS + head) * query_h + dim)[None]
    b_query = tl.load(p_query + o_query, mask=m_token[:, None, None] & m_number[None], other=0.0).to(tl.float32)
    return tl.sqrt_rn(tl.sum(b_query * b_query, 2))


@triton.jit
def _products(
    p_hidden, p_weight, o_token, m_token,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Products of inputs `[BLOCK_T, WIDTH]` that start at `o_token` with the rows of a weight, `[BLOCK_T, BLOCK_R]`."""
    o_row = tl.arange(0, BLOCK_R)
    total = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for start in tl.range(0, WIDTH, BLOCK_C, num_stages=STAGES):
        o_number = start + tl.arange(0, BLOCK_C)
        m_number = o_number < WIDTH
        # [BLOCK_T, BLOCK_C], [BLOCK_R, BLOCK_C]
        m_hidden = m_token[:, None] & m_number[None, :]
        m_weight = (o_row < ROWS)[:, None] & m_number[None, :]
        b_hidden = tl.load(p_hidden + o_token[:, None] + o_number[None, :], mask=m_hidden, other=0.0)
        b_weight = tl.load(p_weight + o_row[:, None] * WIDTH + o_number[None, :], mask=m_weight, other=0.0)
        if BLOCK_T == 1:
            total += tl.sum(b_hidden.to(tl.float32) * b_weight.to(tl.float32), 1)[None, :]
        elif b_hidden.dtype == b_weight.dtype:  # products of two numbers of 16 bits are exact in float32
            total = tl.dot(b_hidden, b_weight.T, total, input_precision="ieee")
        else:
            total = tl.dot(b_hidden.to(tl.float32), b_weight.to(tl.float32).T, total, input_precision="ieee")
    return total


@triton.jit
def _shares(score, m_unit):
    """Softmax over the units `[BLOCK_T, BLOCK_U]` of a mask times how many they are: exactly 1 where all are equal."""
    top = tl.max(tl.where(m_unit, score, float("-inf")), 1)
    weight = tl.where(m_unit, tl.exp(score - top[:, None]), 0.0)
    count = tl.sum(m_unit.to(tl.float32), 1)
    return tl.div_rn(weight * count[:, None], tl.where(count > 0.0, tl.sum(weight, 1), 1.0)[:, None])


@triton.jit
def _route(
    p_query,  # [B, H, T, D], with NORM; else None
    p_hidden,  # [B, T, WIDTH], without
    p_route,  # [units, WIDTH]
    p_halves,  # [GROUPS, 2, WIDTH], where HALVES
    p_routed,  # [units] int32: 1 where a unit is chosen or not, 0 where it is always on
    p_on,  # [B, T, units] uint8
    p_gates,  # [B, T, units] float32, where GATED
    tokens,
    columns,
    active,
    stride_b,
    stride_t,
    query_h,
    UNITS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NORM: tl.constexpr,
    HALVES: tl.constexpr,
    GATED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_T tokens: their scores, the `active` highest of the routed units, and the gates."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_token = token < tokens
    o_token = (token // columns).to(tl.int64) * stride_b + (token % columns).to(tl.int64) * stride_t
    unit = tl.arange(0, BLOCK_U)
    m_routed = tl.load(p_routed + unit, mask=unit < UNITS, other=0) != 0
    # [BLOCK_T, BLOCK_U]
    if NORM:
        score = _norms(p_query, o_token, m_token, query_h, UNITS, HEADS, DIM, BLOCK_U, BLOCK_H, BLOCK_D)
        count = tl.sum(m_routed.to(tl.float32), 0)
        mean = tl.sum(tl.where(m_routed[None, :], score, 0.0), 1) / count
        apart = tl.where(m_routed[None, :], score - mean[:, None], 0.0)
        variance = tl.sum(apart * apart, 1) / tl.maximum(count - 1.0, 1.0)
        score = tl.div_rn(score, tl.where(variance > 0.0, tl.sqrt_rn(variance), 1.0)[:, None])
    else:
        score = _products(p_hidden, p_route, o_token, m_token, UNITS, WIDTH, BLOCK_U, BLOCK_C, BLOCK_T, STAGES)

    # Of equal scores the lower unit comes first. [BLOCK_T, BLOCK_U, BLOCK_U]: whether the last one comes before.
    own, other = score[:, :, None], score[:, None, :]
    before = (other > own) | ((other == own) & (unit[None, :] < unit[:, None])[None])
    rank = tl.sum((before & m_routed[None, None, :]).to(tl.int32), 2)
    m_chosen = (rank < active) & m_routed[None, :]
    m_shared = (unit < UNITS) & (m_routed == 0)
    o_unit = token.to(tl.int64)[:, None] * UNITS + unit[None, :]
    m_unit = m_token[:, None] & (unit < UNITS)[None, :]
    tl.store(p_on + o_unit, (m_chosen | m_shared[None, :]).to(tl.uint8), mask=m_unit)
    if GATED:
        gate = _shares(score, m_chosen)
        if NORM:
            always = tl.full([BLOCK_T, BLOCK_U], 1.0, tl.float32)
        else:
            always = _shares(score, m_shared[None, :] & m_token[:, None])
        if HALVES:
            # [BLOCK_T, BLOCK_G]: the rows of a group for its shared and its routed units, one after the other
            half = _products(p_hidden, p_halves, o_token, m_token, 2 * GROUPS, WIDTH, BLOCK_G, BLOCK_C, BLOCK_T, STAGES)
            row = tl.arange(0, BLOCK_G)[None, :]
            first = tl.sum(tl.where(row % 2 == 0, half, 0.0), 1) / GROUPS
            second = tl.sum(tl.where(row % 2 == 1, half, 0.0), 1) / GROUPS
            top = tl.maximum(first, second)
            first, second = tl.exp(first - top), tl.exp(second - top)
            always *= tl.div_rn(2.0 * first, first + second)[:, None]
            gate *= tl.div_rn(2.0 * second, first + second)[:, None]
        gate = tl.where(m_routed[None, :], gate, always)
        gate = tl.where(gate == gate, gate, 0.0)  # of columns that are no token, whose outputs stay 0
        tl.store(p_gates + o_unit, gate, mask=m_unit)


def takes(router: Router) -> bool:
    """Whether `route` does what this router does."""
    return router.kind in ("norm", "two_stage")


def route(router: Router, query: torch.Tensor, hidden: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What tokens choose, in one launch without a host sync. Columns that are no token may hold anything, NaN included.

    Args:
        router: one that `takes` names.
        query, hidden: as `Router.forward` is given them.

    Returns:
        `[B, T, units]`: which units are on, and their gates in float32, which mean nothing where a unit is off; None
        where they are 1.
    """
    batch, _, columns, dim = query.shape
    norm, units = router.kind == "norm", router.units
    gated = not router.quantised
    halves = gated and not norm and bool(router.shared) and bool(router.routed)
    on = torch.empty(batch, columns, units, dtype=torch.bool, device=query.device)
    gates = torch.empty(batch, columns, units, dtype=torch.float32, device=query.device) if gated else None
    few = batch * columns <= FEW
    block_t = 1 if few or norm else 16
    options = {"HALVES": halves, "GATED": gated, "NORM": norm}
    if norm:
        query = query if query.stride(-1) == 1 else query.contiguous()
        source, strides = query, (query.stride(0), query.stride(2), query.stride(1))
        width, groups = 1, 1
    else:
        assert hidden is not None
        source = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
        strides, width, groups = (source.stride(0), source.stride(1), 0), source.shape[-1], router.halves.shape[0]
    block_u = max(2 if norm else 16, triton.next_power_of_2(units))
    block_g = max(16, triton.next_power_of_2(2 * groups))
    row_bytes = 1 if norm else max(block_u, block_g) * router.route.itemsize
    config = router_config(row_bytes, few, query.device)
    _route[(triton.cdiv(batch * columns, block_t),)](
        source if norm else None,
        None if norm else source,
        None if norm else router.route.detach(),
        router.halves.detach() if halves else None,
        _routed(router.routed, units, query.device),
        on.view(torch.uint8),
        gates,
        batch * columns,
        columns,
        router.active,
        *strides,
        UNITS=units,
        HEADS=router.heads,
        DIM=dim,
        WIDTH=width,
        GROUPS=groups,
        BLOCK_T=block_t,
        BLOCK_U=block_u,
        BLOCK_H=triton.next_power_of_2(router.heads),
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        BLOCK_G=block_g,
        BLOCK_C=config["block"],
        STAGES=config["stages"],
        num_warps=8 if few and not norm else 4,
        **options,
    )
    return on, gates


@lru_cache(maxsize=1024)
def _routed(numbers: tuple[int, ...], units: int, device: torch.device) -> torch.Tensor:
    """1 for the units that are chosen from, 0 for those that are always on."""
    return kept_table([int(unit in numbers) for unit in range(units)], device)


KERNELS = (takes, route)
