"""Prefill of heads that are on for some tokens only: the rows that are on are listed, and no other is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels need Triton; without it attention runs in plain PyTorch") from error

from .pages import Pages
from .reference import Rows, check_active, only_active
from .scores import KernelScores, Scores
from .span import Span
from .triton_attention import prefill as whole_prefill
from .triton_prefill import forward
from .triton_span import load_run
from .tuned_routed import rows_block

SKIP_FROM = 2048  # tokens; below, the launches that list rows take longer than the arithmetic that they save


@triton.jit
def _flags(
    p_active, p_rows, segment, active_b, active_u, active_t,
    SHARE: tl.constexpr, GROUPS: tl.constexpr, BY_HEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A chunk of BLOCK rows of one (sequence, group): token * SHARE + head of the group, and which are on."""
    b = segment // GROUPS
    g = segment % GROUPS
    _, start, count = load_run(p_rows, b)
    # [BLOCK]
    o_packed = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o_token = o_packed // SHARE
    unit = g * SHARE + o_packed % SHARE if BY_HEAD else tl.zeros_like(o_packed) + g
    o_flag = b.to(tl.int64) * active_b + unit * active_u + (start + o_token).to(tl.int64) * active_t
    b_flag = tl.load(p_active + o_flag, mask=o_token < count, other=0)
    return o_packed, (b_flag != 0).to(tl.int32)


@triton.jit
def _count(
    p_active,  # [B, G or H, T] uint8
    p_rows,  # [B, 3] int32: past, start, count
    p_counts,  # [B, G, chunks] int32
    active_b,
    active_u,
    active_t,
    SHARE: tl.constexpr,
    GROUPS: tl.constexpr,
    BY_HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many rows of a chunk are on."""
    segment = tl.program_id(1)
    _, b_on = _flags(p_active, p_rows, segment, active_b, active_u, active_t, SHARE, GROUPS, BY_HEAD, BLOCK)
    tl.store(p_counts + segment * tl.num_programs(0) + tl.program_id(0), tl.sum(b_on, 0))


@triton.jit
def _list(
    p_active,  # [B, G or H, T] uint8
    p_rows,  # [B, 3] int32
    p_counts,  # [B, G, chunks] int32
    p_on,  # [B, G, rows] int32
    p_on_counts,  # [B, G] int32
    rows,
    active_b,
    active_u,
    active_t,
    SHARE: tl.constexpr,
    GROUPS: tl.constexpr,
    BY_HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write the rows of a chunk that are on behind those of the chunks before it."""
    chunk = tl.program_id(0)
    segment = tl.program_id(1)
    chunks = tl.num_programs(0)
    # [BLOCK], [BLOCK_C]
    o_packed, b_on = _flags(p_active, p_rows, segment, active_b, active_u, active_t, SHARE, GROUPS, BY_HEAD, BLOCK)
    o_chunk = tl.arange(0, BLOCK_C)
    b_counts = tl.load(p_counts + segment * chunks + o_chunk, mask=o_chunk < chunks, other=0)
    before = tl.sum(tl.where(o_chunk < chunk, b_counts, 0), 0)
    place = segment.to(tl.int64) * rows + before + tl.cumsum(b_on, 0) - 1
    tl.store(p_on + place, o_packed, mask=b_on != 0)
    if chunk == 0:
        tl.store(p_on_counts + segment, tl.sum(b_counts, 0))


def rows_on(active: torch.Tensor, rows: torch.Tensor, heads: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of queries that are on, by sequence and group, made on the device in two launches.

    Args:
        active: bool `[B, G, T]` or `[B, H, T]`, of any strides.
        rows: `[B, 3]` int32, of each sequence past, first column and columns that are tokens (`Rows.tensor`).

    Returns:
        `[B, G, T * H / G]` int32: of each group the rows token * (H / G) + head of the group that are on, ascending,
        with the token counted from the sequence's first column; behind them anything. `[B, G]` int32: how many.
    """
    batch, units, columns = active.shape
    share = heads // groups
    block = rows_block(active.device)
    grid = (triton.cdiv(columns * share, block), batch * groups)
    flags, by_head = active.view(torch.uint8), units != groups
    counts = rows.new_empty(batch, groups, grid[0])
    listed, totals = rows.new_empty(batch, groups, columns * share), rows.new_empty(batch, groups)
    _count[grid](flags, rows, counts, *flags.stride(), SHARE=share, GROUPS=groups, BY_HEAD=by_head, BLOCK=block)
    _list[grid](
        flags,
        rows,
        counts,
        listed,
        totals,
        columns * share,
        *flags.stride(),
        SHARE=share,
        GROUPS=groups,
        BY_HEAD=by_head,
        BLOCK=block,
        BLOCK_C=max(16, triton.next_power_of_2(grid[0])),
    )
    return listed, totals


def prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: Sequence[Span],
    active: torch.Tensor,
    *,
    gates: torch.Tensor | None = None,
    rows: Rows | None = None,
    pages: Pages | None = None,
    scale: float | None = None,
    scores: Scores | None = None,
) -> torch.Tensor:
    """As `routed_reference.prefill`: rows that are off are left out of the tiles, so their arithmetic is saved.

    All query heads of a group that are on for a token lie next to each other in a tile, as in the dense kernel, and
    share its keys. Nothing is read back by the host. Short inputs compute everything, and so do scores that the
    kernels do not have.
    """
    batch, heads, columns, dim = query.shape
    check_active(active, heads, len(spans), gates)
    form = KernelScores() if scores is None else scores.for_kernels
    if form is None or (query.is_cuda and columns < SKIP_FROM):
        out = whole_prefill(query, key, value, spans, rows=rows, pages=pages, scale=scale, scores=scores)
        return only_active(out, active, gates)
    rows = rows or Rows.whole(batch, columns)
    where = rows.tensor(query.device)
    out, _ = forward(
        query if query.stride(-1) == 1 else query.contiguous(),
        key,
        value,
        spans,
        where,
        not rows.is_whole(columns),
        None if pages is None else (pages.keys, pages.values, pages.table),
        dim**-0.5 if scale is None else scale,
        keep_lse=False,
        cap=form.cap,
        extra=form.by_head,
        score=form.score,
        on=rows_on(active, where, heads, len(spans)),
        gates=gates,
    )
    return out
