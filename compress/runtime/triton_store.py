"""Writing new tokens into the pages of a planned layer, as one Triton kernel a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels need Triton; without it attention runs in plain PyTorch") from error

from .pages import Pages
from .reference import Rows
from .span import PAGE, Span
from .triton_span import first_key, load_block, load_rule, load_run, span_rules, store_block


@triton.jit
def _store(
    p_key,  # [B, G, T, D]
    p_value,  # [B, G, T, DV]
    p_key_pages,  # [places, PAGE, D]
    p_value_pages,  # [places, PAGE, DV]
    p_table,  # [B, G, numbers] int32
    p_rows,  # [B, 3] int32: past, start, count; with ONE [B] lengths, the new token included
    p_rules,  # [G, 4] int32
    numbers,
    slack,  # tokens that pages stay for behind their window
    key_b,
    key_g,
    key_t,
    value_b,
    value_g,
    value_t,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    ONE: tl.constexpr,
):
    """BLOCK_T tokens of one (sequence, group); those of pages that are not held any more are left out."""
    b = tl.program_id(1) // GROUPS
    g = tl.program_id(1) % GROUPS
    if ONE:
        total = tl.load(p_rows + b)
        past = total - 1
        start = 0
        count = tl.minimum(total, 1)
    else:
        past, start, count = load_run(p_rows, b)
        total = past + count
    sink, alpha, beta, mask = load_rule(p_rules, g)
    sinks = (tl.minimum(sink, total) + PAGE - 1) // PAGE
    window = first_key(tl.maximum(total - slack, 0) - 1, alpha, beta, mask) // PAGE
    # [BLOCK_T]
    o_token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    number = (past + o_token) // PAGE
    m_held = (o_token < count) & ((number < sinks) | (number >= window)) & (number < numbers)
    place = tl.load(p_table + tl.program_id(1).to(tl.int64) * numbers + number, mask=m_held, other=0).to(tl.int64)
    slot = place * PAGE + (past + o_token) % PAGE
    column = (start + o_token).to(tl.int64)
    # [BLOCK_T, BLOCK_D]
    b_key = load_block(p_key, b.to(tl.int64) * key_b + g * key_g + column * key_t, m_held, DIM, BLOCK_D)
    store_block(p_key_pages, slot * DIM, b_key, m_held, DIM, BLOCK_D)
    b_value = load_block(p_value, b.to(tl.int64) * value_b + g * value_g + column * value_t, m_held, VALUE_DIM, BLOCK_D)
    store_block(p_value_pages, slot * VALUE_DIM, b_value, m_held, VALUE_DIM, BLOCK_D)


def store(
    key: torch.Tensor, value: torch.Tensor, pages: Pages, rows: Rows, spans: Sequence[Span], slack: int = 0
) -> None:
    """As `reference.store`."""
    _launch(key.detach(), value.detach(), pages, rows.tensor(key.device), spans, slack, one=False)


def store_one(
    key: torch.Tensor, value: torch.Tensor, pages: Pages, lengths: torch.Tensor, spans: Sequence[Span]
) -> None:
    """As `reference.store_one`; nothing is written past the end of the table."""
    _launch(key.detach()[:, :, None], value.detach()[:, :, None], pages, lengths, spans, 0, one=True)


def _launch(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: Pages,
    rows: torch.Tensor,
    spans: Sequence[Span],
    slack: int,
    one: bool,
) -> None:
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    batch, groups, count, dim = key.shape
    block = 1 if one else PAGE
    _store[(triton.cdiv(count, block), batch * groups)](
        key,
        value,
        pages.keys,
        pages.values,
        pages.table,
        rows,
        span_rules(tuple(spans), key.device),
        pages.table.shape[-1],
        slack,
        key.stride(0),
        key.stride(1),
        key.stride(2),
        value.stride(0),
        value.stride(1),
        value.stride(2),
        GROUPS=groups,
        DIM=dim,
        VALUE_DIM=value.shape[-1],
        BLOCK_T=block,
        BLOCK_D=triton.next_power_of_2(max(dim, value.shape[-1])),
        PAGE=PAGE,
        ONE=one,
        num_warps=1 if one else 4,
    )
