"""What the Triton kernels of linear heads share: blocks of rows, which token is where, and launch parameters."""

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
from .tuned import launches_overlap
from .tuned_linear import linear_config

SEGMENT = 2  # chunks, 1 or 2: half of them halve the products with keys, and double the bytes of states


@triton.jit
def begin(OVERLAP: tl.constexpr):
    """The begin of a kernel: it waits for those before it, and then the launch behind it may take its place early.

    In this order no more than two launches are on their way at once.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def fetch_ahead(p_from, size):
    """Have the second-level cache fetch `size` bytes, a multiple of 16 or none, from an address that is one, and go on.

    It may come before `begin`: what other launches still write there is in that cache as well, so that nothing is read
    too early. Needs a Hopper GPU.
    """
    tl.inline_asm_elementwise(
        """{
        .reg .pred first;
        .reg .b32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 first, thread, 0;
        setp.ne.and.u32 first, $2, 0, first;
        @first cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [p_from.to(tl.int64), size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


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
def dot_wide(left, right, acc, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + left @ right for a float32 `right`; with SPLIT as two bfloat16 numbers, which keep 16 bits of it."""
    if SPLIT:
        high = right.to(tl.bfloat16)
        low = (right - high.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(left, high, acc)
        return tl.dot(left, low, acc)
    return tl.dot(left.to(tl.float32), right, acc, input_precision=PRECISION)


@triton.jit
def dot_state(left, state, acc, PRECISION: tl.constexpr):
    """acc + left @ state for a block of a state, which is rounded to what it is multiplied with, where it is read.

    That costs as much as the rounding of what comes out; where states are summed they are float32.
    """
    return tl.dot(left, state.to(left.dtype), acc, input_precision=PRECISION)


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


@triton.jit
def _decay_sums(
    p_decay,  # [B, G, M] logarithms
    p_tokens,  # [B, G, 2] int32
    p_sums,  # [B, G, S * LENGTH] float32
    p_totals,  # [B, G, S] float32
    segments,
    decay_b,
    decay_g,
    decay_t,
    GROUPS: tl.constexpr,
    LENGTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One segment; tokens that are none leave the sums as they are."""
    begin(OVERLAP)
    s = tl.program_id(0)
    bg = tl.program_id(1).to(tl.int64)
    j = (s * LENGTH + tl.arange(0, LENGTH)).to(tl.int64)
    p_row = p_decay + bg // GROUPS * decay_b + bg % GROUPS * decay_g
    decay = tl.load(p_row + j * decay_t, mask=j < tl.load(p_tokens + bg * 2), other=0.0).to(tl.float32)
    total = tl.sum(tl.where(j < tl.load(p_tokens + bg * 2 + 1), decay, 0.0), 0)
    tl.store(p_sums + bg * segments * LENGTH + j, tl.cumsum(decay, 0))
    tl.store(p_totals + bg * segments + s, total)


def with_decays(where: Layout, log_decay: torch.Tensor, stream: int) -> Layout:
    """A layout with the decays of a stream of M tokens, logarithms at most 0: `[B, G, M]`, or `[G]` for all tokens."""
    batch, groups = where.tokens.shape[:2]
    decay = log_decay.detach()
    decay = (decay[:, None] if decay.dim() == 1 else decay).expand(batch, groups, stream)
    length = where.segment * PAGE
    sums = decay.new_empty(batch, groups, where.segments * length, dtype=torch.float32)
    totals = decay.new_empty(batch, groups, where.segments, dtype=torch.float32)
    _decay_sums[(where.segments, batch * groups)](
        decay,
        where.tokens,
        sums,
        totals,
        where.segments,
        *decay.stride(),
        GROUPS=groups,
        LENGTH=length,
        num_warps=1,
        **overlapped(decay.device),
    )
    return replace(where, sums=sums, totals=totals)


@lru_cache(maxsize=16)
def kept_decays(where: Layout, log_decay: torch.Tensor, stream: int) -> Layout:
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
        # Rows that are not aligned are loaded number by number, which takes registers.
        **({} if features % 16 or value_dim % 16 else limits(config)),
        **overlapped(value.device),
    }


def overlapped(device: torch.device) -> dict[str, bool]:
    """What a launch of a kernel that calls `begin` is told."""
    return {"OVERLAP": True, "launch_pdl": True} if launches_overlap(device) else {"OVERLAP": False}


def limits(config: dict[str, int]) -> dict[str, int]:
    """The launch's limit of registers, where there is one, so that more programs run side by side."""
    return {"maxnreg": config["registers"]} if "registers" in config else {}


def heads_at_once(what: str, share: int, value: torch.Tensor) -> int:
    """Query heads of a group that one program works for: two where that divides them and `linear_config` says so."""
    return 2 if share % 2 == 0 and linear_config(value.itemsize, value.device)[what]["heads"] == 2 else 1


def strides(*tensors: torch.Tensor) -> list[int]:
    """The first three strides of every tensor."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]
