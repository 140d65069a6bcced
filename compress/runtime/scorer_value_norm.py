"""The scorer by norms of values: what a token adds to the output grows with its value (arXiv 2406.12335)."""

from __future__ import annotations

import torch

from .scorers import Scorer, log_norm, register_scorer


@register_scorer("value_norm")
class ValueNorm(Scorer):
    """log ||v||; nothing is trained."""

    def forward(
        self, hidden: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """See `Scorer.forward`."""
        return log_norm(value)

    @classmethod
    def flops(cls, hidden_size: int, head_dim: int) -> int:
        """A product and a sum for every number of the value."""
        return 2 * head_dim
