"""Draws the next token of many documents at once: by one random number each, in few passes over the vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import pad

WIDTH = 128  # words of a block
BELOW_ONE = 1 - 2**-24  # times it, a float32 number is the next smaller one


class Drawn(NamedTuple):
    """The most likely token and the drawn one of every row, `[B]` each; whether all logits are finite, `[]` bool."""

    likely: torch.Tensor
    token: torch.Tensor
    finite: torch.Tensor


def draw(
    logits: torch.Tensor,
    banned: torch.Tensor,
    noise: torch.Tensor,
    temperature: float = 1.0,
    min_p: float = 0.0,
    early: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Drawn:
    """Tokens from the distribution of logits `[B, V]`, by the inverse of its distribution function.

    The token is the first at which the sum of probabilities, in the order of the vocabulary, exceeds the random number
    times the whole sum. Sums of blocks of the vocabulary say in which block that is, and only the words of that one are
    added up one by one; nothing but the probabilities themselves is as large as the logits. A token without probability
    is never drawn. Waits for no device, so a CUDA graph can hold it.

    Args:
        logits: of any floating dtype; overwritten where tokens are banned.
        banned: `[n]` int64, tokens that are not drawn and not the most likely one.
        noise: `[B, 1]` float32 in [0, 1).
        min_p: tokens are not drawn whose probability is below this share of the most likely one's (arXiv 2407.01082).
        early: `[B]` bool, rows in which further tokens `[m]` int64 are banned.
    """
    # A sum is not finite where a summand is not; asking every number takes several passes.
    finite = torch.isfinite(logits.sum(-1, dtype=torch.float32)).all()
    logits.index_fill_(1, banned, -torch.inf)
    if early is not None:
        rows, words = early
        logits.index_copy_(1, words, logits.index_select(1, words).masked_fill(rows[:, None], -torch.inf))
    likely = logits.argmax(-1)
    if temperature != 1:
        logits = logits.float() / temperature
    mass = torch.softmax(logits, -1, dtype=torch.float32)
    if min_p > 0:
        mass.masked_fill_(mass < min_p * mass.gather(1, likely[:, None]), 0.0)
    if mass.shape[1] % WIDTH:
        mass = pad(mass, (0, -mass.shape[1] % WIDTH))
    blocks = mass.view(len(mass), -1, WIDTH)
    # [B, blocks], [B, 1], [B, 1]
    ends = blocks.sum(-1).cumsum(-1)
    level = torch.minimum(noise * ends[:, -1:], ends[:, -1:] * BELOW_ONE)
    block = torch.searchsorted(ends, level, right=True)
    before = ends.gather(1, (block - 1).clamp(min=0)).masked_fill(block == 0, 0.0)
    # [B, WIDTH], [B, 1]
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, WIDTH))[:, 0].cumsum(-1)
    # Both sums round in their own way, so what is left of the level may lie just outside of the block.
    rest = torch.minimum((level - before).clamp(min=0), inside[:, -1:] * BELOW_ONE)
    token = block * WIDTH + torch.searchsorted(inside, rest, right=True)
    return Drawn(likely, token[:, 0], finite)
