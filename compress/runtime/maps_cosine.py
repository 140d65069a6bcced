"""The feature map of cosFormer (arXiv 2202.08791): ReLU, reweighted by the cosine of the distance."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from .maps import FeatureMap, register_map


@register_map("cosine")
class Cosine(FeatureMap):
    """[ReLU(x W) cos(a t), ReLU(x W) sin(a t)] at position t, a = pi / (2 reach).

    The product of a query's and a key's features is that of their ReLUs times cos(a (t - j)). It is negative from a
    distance of `reach` tokens on, which therefore has to be as long as any input.
    """

    positional: ClassVar[bool] = True

    @classmethod
    def usual(cls, head_dim: int) -> int:
        """Twice the head size, as published."""
        return 2 * head_dim

    @classmethod
    def width(cls, features: int) -> int:
        """Half of the features."""
        if features % 2:
            raise ValueError(f"expected an even number of features, got {features}")
        return features // 2

    def activate(
        self, x: torch.Tensor, projected: torch.Tensor, scale: float, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """See `FeatureMap.activate`."""
        assert positions is not None
        angles = (positions.to(projected.dtype) * (math.pi / (2 * self.reach)))[..., None]
        kept = projected.relu()
        return torch.cat([kept * angles.cos(), kept * angles.sin()], dim=-1)
