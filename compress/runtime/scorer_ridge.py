"""The linear scorer, as KVzap's (arXiv 2601.07891): one number a head group from the layer's input, fitted exactly."""

from __future__ import annotations

import torch
from torch import nn

from .scorers import Scorer, log_norm, register_scorer

SCALARS = 3  # log(position + 1), log ||k|| and log ||v||


@register_scorer("ridge")
class Ridge(Scorer):
    """A linear function of the layer's input and of three scalars: log(position + 1), log ||k|| and log ||v||.

    The largest weight of a softmax shrinks as its denominator grows, so the position takes part; the norms are what no
    linear function of the input gives, and the size of a value is a factor of the score that is stood in for.

    Attributes:
        weight: `[G, hidden size]`, scalars: `[G, 3]`, bias: `[G]`; they start at zero, which judges all alike.
    """

    needs_hidden = True
    fitted = True

    def __init__(self, groups: int, hidden_size: int, head_dim: int) -> None:
        super().__init__(groups, hidden_size, head_dim)
        self.weight = nn.Parameter(torch.empty(groups, hidden_size))
        self.scalars = nn.Parameter(torch.empty(groups, SCALARS))
        self.bias = nn.Parameter(torch.empty(groups))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Zeros."""
        for parameter in (self.weight, self.scalars, self.bias):
            parameter.zero_()

    @torch.no_grad()
    def take_linear(self, weight: torch.Tensor, scalars: torch.Tensor, bias: torch.Tensor) -> None:
        """See `Scorer.take_linear`."""
        self.weight.copy_(weight)
        self.scalars.copy_(scalars)
        self.bias.copy_(bias)

    def forward(
        self, hidden: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """See `Scorer.forward`."""
        assert hidden is not None
        found = nn.functional.linear(hidden.float(), self.weight.float()).transpose(1, 2)
        beside = scalars_of(key, value, positions) @ self.scalars.float()[:, :, None]
        return found + beside.squeeze(-1) + self.bias.float()[:, None]

    @classmethod
    def parameter_count(cls, hidden_size: int, head_dim: int) -> int:
        """See `Scorer.parameter_count`."""
        return hidden_size + SCALARS + 1

    @classmethod
    def flops(cls, hidden_size: int, head_dim: int) -> int:
        """A product and a sum for every number of the input, and of the key and the value for their norms."""
        return 2 * (hidden_size + SCALARS) + 4 * head_dim


def scalars_of(key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The three scalars, `[B, G, T, 3]` in float32, of keys and values `[B, G, T, D]` at positions `[B, T]`."""
    place = (positions.float() + 1).log()[:, None].expand(key.shape[:3])
    return torch.stack([place, log_norm(key), log_norm(value)], dim=-1)
