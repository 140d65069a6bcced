"""Hedgehog's feature maps (arXiv 2402.04347): spiky and monotone, as a softmax's weights are."""

from __future__ import annotations

import torch

from .maps import PairedMap, register_map


@register_map("hedgehog")
class Hedgehog(PairedMap):
    """[softmax(x W), softmax(-x W)] over the projected numbers: every key's features add up to 2.

    As published, it has twice the head size of them; LoLCATs has half of that.
    """

    def activate(
        self, x: torch.Tensor, projected: torch.Tensor, scale: float, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """See `FeatureMap.activate`."""
        return torch.cat([projected.softmax(-1), (-projected).softmax(-1)], dim=-1)


@register_map("hedgehog_exp")
class HedgehogExp(PairedMap):
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
