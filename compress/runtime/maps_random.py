"""The feature map of Performers (arXiv 2009.14794): positive orthogonal random features."""

from __future__ import annotations

import torch

from .maps import FeatureMap, orthogonal, register_map


@register_map("random")
class RandomFeatures(FeatureMap):
    """exp(y W - |y|^2 / 2) / sqrt F, with y = x times the square root of a softmax's scale.

    W has normally distributed columns, orthogonal to each other in blocks of D, from a fixed seed; the product of a
    query's and a key's features is then an unbiased estimate of exp(score). Being a parameter, W may be trained.
    """

    def start(self, head_dim: int, width: int) -> torch.Tensor:
        """Orthogonal columns with the lengths of normally distributed ones."""
        generator = torch.Generator().manual_seed(0)
        directions = orthogonal(head_dim, width, generator)
        normal = torch.randn(head_dim, width, generator=generator, dtype=torch.float32, device="cpu")
        return directions * normal.norm(dim=0)

    def activate(
        self, x: torch.Tensor, projected: torch.Tensor, scale: float, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """See `FeatureMap.activate`."""
        exponents = projected * scale**0.5 - x.square().sum(-1, keepdim=True) * (scale / 2)
        return exponents.exp() * self.features**-0.5
