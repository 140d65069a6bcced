"""A token of each sequence taken in by `retain` heads in one launch: judged, counted, room made for it, and stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels need Triton; without it attention runs in plain PyTorch") from error

from .retain_state import ListedPages
from .scorers import Scorer
from .span import PAGE, Span
from .triton_scorers import cap_at, linear_of, log_norm
from .triton_span import first_key, load_block, load_rule, span_rules, store_block
from .tuned import launches_overlap
from .tuned_retain import judge_config


@triton.jit
def _middle(
    p_hidden,  # [B, C]
    p_into,  # [G * WIDTH, C]
    p_into_bias,  # [G * WIDTH]
    p_last,  # [G * WIDTH]
    p_parts,  # [B, G * WIDTH / UNITS] float32
    hidden_b,
    SIZE: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """What UNITS hidden units of an MLP add to the score of a token."""
    if OVERLAP:  # `_take` may begin, and waits for the parts
        tl.extra.cuda.gdc_launch_dependents()
    b = tl.program_id(1)
    o_unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    # [UNITS, BLOCK_C]
    total = tl.zeros([UNITS, BLOCK_C], tl.float32)
    for base in range(0, SIZE, BLOCK_C):
        o_size = base + tl.arange(0, BLOCK_C)
        m_size = o_size < SIZE
        b_hidden = tl.load(p_hidden + b.to(tl.int64) * hidden_b + o_size, mask=m_size, other=0.0).to(tl.float32)
        b_into = tl.load(p_into + o_unit[:, None] * SIZE + o_size[None, :], mask=m_size[None, :], other=0.0)
        total += b_into.to(tl.float32) * b_hidden[None, :]
    # [UNITS]
    middle = tl.sum(total, 1) + tl.load(p_into_bias + o_unit).to(tl.float32)
    middle = 0.5 * middle * (1.0 + tl.erf(middle * 0.7071067811865476))
    found = tl.sum(middle * tl.load(p_last + o_unit).to(tl.float32), 0)
    tl.store(p_parts + b * tl.num_programs(0) + tl.program_id(0), found)


@triton.jit(do_not_specialize=["offset"])
def _take(
    p_key,  # [B, G, D]
    p_value,  # [B, G, DV]
    p_hidden,  # [B, C], where HIDDEN
    p_weight,  # [G, C], where HIDDEN
    p_scalars,  # [G, 3], where LINEAR: of log(position + 1), log ||k|| and log ||v||
    p_bias,  # [G], where LINEAR
    p_parts,  # [B, G, PARTS] float32: what is added to the score, where PARTS; all of it without LINEAR
    p_thresholds,  # [G] float32
    p_sinks,  # [G] int64
    p_caps,  # [G, 2] int64
    p_rules,  # [G, 4] int32
    p_lengths,  # [B] int32, the token included; 0 where there is none
    p_count,  # [B, G] int32 tokens behind the sink that are kept
    p_listed,  # [B, G] int32 tokens in the lists
    p_key_pages,  # [places, PAGE, D]
    p_value_pages,  # [places, PAGE, DV]
    p_flags,  # [places, PAGE] uint8
    p_table,  # [B, G, numbers] int32, the lists' `offset` pages first
    numbers,
    offset,
    key_b,
    key_g,
    value_b,
    value_g,
    hidden_b,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PAGE: tl.constexpr,
    LINEAR: tl.constexpr,
    HIDDEN: tl.constexpr,
    PARTS: tl.constexpr,
    LEAVES: tl.constexpr,
    OVERLAP: tl.constexpr,
    WAITS: tl.constexpr,
):
    """One (sequence, group). The page that leaves is read before the token is written, which may take its place.

    Where it WAITS, for `_middle`, all but the parts was there before that began. Every program waits, so that whatever
    waits for this launch has waited for both.
    """
    if OVERLAP:  # the launch behind it may take its place, and waits for this one
        tl.extra.cuda.gdc_launch_dependents()
    segment = tl.program_id(0)
    b = segment // GROUPS
    g = segment % GROUPS
    length = tl.load(p_lengths + b)
    at = length - 1
    if (length <= 0) | (offset + at // PAGE >= numbers):  # nothing is written past the end of the table
        if WAITS:
            tl.extra.cuda.gdc_wait()
        return
    one = tl.arange(0, 1)
    o_key = b.to(tl.int64) * key_b + g * key_g
    o_value = b.to(tl.int64) * value_b + g * value_g
    score = 0.0
    if LINEAR:
        if HIDDEN:
            total = tl.zeros([BLOCK_C], tl.float32)
            for base in range(0, SIZE, BLOCK_C):
                # [BLOCK_C]
                o_size = base + tl.arange(0, BLOCK_C)
                m_size = o_size < SIZE
                b_hidden = tl.load(p_hidden + b.to(tl.int64) * hidden_b + o_size, mask=m_size, other=0.0)
                b_weight = tl.load(p_weight + g * SIZE + o_size, mask=m_size, other=0.0)
                total += b_hidden.to(tl.float32) * b_weight.to(tl.float32)
            score += tl.sum(total, 0)
        score += tl.load(p_scalars + g * 3).to(tl.float32) * tl.log((at + 1).to(tl.float32))
        by_key = tl.sum(log_norm(p_key + o_key, one, one == 0, DIM, BLOCK_D), 0)
        score += tl.load(p_scalars + g * 3 + 1).to(tl.float32) * by_key
        by_value = tl.sum(log_norm(p_value + o_value, one, one == 0, VALUE_DIM, BLOCK_D), 0)
        score += tl.load(p_scalars + g * 3 + 2).to(tl.float32) * by_value
        score += tl.load(p_bias + g).to(tl.float32)
    count = tl.load(p_count + segment)
    sink = tl.load(p_sinks + g)
    base_cap = tl.minimum(tl.load(p_caps + g * 2), 1 << 30)
    most = cap_at(at, base_cap, tl.load(p_caps + g * 2 + 1))
    threshold = tl.load(p_thresholds + g)
    _sink, alpha, beta, mask = load_rule(p_rules, g)
    p_held = p_table + segment.to(tl.int64) * numbers
    if LEAVES:
        number = first_key(at - 1, alpha, beta, mask) // PAGE
        if first_key(at, alpha, beta, mask) // PAGE > number:
            # [PAGE]
            o_slot = tl.load(p_held + offset + number).to(tl.int64) * PAGE + tl.arange(0, PAGE)
            flags = (tl.load(p_flags + o_slot) != 0).to(tl.int32)
            listed = tl.load(p_listed + segment)
            slot = listed + tl.cumsum(flags, 0) - flags
            place = tl.load(p_held + slot // PAGE, mask=flags != 0, other=0).to(tl.int64)
            o_new = place * PAGE + slot % PAGE
            # [PAGE, BLOCK_D]
            b_key = load_block(p_key_pages, o_slot * DIM, flags != 0, DIM, BLOCK_D)
            b_value = load_block(p_value_pages, o_slot * VALUE_DIM, flags != 0, VALUE_DIM, BLOCK_D)
            store_block(p_key_pages, o_new * DIM, b_key, flags != 0, DIM, BLOCK_D)
            store_block(p_value_pages, o_new * VALUE_DIM, b_value, flags != 0, VALUE_DIM, BLOCK_D)
            tl.store(p_listed + segment, listed + tl.sum(flags, 0))
        tl.debug_barrier()
    o_slot = tl.load(p_held + offset + at // PAGE).to(tl.int64) * PAGE + at % PAGE
    b_key = load_block(p_key + o_key, one, one == 0, DIM, BLOCK_D)
    store_block(p_key_pages + o_slot * DIM, one, b_key, one == 0, DIM, BLOCK_D)
    b_value = load_block(p_value + o_value, one, one == 0, VALUE_DIM, BLOCK_D)
    store_block(p_value_pages + o_slot * VALUE_DIM, one, b_value, one == 0, VALUE_DIM, BLOCK_D)
    if WAITS:
        tl.extra.cuda.gdc_wait()
    if PARTS > 0:
        score += tl.sum(tl.load(p_parts + segment * PARTS + tl.arange(0, PARTS)), 0)
    chosen = (at >= sink) & (score >= threshold) & (count < most)
    tl.store(p_count + segment, count + chosen.to(tl.int32))
    tl.store(p_flags + o_slot, ((at < sink) | chosen).to(tl.uint8))


def take(
    scorer: Scorer,
    hidden: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor,
    count: torch.Tensor,
    rules: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    pages: ListedPages,
    spans: tuple[Span, ...],
    leaves: bool,
    judge: Callable[[], torch.Tensor],
) -> None:
    """Judge one token a sequence, count it where it is kept, and store it; what leaves a window goes to its list.

    One launch, and one more before it where the scorer has hidden units; a CUDA graph can hold both. On GPUs that can,
    a launch begins before the one ahead of it has ended. Scorers that no kernel has are asked before.

    Args:
        scorer: what judges.
        hidden: `[B, 1, hidden size]`; key, value: `[B, G, D]`.
        lengths: `[B]` int32 tokens of each sequence, this one included; 0 where there is none.
        count: `[B, G]` int32, tokens behind the sink that are kept; changed in place, as the pages are.
        rules: thresholds, sinks and caps, as of `retain_reference.keep`.
        pages: with room for the token and for what leaves.
        spans: of the windows, by whole pages and without sinks.
        leaves: whether a page may leave a window; else that was done before.
        judge: gives the scores `[B, G, 1]`, where no kernel has the scorer.
    """
    made = linear_of(scorer, hidden, key)
    weight, scalars, bias, into, into_bias, last = made or (None,) * 6
    batch, groups, dim = key.shape
    value_dim = value.shape[-1]
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    size = 0 if weight is None else weight.shape[-1]
    row = None
    if weight is not None:
        assert hidden is not None
        row = hidden[:, 0] if hidden.stride(-1) == 1 else hidden[:, 0].contiguous()
    config, parts, pieces = judge_config(size, key.device), None, 0
    overlap = launches_overlap(key.device)
    if made is None:
        parts, pieces = judge().contiguous(), 1
    if into is not None:
        assert row is not None and into_bias is not None and last is not None
        pieces = into.shape[1] // config["units"]
        parts = torch.empty(batch, groups * pieces, dtype=torch.float32, device=key.device)
        # fmt: off
        _middle[(groups * pieces, batch)](
            row, into, into_bias, last, parts, row.stride(0),
            SIZE=size, UNITS=config["units"], BLOCK_C=config["columns"], OVERLAP=overlap, num_warps=config["warps"],
        )
        # fmt: on
    options: dict[str, Any] = {"GROUPS": groups, "PAGE": PAGE, "LEAVES": leaves, "PARTS": pieces}
    # fmt: off
    _take[(batch * groups,)](
        key, value, row, weight, scalars, bias, parts, *rules, span_rules(spans, key.device), lengths, count,
        pages.listed, pages.keys, pages.values, pages.kept.view(torch.uint8), pages.table,
        pages.table.shape[-1], pages.offset, *key.stride()[:2], *value.stride()[:2],
        0 if row is None else row.stride(0), SIZE=size, DIM=dim, VALUE_DIM=value_dim,
        BLOCK_D=triton.next_power_of_2(max(dim, value_dim)), BLOCK_C=config["block"], LINEAR=made is not None,
        HIDDEN=weight is not None, num_warps=config["warps"] if weight is not None else 4, OVERLAP=overlap,
        WAITS=overlap and into is not None, **({"launch_pdl": True} if overlap and into is not None else {}), **options,
    )
    # fmt: on
