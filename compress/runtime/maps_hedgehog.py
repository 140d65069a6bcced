"""Hedgehog's feature maps (arXiv 2402.04347): spiky and monotone, as a softmax's weights are."""

from __future__ import annotations

import torch

from .maps import FeatureMap, register_map


class _TwoSided(FeatureMap):
    """Features of x W and of -x W, twice the projected numbers."""

    @classmethod
    def usual(cls, head_dim: int) -> int:
        """Twice the head size, as published; LoLCATs has half of it."""
        return 2 * head_dim

    @classmethod
    def width(cls, features: int) -> int:
        """Half of the features."""
        if features % 2:
            raise ValueError(f"expected an even number of features, got {features}")
        return features // 2


@register_map("hedgehog")
class Hedgehog(_TwoSided):
    """[softmax(x W), softmax(-x W)] over the projected numbers: every key's features add up to 2."""

    def activate(
        self, x: torch.Tensor, projected: torch.Tensor, scale: float, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """See `FeatureMap.activate`."""
        return torch.cat([projected.softmax(-1), (-projected).softmax(-1)], dim=-1)


@register_map("hedgehog_exp")
class HedgehogExp(_TwoSided):
    """[exp(x W), exp(-x W)], with the square root of a softmax's scale on both sides.

    The exponents are held within +-`MOST`, so that a product of two features and its sums are finite in float32; no
    trained head is near it.
    """

    MOST = 30.0

    def activate(
        self, x: torch.Tensor, projected: torch.Tensor, scale: float, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """See `FeatureMap.activate`."""
        exponents = (projected * scale**0.5).clamp(-self.MOST, self.MOST)
        return torch.cat([exponents.exp(), (-exponents).exp()], dim=-1)
