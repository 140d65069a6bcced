"""The scorer by norms of keys: tokens with short keys draw the most attention (arXiv 2406.11430)."""

from __future__ import annotations

import torch

from .scorers import Scorer, log_norm, register_scorer


@register_scorer("key_norm")
class KeyNorm(Scorer):
    """-log ||k||, which RoPE does not change; nothing is trained."""

    def forward(
        self, hidden: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """See `Scorer.forward`."""
        return -log_norm(key)

    @classmethod
    def flops(cls, hidden_size: int, head_dim: int) -> int:
        """A product and a sum for every number of the key."""
        return 2 * head_dim
