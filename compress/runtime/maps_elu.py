"""The feature map 1 + ELU of the first linear attention (arXiv 2006.16236)."""

from __future__ import annotations

import torch
from torch.nn import functional

from .maps import FeatureMap, register_map


@register_map("elu")
class Elu(FeatureMap):
    """1 + ELU(x W)."""

    def activate(
        self, x: torch.Tensor, projected: torch.Tensor, scale: float, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """See `FeatureMap.activate`."""
        return 1 + functional.elu(projected)
