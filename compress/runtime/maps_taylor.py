"""The feature map of Based (arXiv 2402.18668): the exponential's Taylor series to second order, of few numbers."""

from __future__ import annotations

import torch

from .maps import FeatureMap, register_map


@register_map("taylor")
class Taylor(FeatureMap):
    """[1, y, vec(y y^T) / sqrt 2] with y = x W times the square root of a softmax's scale.

    The product of a query's and a key's features is 1 + s + s^2 / 2, where s is the score of their projections.
    """

    @classmethod
    def usual(cls, head_dim: int) -> int:
        """Those of 16 projected numbers, 273, as published; of smaller heads those of all their numbers."""
        width = min(16, head_dim)
        return 1 + width + width * width

    @classmethod
    def width(cls, features: int) -> int:
        """The d of 1 + d + d^2 features."""
        width = int(features**0.5)
        if features < 3 or 1 + width + width * width != features:
            raise ValueError(f"expected 1 + d + d^2 features, for instance 273 for d = 16, got {features}")
        return width

    def start(self, head_dim: int, width: int) -> torch.Tensor:
        """Every D / d-th number of a query or key: under RoPE the first ones alone would be those that turn fastest.

        Of more numbers than there are the score of the projections is, about, that of queries and keys.
        """
        if width > head_dim:
            return super().start(head_dim, width) * (head_dim / width) ** 0.5
        every = torch.arange(width, device="cpu") * head_dim // width
        return torch.eye(head_dim, dtype=torch.float32, device="cpu")[:, every]

    def activate(
        self, x: torch.Tensor, projected: torch.Tensor, scale: float, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """See `FeatureMap.activate`."""
        y = projected * scale**0.5
        squares = (y[..., :, None] * y[..., None, :]).flatten(-2) * 0.5**0.5
        return torch.cat([torch.ones_like(y[..., :1]), y, squares], dim=-1)
