"""Distillation: the divergence of the trained model's predictions from the dense model's."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from compress.registry import objectives
from compress.train.objectives.objective import Inputs, Objective
from compress.train.token_losses import distill_loss


@objectives.register("distill")
class Distill(Objective):
    """KL(dense || trained) at every token (Hinton et al., arXiv 1503.02531)."""

    temperature: float = Field(
        1.0, ge=0.01, le=100, description="of both distributions in the KL, which is scaled by its square"
    )

    needs_teacher: ClassVar[bool] = True
    of_logits: ClassVar[bool] = True

    def loss(self, student: Any, teacher: Any, inputs: Inputs) -> torch.Tensor:
        return distill_loss(student["logits"], teacher["logits"], self.temperature)
