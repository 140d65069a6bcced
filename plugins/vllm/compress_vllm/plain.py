"""Attention by a span rule on an engine's blocks in plain PyTorch: only what the rule keeps is read. On CPUs it is what
runs, and everywhere the specification of `kernel.py`.

A query of one token is computed with those of all other requests in one call; a prompt, or a chunk of it, piece by
piece. Keys are stored behind RoPE, so that which are read is all that matters and not where they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from compress_vllm.rule import Rule

PIECE = 128  # queries of a prompt that are computed together; all of them read what the first and the last see


@dataclass
class Rows:
    """Queries of one request, or single ones of R requests, and the keys that they read.

    Attributes:
        tokens: places of the queries in the batch, `[R]` for single queries, else a slice.
        blocks, offsets: where the keys lie, `[R, L]` (or `[L]` of a chunk).
        visible: which of them each query sees, `[R, 1, 1, L]` (or `[T, L]`); None where all do.
    """

    tokens: Any
    blocks: torch.Tensor
    offsets: torch.Tensor
    visible: torch.Tensor | None


@dataclass
class Batch:
    """The queries of one step; what attention modules with one rule and one block table share."""

    single: Rows | None
    chunks: list[Rows]


def batch_of(rule: Rule, block: int, starts: Sequence[int], lengths: Sequence[int], table: torch.Tensor) -> Batch:
    """Where the keys lie that the queries of a step see.

    Args:
        block: tokens of a block.
        starts: where the queries of each of the R requests begin, and where the last ones end, `[R + 1]`.
        lengths: tokens of each request, with those of this step.
        table: the request's blocks, `[R, blocks]`.
    """
    counts = [end - start for start, end in pairwise(starts)]
    alone = [row for row, count in enumerate(counts) if count == 1]
    chunks = [
        _chunk(rule, block, starts[row], max(lengths[row] - count, 0), piece, count, table[row])
        for row, count in enumerate(counts)
        if count > 1
        for piece in range(0, count, PIECE)
    ]
    return Batch(_single(rule, block, alone, starts, lengths, table) if alone else None, chunks)


def _single(
    rule: Rule,
    block: int,
    rows: Sequence[int],
    starts: Sequence[int],
    lengths: Sequence[int],
    table: torch.Tensor,
) -> Rows:
    """Single queries of several requests; columns are the keys of the sink, and then those of the window."""
    device = table.device
    last = torch.tensor([lengths[row] - 1 for row in rows], device=device)[:, None]
    first = rule.first(last)
    sinks = first.clamp(max=rule.sink)
    seen = sinks + last + 1 - first
    columns = torch.arange(int(seen.max()), device=device)[None]
    keys = torch.minimum(torch.where(columns < sinks, columns, first - sinks + columns), last)
    visible = None if bool((seen == seen[0]).all()) else (columns < seen)[:, None, None]
    blocks = table[rows].gather(1, keys // block).long()
    tokens = torch.tensor([starts[row] for row in rows], device=device)
    return Rows(tokens, blocks, keys % block, visible)


def _chunk(rule: Rule, block: int, start: int, before: int, piece: int, count: int, table: torch.Tensor) -> Rows:
    """A piece, from query `piece` on, of `count` queries of one request that had `before` tokens before them."""
    device, end = table.device, min(piece + PIECE, count)
    first = rule.first(before + piece)
    keys = torch.cat(
        [torch.arange(min(rule.sink, first), device=device), torch.arange(first, before + end, device=device)]
    )
    queries = torch.arange(before + piece, before + end, device=device)[:, None]
    visible = (keys <= queries) & ((keys < rule.sink) | (keys >= rule.first(queries)))
    tokens = slice(start + piece, start + end)
    return Rows(tokens, table[keys // block].long(), keys % block, visible)


def store(cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """Store keys and values at their slots of a cache; a negative slot stores nothing.

    Args:
        cache: `[blocks, groups, tokens of a block, 2 size]`: a key, and its value behind it.
        key, value: `[tokens, groups, size]`; there may be more than slots.
        slots: `[tokens]`, block times tokens of a block plus the place in it.
    """
    stored = slots >= 0
    places = slots[stored].long()
    new = torch.cat([key, value], dim=-1)[: len(stored)][stored]
    cache.transpose(1, 2)[places // cache.shape[2], places % cache.shape[2]] = new.to(cache.dtype)


def attend(
    query: torch.Tensor,
    cache: torch.Tensor,
    batch: Batch,
    scale: float,
    cap: float | None,
    out: torch.Tensor,
    extra: torch.Tensor | None = None,
) -> None:
    """Fill `out` with softmax attention over the keys that a `Batch` names.

    Args:
        query, out: `[tokens, heads, size]`; heads of a group lie behind each other.
        cache: `[blocks, groups, tokens of a block, 2 size]`.
        scale: of the scores.
        cap: scores are `cap tanh(score / cap)`, where it is given.
        extra: one more logit in the softmax of each head, which stands for no value, `[heads]`.
    """
    groups, size = cache.shape[1], cache.shape[3] // 2
    logits = None if extra is None else extra.view(groups, -1, 1)
    rows = batch.single
    if rows is not None:
        held = cache.transpose(1, 2)[rows.blocks, rows.offsets]  # [R, L, G, 2 D]
        keys, values = held.transpose(1, 2).split(size, dim=-1)
        grouped = query[rows.tokens].unflatten(1, (groups, -1))  # [R, G, heads of a group, D]
        out[rows.tokens] = _softmax(grouped, keys, values, rows.visible, scale, cap, logits).flatten(1, 2).to(out.dtype)
    for rows in batch.chunks:
        held = cache.transpose(1, 2)[rows.blocks, rows.offsets]  # [L, G, 2 D]
        keys, values = held.transpose(0, 1)[:, None].split(size, dim=-1)  # [G, 1, L, D]
        grouped = query[rows.tokens].unflatten(1, (groups, -1)).permute(1, 2, 0, 3)
        each = None if logits is None else logits[..., None]
        found = _softmax(grouped, keys, values, rows.visible, scale, cap, each)  # [G, heads of a group, T, D]
        out[rows.tokens] = found.permute(2, 0, 1, 3).flatten(1, 2).to(out.dtype)


def _softmax(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor | None,
    scale: float,
    cap: float | None,
    extra: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of `[..., T, D]` over `[..., L, D]` where `visible` broadcasts, as `extra` does to `[..., T, 1]`."""
    key, value = key.to(query.dtype), value.to(query.dtype)
    if cap is None and extra is None:
        key, value = (tensor.expand(*query.shape[:-2], *tensor.shape[-2:]) for tensor in (key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale)
    scores = query.float() @ key.float().transpose(-1, -2) * (scale / (cap or 1.0))
    if cap is not None:
        scores = cap * torch.tanh(scores)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    if extra is not None:
        scores = torch.cat([scores, extra.float().expand(*scores.shape[:-1], 1)], dim=-1)
    return (scores.softmax(dim=-1)[..., : key.shape[-2]] @ value.float()).to(query.dtype)
