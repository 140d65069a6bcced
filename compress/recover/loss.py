"""The two losses of recovery, as sums over tokens, so that parts of a batch add up whatever their sizes."""

from __future__ import annotations

import torch
from torch.nn import functional


def text_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Sum of -ln p over the tokens behind the first of each sequence, nats.

    Args:
        logits: `[B, T, V]`.
        tokens: `[B, T]`.
    """
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum")


def distill_loss(logits: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Sum of KL(teacher || model) over all tokens, nats, both softened by the temperature and scaled by its square.

    The square keeps the size of the gradient (Hinton et al., arXiv 1503.02531).

    Args:
        logits, teacher: `[B, T, V]`.
    """
    own = functional.log_softmax(logits.float() / temperature, -1)
    other = functional.log_softmax(teacher.float() / temperature, -1)
    return temperature**2 * functional.kl_div(own, other, reduction="sum", log_target=True)
