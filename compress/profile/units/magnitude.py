"""Importance by the size of weights: the baseline that needs no data."""

from __future__ import annotations

import torch

from compress.profile.units.base import of_weights


@of_weights("magnitude", unit="L2 norm of weights", then=torch.sqrt)
def magnitude(weight: torch.Tensor) -> torch.Tensor:
    """L2 norm of a unit's weights (no data); which these are: `LayerUnits.sums`."""
    return weight.double().square()
