"""What all kernels share: the span rule, the same integers as `span.py`, and blocks of the tensors of a layer.

Names in the kernels: `p_` a pointer, `o_` offsets, `m_` a mask, `b_` a block that was loaded. There are B sequences, H
query heads, G head groups and T columns; a key has D numbers and a value DV, blocks BLOCK_D and BLOCK_V, powers of two.
"""

from __future__ import annotations

from functools import lru_cache

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels need Triton; without it attention runs in plain PyTorch") from error

from .span import BETA_UNIT, NO_END, Span, kept_table

_UNIT = tl.constexpr(BETA_UNIT)
_NO_END = tl.constexpr(NO_END)


@triton.jit
def first_key(position, alpha, beta_units, mask):
    """`span.first_key`: the first key of the window; positions below 2^31 / 1024 tokens."""
    position = position & mask
    length = tl.maximum(alpha + ((position + 1) * beta_units) // _UNIT, 1)
    return tl.maximum(position + 1 - length, 0) & mask


@triton.jit
def last_query(key, alpha, beta_units, mask):
    """`span.last_query`; a rule with beta = 1 never ends, or sees itself alone."""
    key = key | ~mask
    # 64 bits: 1024 times a position.
    rest = tl.maximum(_UNIT - beta_units, 1)
    last = (_UNIT * (key + alpha).to(tl.int64)) // rest - 1
    last = tl.where(beta_units == _UNIT, tl.where(key + alpha < 0, -1, _NO_END), last)
    # Division in a kernel rounds towards zero; only a negative quotient, which the maximum drops, differs.
    return tl.minimum(tl.maximum(last, key), _NO_END).to(tl.int32) | ~mask


@triton.jit
def load_rule(p_rules, g):
    """Sink, alpha, beta units and mask of group g, from `span_rules`, `[G, 4]` int32."""
    p_rule = p_rules + g * 4
    return tl.load(p_rule), tl.load(p_rule + 1), tl.load(p_rule + 2), tl.load(p_rule + 3)


@triton.jit
def load_run(p_rows, b):
    """Position of sequence b's first new token, its first column and its number of columns, from `[B, 3]` int32."""
    return tl.load(p_rows + b * 3), tl.load(p_rows + b * 3 + 1), tl.load(p_rows + b * 3 + 2)


@triton.jit
def columns_at(b, head, column, stride_b, stride_h, stride_t):
    """Offsets of the given columns of one sequence and head of `[B, heads, T, ...]`."""
    return b.to(tl.int64) * stride_b + head * stride_h + column.to(tl.int64) * stride_t


@triton.jit
def place(p_rules, p_rows, GROUPS: tl.constexpr):
    """The sequence and group of a program, the group's rule (`load_rule`), the sequence's first column and tokens."""
    b = tl.program_id(1) // GROUPS
    g = tl.program_id(1) % GROUPS
    sink, alpha, beta, mask = load_rule(p_rules, g)
    _, start, count = load_run(p_rows, b)
    return b, g, sink, alpha, beta, mask, start, count


@triton.jit
def packed_rows(tile, g, count, SHARE: tl.constexpr, BLOCK_M: tl.constexpr):
    """Position and query head of a tile's rows, the heads of a group together, and which are tokens: `[M]` each."""
    o_packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    t = o_packed // SHARE
    return t, g * SHARE + o_packed % SHARE, t < count


@triton.jit
def causal(t, j):
    """Which keys j `[N]` are not behind the queries at t `[M]`: `[M, N]`."""
    return j[None, :] <= t[:, None]


@triton.jit
def sees(t, j, sink, first):
    """Which keys j `[N]` the queries at t `[M]` see, whose windows start at `first` `[M]`: `[M, N]`."""
    return causal(t, j) & ((j[None, :] < sink) | (j[None, :] >= first[:, None]))


@triton.jit
def load_block(p_base, o_rows, m_rows, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """A block `[rows, BLOCK]` of rows of DIM numbers that start at `o_rows`; zero where masked, which may hold NaN."""
    o_dims = tl.arange(0, BLOCK)
    return tl.load(
        p_base + o_rows[:, None] + o_dims[None, :], mask=m_rows[:, None] & (o_dims < DIM)[None, :], other=0.0
    )


@triton.jit
def store_block(p_base, o_rows, block, m_rows, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Write a block `[rows, BLOCK]` to rows of DIM numbers that start at `o_rows`, in the dtype that is there."""
    o_dims = tl.arange(0, BLOCK)
    m_block = m_rows[:, None] & (o_dims < DIM)[None, :]
    tl.store(p_base + o_rows[:, None] + o_dims[None, :], block.to(p_base.dtype.element_ty), mask=m_block)


@lru_cache(maxsize=4096)
def span_rules(spans: tuple[Span, ...], device: torch.device) -> torch.Tensor:
    """The rules of a layer's groups as a kernel reads them, `[G, 4]` int32: sink, alpha, beta in units, and a mask.

    sink and alpha are held below 2^30, which no position reaches. The mask rounds a position down to the rule's
    granule: -granule, whose lower bits are zero.
    """
    most = 1 << 30
    rules = [(min(s.sink, most), max(-most, min(s.alpha, most)), s.beta_units, -s.granule) for s in spans]
    return kept_table(rules, device)


@triton.jit
def tanh(x):
    """By way of an exponential, which may overflow to infinity: then it is 1."""
    return 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)
