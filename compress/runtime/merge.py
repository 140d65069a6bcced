"""Joining parts of one softmax that were computed apart: split pages, a window and a state, shards of a sequence.

A part is a mean of values under weights and the logarithm of the weights' sum, which is -inf for a part that is empty.
To join two is associative and commutative, and is the operator of online softmax and of attention as a prefix scan
(Aaren, arXiv 2405.13956): (m, u, w) with maximum m, total u and weighted sum w is the part (w / u, m + log u).
"""

from __future__ import annotations

import torch


def log_mass(total: torch.Tensor) -> torch.Tensor:
    """The logarithm of sums of weights, -inf and without a gradient where they are 0 (or less, by rounding)."""
    empty = total <= 0
    return total.masked_fill(empty, 1).log().masked_fill(empty, float("-inf"))


def join(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The part that two parts make together.

    Args:
        out, other: means `[..., DV]`; of an empty part any finite numbers.
        lse, other_lse: logarithms of the sums of weights, broadcast to `[...]`.

    Returns:
        Mean `[..., DV]` and logarithm `[...]`, computed in float32 at least. Where one part is empty they are those of
        the other one exactly, where both are the mean is 0. All gradients are finite.
    """
    dtype = torch.promote_types(torch.promote_types(out.dtype, lse.dtype), torch.float32)
    lse, other_lse = torch.broadcast_tensors(lse.to(dtype), other_lse.to(dtype))
    neither = (lse == float("-inf")) & (other_lse == float("-inf"))
    gap = (lse - other_lse).masked_fill(neither, 0)  # infinite where one is empty: weights 1 and 0, with slope 0
    share, rest = torch.sigmoid(gap)[..., None], torch.sigmoid(-gap)[..., None]
    mean = (share * out.to(dtype) + rest * other.to(dtype)).masked_fill(neither[..., None], 0)
    return mean, torch.maximum(lse, other_lse) + torch.log1p(torch.exp(-gap.abs()))


def merge(
    out: torch.Tensor,
    lse: torch.Tensor,
    num: torch.Tensor,
    log_den: torch.Tensor,
    log_gain: torch.Tensor | float,
) -> torch.Tensor:
    """A softmax over the keys in sight and a state that sums over the others, under one normaliser:

        a = sigmoid(lse - log_den - log_gain),     y = a * out + (1 - a) * num / exp(log_den).

    Args:
        out: what the softmax gives by itself, `[..., DV]`.
        lse: the log-sum-exp of its scores, `[...]`; -inf where it sees nothing.
        num: the state's sum of weighted values, `[..., DV]`.
        log_den: the logarithm of its sum of weights (`log_mass`), `[...]`; -inf where the state is empty.
        log_gain: the logarithm of a factor on the state's weights, broadcasts to `[...]`.

    Returns:
        `[..., DV]` in the dtype of `out`: `out` itself, to the bit, where the state is empty, and the state's own mean
        where the softmax sees nothing. Gradients are finite everywhere.
    """
    empty = log_den == float("-inf")
    mean = (num * torch.exp(-log_den.masked_fill(empty, 0))[..., None]).masked_fill(empty[..., None], 0)
    return join(out, lse, mean, log_den + log_gain)[0].to(out.dtype)
