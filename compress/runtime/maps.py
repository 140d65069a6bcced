"""Feature maps of linear attention: the base of all, and their registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, TypeVar

import torch
from torch import nn

from .linear_states import wide


class FeatureMap(nn.Module):
    """What turns queries and keys into features, whose products stand for the weights of a softmax.

    Every query head has a projection of its own, and every head group one for its keys, which all its query heads
    share: the state is one a group. A subclass has `@register_map("name")`, and says how projected numbers become
    features.

    Args:
        groups: head groups; share: query heads of each.
        head_dim: D, size of a query and a key.
        features: F, what the map gives of each; None for `usual(head_dim)`.
        reach: tokens that a map of positions reaches over.

    Attributes:
        query: `[G, R, D, width]`, key: `[G, D, width]`; see `start` for what they are at first.
        positive: whether all products of features are >= 0, so that they may be weights with a sum to divide by.
        positional: whether the features depend on the position.
        biased: whether `query_bias` `[G, R, width]` and `key_bias` `[G, width]` are added to what is projected; they
            start at zero.
    """

    positive: ClassVar[bool] = True
    positional: ClassVar[bool] = False
    biased: ClassVar[bool] = False

    def __init__(self, groups: int, share: int, head_dim: int, features: int | None = None, reach: int = 1) -> None:
        super().__init__()
        self.features = self.usual(head_dim) if features is None else features
        self.reach = reach
        width = self.width(self.features)
        self.query = nn.Parameter(torch.empty(groups, share, head_dim, width))
        self.key = nn.Parameter(torch.empty(groups, head_dim, width))
        self.query_bias = nn.Parameter(torch.empty(groups, share, width)) if self.biased else None
        self.key_bias = nn.Parameter(torch.empty(groups, width)) if self.biased else None
        self.reset_parameters()

    @classmethod
    def usual(cls, head_dim: int) -> int:
        """Features where a plan does not say."""
        return head_dim

    @classmethod
    def width(cls, features: int) -> int:
        """Projected numbers for so many features.

        Raises:
            ValueError: the map cannot have so many.
        """
        return features

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Both projections as `start` has them, and no bias."""
        for weight in (self.query, self.key):
            weight.copy_(self.start(*weight.shape[-2:]))
        for bias in (self.query_bias, self.key_bias):
            if bias is not None:
                bias.zero_()

    def start(self, head_dim: int, width: int) -> torch.Tensor:
        """The first projection, `[D, width]`: the identity, or its first columns, and then `orthogonal` ones.

        Further columns of zeros would have one gradient, if any, and so stay a single feature.
        """
        identity = torch.eye(head_dim, min(width, head_dim), dtype=torch.float32, device="cpu")
        more = orthogonal(head_dim, width - identity.shape[1], torch.Generator().manual_seed(0))
        return torch.cat([identity, more], dim=1)

    def of_query(self, query: torch.Tensor, scale: float, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Features `[B, H, T, F]` of queries `[B, H, T, D]`, in float32 at least.

        Args:
            scale: the factor on a softmax's scores, for maps that stand for the exponential of a score.
            positions: `[B, H, T]` or what broadcasts to it, for maps that ask for them.
        """
        x = wide(query)
        groups, share = self.query.shape[:2]
        projected = x.unflatten(1, (groups, share)) @ self.query.to(x.dtype)
        if self.query_bias is not None:
            projected = projected + self.query_bias[..., None, :].to(x.dtype)
        return self.activate(x, projected.flatten(1, 2), scale, positions)

    def of_key(self, key: torch.Tensor, scale: float, positions: torch.Tensor | None = None) -> torch.Tensor:
        """The same of keys `[B, G, M, D]`."""
        x = wide(key)
        projected = x @ self.key.to(x.dtype)
        if self.key_bias is not None:
            projected = projected + self.key_bias[..., None, :].to(x.dtype)
        return self.activate(x, projected, scale, positions)

    def activate(
        self, x: torch.Tensor, projected: torch.Tensor, scale: float, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """Features from what was given, `[..., D]`, and its projection `[..., width]`."""
        raise NotImplementedError


def orthogonal(head_dim: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """So many columns of length 1 and of random directions, `[D, count]`, orthogonal to each other in blocks of D."""
    blocks = [torch.empty(head_dim, 0, device="cpu")]
    for _ in range(-(-count // head_dim)):
        drawn = torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float32, device="cpu")
        factors = torch.linalg.qr(drawn)
        blocks.append(factors.Q * factors.R.diagonal().sign())  # without which the directions are not even
    return torch.cat(blocks, dim=1)[:, :count]


class PairedMap(FeatureMap):
    """A map that makes two features of every projected number."""

    @classmethod
    def usual(cls, head_dim: int) -> int:
        """As many projected numbers as a key has."""
        return 2 * head_dim

    @classmethod
    def width(cls, features: int) -> int:
        """Half of the features."""
        if features % 2:
            raise ValueError(f"expected an even number of features, got {features}")
        return features // 2


MAPS: dict[str, type[FeatureMap]] = {}
AnyMap = TypeVar("AnyMap", bound=type[FeatureMap])


def register_map(name: str) -> Callable[[AnyMap], AnyMap]:
    """Class decorator: plans know the map by this name."""

    def add(feature_map: AnyMap) -> AnyMap:
        MAPS[name] = feature_map
        return feature_map

    return add
