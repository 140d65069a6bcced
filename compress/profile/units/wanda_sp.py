"""Importance by weights times the size of their inputs (Wanda, arXiv 2306.11695, summed over structures)."""

from __future__ import annotations

import torch

from compress.profile.units.base import of_columns


@of_columns("wanda_sp", unit="|weight| x root mean square input", each=torch.square)
def wanda_sp(mean_square: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Sum of |weight| x root mean square of its input, over a unit's columns (forward pass only).

    The structured form of Wanda that FLAP (arXiv 2312.11983) compares with.
    """
    return mean_square.sqrt() * weight.abs().sum(0, dtype=torch.float64)
