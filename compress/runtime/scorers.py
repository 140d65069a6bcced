"""Scorers of cached tokens, which say what a `retain` head keeps: the base of all, and their registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, TypeVar

import torch
from torch import nn


class Scorer(nn.Module):
    """Gives every token a number for every head group, from that token alone: the higher, the more worth keeping.

    A token is judged once, when it is written, and what comes later changes nothing. A subclass has
    `@register_scorer("name")`; its parameters, if any, have the groups as their first axis.

    Args:
        groups: head groups; hidden_size: size of the layer's input; head_dim: size of a key.

    Attributes:
        needs_hidden: whether it reads the layer's input; else `hidden` may be None.
        fitted: whether it has a linear part that takes an exact fit (`Ridge.take_linear`).
        stepped: whether it has more than that to train, step by step. One that is neither has nothing to train.
    """

    needs_hidden: ClassVar[bool] = False
    fitted: ClassVar[bool] = False
    stepped: ClassVar[bool] = False

    def __init__(self, groups: int, hidden_size: int, head_dim: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(
        self, hidden: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Scores `[B, G, T]` in float32.

        Args:
            hidden: `[B, T, hidden size]`, what the layer's attention is given.
            key: `[B, G, T, D]` as they are cached, after RoPE.
            value: `[B, G, T, DV]`.
            positions: `[B, T]` of the tokens in their sequences, from 0.
        """
        raise NotImplementedError

    def take_linear(self, weight: torch.Tensor, scalars: torch.Tensor, bias: torch.Tensor) -> None:
        """Take an exact fit of the linear part, where it is `fitted`.

        Args:
            weight: `[G, hidden size]`; scalars: `[G, 3]`, of the logarithms of position + 1, of ||k|| and of ||v||;
            bias: `[G]`.
        """
        raise NotImplementedError

    @classmethod
    def parameter_count(cls, hidden_size: int, head_dim: int) -> int:
        """Parameters of one head group."""
        return 0

    @classmethod
    def flops(cls, hidden_size: int, head_dim: int) -> int:
        """Floating-point operations for one token of one head group."""
        raise NotImplementedError


def log_norm(x: torch.Tensor) -> torch.Tensor:
    """Logarithm of the Euclidean norm over the last axis, in float32; that of the smallest number where it is 0."""
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
    return norm.float().clamp(min=torch.finfo(torch.float32).tiny).log()


SCORERS: dict[str, type[Scorer]] = {}
AnyScorer = TypeVar("AnyScorer", bound=type[Scorer])


def register_scorer(name: str) -> Callable[[AnyScorer], AnyScorer]:
    """Class decorator: plans know the scorer by this name."""

    def add(scorer: AnyScorer) -> AnyScorer:
        SCORERS[name] = scorer
        return scorer

    return add
