"""The feature map of cosFormer (arXiv 2202.08791): ReLU, reweighted by the cosine of the distance."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from .maps import PairedMap, register_map


@register_map("cosine")
class Cosine(PairedMap):
    """[ReLU(x W) cos(a t), ReLU(x W) sin(a t)] at position t, a = pi / (2 reach).

    The product of a query's and a key's features is that of their ReLUs times cos(a (t - j)). It is negative from a
    distance of `reach` tokens on, which therefore has to be as long as any input.
    """

    positional: ClassVar[bool] = True

    def activate(
        self, x: torch.Tensor, projected: torch.Tensor, scale: float, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """See `FeatureMap.activate`."""
        assert positions is not None
        angles = (positions.to(projected.dtype) * (math.pi / (2 * self.reach)))[..., None]
        kept = projected.relu()
        return torch.cat([kept * angles.cos(), kept * angles.sin()], dim=-1)
