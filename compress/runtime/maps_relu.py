"""The feature map of T2R (arXiv 2103.13076): a learned projection with a bias, cut at zero."""

from __future__ import annotations

from typing import ClassVar

import torch

from .maps import FeatureMap, register_map


@register_map("relu")
class Relu(FeatureMap):
    """ReLU(x W + b)."""

    biased: ClassVar[bool] = True

    def activate(
        self, x: torch.Tensor, projected: torch.Tensor, scale: float, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """See `FeatureMap.activate`."""
        return projected.relu()
