"""Attention of a planned layer in plain PyTorch: the specification that every faster implementation is held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from .span import PAGE, Span, visible

# Query rows a block. A window head computes at most this many keys more than it sees; a GPU wants larger blocks.
ROWS = {"cpu": 256, "cuda": 1024}

History = Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: Sequence[Span],
    *,
    past: int = 0,
    history: History | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention of T new tokens over what is cached and themselves, differentiable.

    Args:
        query: `[B, H, T, D]` after RoPE; query head h belongs to group h // (H / G).
        key, value: `[B, G, T, D]`, the new tokens alone.
        spans: one per head group.
        past: position of the first new token.
        history: per group, cached keys and values `[B, M, D]` and their positions `[M]`, ascending.
        scale: factor on the scores, 1 / sqrt(D) when None.

    Returns:
        `[B, H, T, D]` in query's dtype.
    """
    count, groups = query.shape[2], key.shape[1]
    share = query.shape[1] // groups
    last = past + count - 1
    out = torch.empty_like(query[..., : value.shape[-1]])
    # Groups that see the same keys of these queries are computed together.
    together: dict[Span, list[int]] = {}
    for group, span in enumerate(spans):
        together.setdefault(Span() if span.first(last) <= span.sink else span, []).append(group)
    for span, members in together.items():
        heads = [head for group in members for head in range(group * share, (group + 1) * share)]
        q = query[:, heads]
        if past == 0 and span.is_full:
            out[:, heads] = scaled_dot_product_attention(
                q, key[:, members], value[:, members], is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=True
            )
            continue
        height = ROWS.get(query.device.type, ROWS["cuda"])
        for start in range(0, count, height):
            rows = torch.arange(past + start, past + min(start + height, count), device=query.device)
            k, v, positions = _keys_in_sight(key, value, members, span, past, start, len(rows), history)
            out[:, heads, start : start + len(rows)] = scaled_dot_product_attention(
                q[:, :, start : start + len(rows)],
                k,
                v,
                attn_mask=span.visible(rows[:, None], positions[None, :]),
                scale=scale,
                dropout_p=dropout,
                enable_gqa=True,
            )
    return out


def _keys_in_sight(
    key: torch.Tensor,
    value: torch.Tensor,
    members: list[int],
    span: Span,
    past: int,
    start: int,
    rows: int,
    history: History | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values `[B, len(members), M, D]` that the block's queries can see at all, and their positions `[M]`."""
    first, stop = span.first(past + start), past + start + rows
    new = torch.arange(past, stop, device=key.device)
    keep = (new < span.sink) | (new >= first)
    k, v, positions = key[:, members, : len(new)][:, :, keep], value[:, members, : len(new)][:, :, keep], new[keep]
    if past == 0 or history is None:
        return k, v, positions
    # Members share one span, hence the same cached positions.
    cached = history[members[0]][2]
    keep = (cached < span.sink) | (cached >= first)
    old_k = torch.stack([history[group][0][:, keep] for group in members], dim=1)
    old_v = torch.stack([history[group][1][:, keep] for group in members], dim=1)
    return torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2), torch.cat([cached[keep], positions])


def decode(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    places: torch.Tensor,
    numbers: torch.Tensor,
    lengths: torch.Tensor,
    spans: Sequence[Span],
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of one token per sequence over the pages, the token's own key included.

    Args:
        query: `[B, H, D]`.
        key_pages, value_pages: the pool, `[pages, 64, D]`.
        places, numbers: `[B, G, P]` pool place and page number (position // 64), -1 where unused.
        lengths: `[B]` tokens of each sequence, this one included; its position is length - 1.
        spans: one per head group.

    Returns:
        `[B, H, D]` in query's dtype.
    """
    batch, heads, _ = query.shape
    groups = len(spans)
    positions = (numbers[..., None] * PAGE + torch.arange(PAGE, device=query.device)).flatten(2)  # [B, G, P*64]
    rules = [(span.sink, span.alpha, span.beta_units) for span in spans]
    sink, alpha, beta_units = torch.tensor(rules, device=query.device).T[:, :, None]  # each [G, 1]
    # Unused places have negative positions, which a sink would let through.
    seen = visible(lengths[:, None, None] - 1, positions, sink, alpha, beta_units) & (positions >= 0)
    # Slots that hold no visible token may hold anything, NaN included, and 0 * NaN is NaN.
    hidden = ~seen[..., None]
    key = key_pages[places.clamp(min=0)].flatten(2, 3).masked_fill(hidden, 0)  # [B, G, P*64, D]
    value = value_pages[places.clamp(min=0)].flatten(2, 3).masked_fill(hidden, 0)
    q = query.view(batch, groups, heads // groups, -1)  # the heads of a group are the rows of its tile
    out = scaled_dot_product_attention(q, key, value, attn_mask=seen[:, :, None], scale=scale)
    return out.reshape(batch, heads, -1)
