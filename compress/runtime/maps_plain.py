"""Feature maps whose products may be negative, for states without a normaliser."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn import functional

from .maps import FeatureMap, register_map


@register_map("unit")
class UnitLength(FeatureMap):
    """x W divided by its length, as the delta rule needs it (arXiv 2412.06464)."""

    positive: ClassVar[bool] = False

    def activate(
        self, x: torch.Tensor, projected: torch.Tensor, scale: float, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """See `FeatureMap.activate`."""
        return functional.normalize(projected, dim=-1, eps=1e-6)


@register_map("silu")
class Silu(FeatureMap):
    """SiLU(x W), as TransNormerLLM and Lightning Attention have it (arXiv 2307.14995)."""

    positive: ClassVar[bool] = False

    def activate(
        self, x: torch.Tensor, projected: torch.Tensor, scale: float, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """See `FeatureMap.activate`."""
        return functional.silu(projected)


@register_map("none")
class Plain(FeatureMap):
    """x W."""

    positive: ClassVar[bool] = False

    def activate(
        self, x: torch.Tensor, projected: torch.Tensor, scale: float, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """See `FeatureMap.activate`."""
        return projected
