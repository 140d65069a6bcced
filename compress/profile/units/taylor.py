"""Importance by the loss that removal costs to first order (LLM-Pruner, arXiv 2305.11627)."""

from __future__ import annotations

import torch

from compress.profile.units.base import of_weights


@of_weights("taylor", unit="nats per answer token", gradient=True)
def taylor(weight: torch.Tensor, gradient: torch.Tensor, answers: int) -> torch.Tensor:
    """Sum of |weight x dLoss/dWeight| over a unit's weights (needs a backward pass a document, and holds gradients).

    The loss is the mean of -ln p over the answer tokens of all documents. Which weights a unit has:
    `LayerUnits.sums`. Held are gradients of all projections, in float32, once for each corpus and once for the
    document that is read.
    """
    return (weight.float() * gradient / answers).abs()
