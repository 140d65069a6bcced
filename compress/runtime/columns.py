"""Which columns of a pass are tokens, and where they stand: what the masks and positions that a caller gives say."""

from __future__ import annotations

import torch

from .paged_cache import PagedCache


def valid_columns(
    mask: torch.Tensor | None, cache: PagedCache | None, tokens: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Which new columns are tokens, `[B, T]`, None when all are; and of all columns so far, None for no change.

    Args:
        mask: `[B, cached and new columns]`, 0 where a column is no token; None where all new ones are.
        tokens: `[B, T]` ids, or `[B, T, hidden]`.

    Raises:
        ValueError: the mask has another shape, or says of cached columns what it did not say when they were cached;
            there is none, and they hold padding.
    """
    batch, count = tokens.shape[:2]
    past = 0 if cache is None else cache.get_seq_length()
    seen = None if cache is None else cache.seen
    if mask is None:
        if seen is not None and not bool(seen.all()):
            raise ValueError("attention_mask: the cached columns hold padding, so a mask over all columns is needed")
        return None, None if seen is None else seen.new_ones(batch, past + count)
    if not isinstance(mask, torch.Tensor) or mask.shape != (batch, past + count):
        given = f"{tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"attention_mask: expected one value for each cached and new column, {(batch, past + count)}, got {given}"
            + ("" if past else ". No tokens are cached: pass the cache of the passes before, if there were any")
        )
    mask = mask.bool()
    if cache is not None and cache.max_length is not None and count == 1 and past > 0:
        # A step that the host need not follow: what the mask says of the past is not compared, since that would
        # wait for the device.
        return mask[:, -1:], mask
    before = mask.new_ones(batch, past) if seen is None else seen
    if not torch.equal(mask[:, :past], before):
        raise ValueError("attention_mask: the cached columns were masked differently when they were cached")
    if bool(mask.all()):
        return None, None if seen is None else mask
    valid = mask[:, past:]
    return None if bool(valid.all()) else valid, mask


def refuse_packed(positions: torch.Tensor, valid: torch.Tensor | None) -> None:
    """Raise ValueError where the tokens of a row are not at positions that follow each other.

    Args:
        positions: `[B or 1, T]`.
        valid: `[B, T]`, which columns are tokens; None when all are.
    """
    if positions.shape[-1] < 2:
        return
    broken = positions.diff(dim=-1) != 1
    if valid is not None:
        # The token before, behind padding that lies between.
        columns = torch.arange(valid.shape[1], device=valid.device)
        before = torch.where(valid, columns, -1).cummax(dim=1).values[:, :-1]
        positions = positions.expand(valid.shape[0], -1)
        steps = positions[:, 1:] - positions.gather(1, before.clamp(min=0))
        broken = (steps != 1) & valid[:, 1:] & (before >= 0)
    if bool(broken.any()):
        raise ValueError(
            "position_ids: expected positions that follow each other in every row; packed sequences are not "
            "supported; pass one sequence per row, with padding and an attention_mask"
        )


def positions_of(cache: PagedCache | None, valid: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
    """Position of each new column among its sequence's tokens, `[B, T]` or `[1, T]`; 0 for leading padding."""
    new = torch.arange(tokens.shape[1], device=tokens.device)[None] if valid is None else valid.long().cumsum(1) - 1
    if cache is None or cache.lengths is None:
        return new.clamp(min=0)
    return (cache.lengths[:, None] + new).clamp(min=0)
