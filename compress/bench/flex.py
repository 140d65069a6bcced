"""FlexAttention's Triton back end with a plan's spans: what PyTorch offers for the same windows, to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from compress.runtime.flash import BLOCK, blocks_of
from compress.runtime.span import Span


def flex_mask(
    spans: Sequence[Span], group_size: int, length: int, device: torch.device, block: int = BLOCK
) -> BlockMask:
    """Block lists in closed form and the rule itself; no mask over pairs of tokens is made."""
    blocks = blocks_of(spans, length, device, block)
    per_head = lambda tensor: tensor.repeat_interleave(group_size, dim=0)[None]  # noqa: E731
    t = torch.arange(length, device=device)
    first = torch.stack([span.first(t) for span in spans]).to(torch.int32)
    sink = torch.tensor([min(span.sink, length) for span in spans], device=device)

    def rule(batch: Any, head: Any, query: Any, key: Any) -> Any:
        group = head // group_size
        return (key <= query) & ((key < sink[group]) | (key >= first[group, query]))

    return BlockMask.from_kv_blocks(
        per_head(blocks.part_count),
        _padded(per_head(blocks.part), -(-length // block)),
        per_head(blocks.full_count),
        _padded(per_head(blocks.full), -(-length // block)),
        BLOCK_SIZE=block,
        mask_mod=rule,
        seq_lengths=(length, length),
        compute_q_blocks=False,
    )


def _padded(numbers: torch.Tensor, tiles: int) -> torch.Tensor:
    """Lists as wide as there are tiles, which flex_attention expects."""
    return torch.nn.functional.pad(numbers, (0, tiles - numbers.shape[-1])) if numbers.shape[-1] < tiles else numbers


def flex_prefill(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Sequence[Span]
) -> Callable[[], torch.Tensor]:
    """Compiled FlexAttention over `[B, H, T, D]`; the first call compiles."""
    mask = flex_mask(spans, query.shape[1] // key.shape[1], query.shape[2], query.device)
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(query, key, value, block_mask=mask, enable_gqa=True)
