"""The scorer of two layers, as KVzap's (arXiv 2601.07891), beside the linear one that it starts from."""

from __future__ import annotations

import torch
from torch import nn

from .scorer_ridge import Ridge
from .scorers import Scorer, register_scorer

WIDTH = 64  # hidden units of a head group: 512 over the eight groups of a common layer, as published


@register_scorer("mlp")
class Mlp(Scorer):
    """The linear scorer, and what two layers with GELU between them add to it.

    The second layer starts at zero, so that training starts from the linear scorer's exact fit.

    Attributes:
        linear: the linear scorer.
        into: `[G, 64, hidden size]`, into_bias: `[G, 64]`, out: `[G, 64]`.
    """

    needs_hidden = True
    fitted = True
    stepped = True

    def __init__(self, groups: int, hidden_size: int, head_dim: int) -> None:
        super().__init__(groups, hidden_size, head_dim)
        self.linear = Ridge(groups, hidden_size, head_dim)
        self.into = nn.Parameter(torch.empty(groups, WIDTH, hidden_size))
        self.into_bias = nn.Parameter(torch.empty(groups, WIDTH))
        self.out = nn.Parameter(torch.empty(groups, WIDTH))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The same random first layer everywhere, and zeros."""
        self.linear.reset_parameters()
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(self.into.shape, generator=generator, device="cpu") * self.into.shape[-1] ** -0.5
        self.into.copy_(start)
        self.into_bias.zero_()
        self.out.zero_()

    def take_linear(self, weight: torch.Tensor, scalars: torch.Tensor, bias: torch.Tensor) -> None:
        """See `Scorer.take_linear`."""
        self.linear.take_linear(weight, scalars, bias)

    def forward(
        self, hidden: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """See `Scorer.forward`."""
        assert hidden is not None
        middle = nn.functional.linear(hidden.float(), self.into.float().flatten(0, 1), self.into_bias.float().flatten())
        middle = nn.functional.gelu(middle).unflatten(-1, self.out.shape)  # [B, T, G, 64]
        more = (middle * self.out.float()).sum(-1).transpose(1, 2)
        found: torch.Tensor = self.linear(hidden, key, value, positions)
        return found + more

    @classmethod
    def parameter_count(cls, hidden_size: int, head_dim: int) -> int:
        """See `Scorer.parameter_count`."""
        return Ridge.parameter_count(hidden_size, head_dim) + WIDTH * (hidden_size + 2)

    @classmethod
    def flops(cls, hidden_size: int, head_dim: int) -> int:
        """See `Scorer.flops`."""
        return Ridge.flops(hidden_size, head_dim) + 2 * WIDTH * (hidden_size + 1)
