"""The gate of Fast KVzip (arXiv 2601.17668): a token's share against learned base keys, by queries of its own."""

from __future__ import annotations

import math

import torch
from torch import nn

from .scorers import Scorer, register_scorer

RANK = 16  # of queries and keys
BASES = 16  # keys that a token's own key stands against
QUERIES = 4  # of a token, over which the share is the mean; the paper has one for every query head of the group
EPS = 1e-6  # of the norms


@register_scorer("gate")
class Gate(Scorer):
    """Logarithm of the softmax share that a token's own low-rank key has beside 16 learned ones.

    Queries and keys are projections of the layer's input, with a root-mean-square norm each. The share is between 0 and
    1; its logarithm and an offset stand for the logarithm of a score that may be larger.

    Attributes:
        query: `[G, 4, 16, hidden size]`, query_bias: `[G, 4, 16]`, key: `[G, 16, hidden size]`.
        query_norm, key_norm: `[G, 16]`, factors behind the norms.
        bases: `[G, 16, 16]`, the learned keys.
        bias: `[G, 4]`, of a token's own key; offset: `[G]`.
    """

    needs_hidden = True
    stepped = True

    def __init__(self, groups: int, hidden_size: int, head_dim: int) -> None:
        super().__init__(groups, hidden_size, head_dim)
        self.query = nn.Parameter(torch.empty(groups, QUERIES, RANK, hidden_size))
        self.query_bias = nn.Parameter(torch.empty(groups, QUERIES, RANK))
        self.key = nn.Parameter(torch.empty(groups, RANK, hidden_size))
        self.query_norm = nn.Parameter(torch.empty(groups, RANK))
        self.key_norm = nn.Parameter(torch.empty(groups, RANK))
        self.bases = nn.Parameter(torch.empty(groups, BASES, RANK))
        self.bias = nn.Parameter(torch.empty(groups, QUERIES))
        self.offset = nn.Parameter(torch.empty(groups))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The same random projections everywhere; base keys, biases and the offset at zero."""
        generator = torch.Generator().manual_seed(0)
        for projection in (self.query, self.key):
            start = torch.randn(projection.shape, generator=generator, device="cpu")
            projection.copy_(start * projection.shape[-1] ** -0.5)
        for factor in (self.query_norm, self.key_norm):
            factor.fill_(1)
        for zero in (self.query_bias, self.bases, self.bias, self.offset):
            zero.zero_()

    def forward(
        self, hidden: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """See `Scorer.forward`."""
        assert hidden is not None
        x = hidden.float()
        query = nn.functional.linear(x, self.query.float().flatten(0, 2), self.query_bias.float().flatten())
        query = _normed(query.unflatten(-1, self.query_bias.shape), self.query_norm[:, None])  # [B, T, G, 4, 16]
        own = nn.functional.linear(x, self.key.float().flatten(0, 1)).unflatten(-1, self.key_norm.shape)
        own = _normed(own, self.key_norm)  # [B, T, G, 16]
        scale = RANK**-0.5
        score = (query * own[..., None, :]).sum(-1) * scale + self.bias.float()
        others = torch.einsum("btgqr,gsr->btgqs", query, self.bases.float()) * scale
        share = nn.functional.logsigmoid(score - others.logsumexp(-1))  # its logarithm
        found = share.logsumexp(-1) - math.log(QUERIES) + self.offset.float()
        return found.transpose(1, 2)

    @classmethod
    def parameter_count(cls, hidden_size: int, head_dim: int) -> int:
        """See `Scorer.parameter_count`."""
        return RANK * hidden_size * (QUERIES + 1) + RANK * (QUERIES + 2 + BASES) + QUERIES + 1

    @classmethod
    def flops(cls, hidden_size: int, head_dim: int) -> int:
        """Both projections, and the products with the token's own and the learned keys."""
        return 2 * RANK * (hidden_size * (QUERIES + 1) + QUERIES * (BASES + 1))


def _normed(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Divided by the root of the mean square over the last axis, and times a factor."""
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * factor.float()
