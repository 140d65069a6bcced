"""Distillation: the divergence of the trained model's predictions from the dense model's."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch.nn import functional

from compress.registry import objectives
from compress.train.objectives.objective import Inputs, Objective


def distill_loss(logits: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Sum of KL(teacher || model) over all tokens, nats, both softened by the temperature and scaled by its square.

    The square keeps the size of the gradient (Hinton et al., arXiv 1503.02531).

    Args:
        logits, teacher: `[B, T, V]`.
    """
    wide, wide_teacher = logits.float(), teacher.float()
    if temperature != 1:
        wide, wide_teacher = wide / temperature, wide_teacher / temperature
    student_logs = functional.log_softmax(wide, -1)
    teacher_logs = functional.log_softmax(wide_teacher, -1)
    return temperature**2 * functional.kl_div(student_logs, teacher_logs, reduction="sum", log_target=True)


@objectives.register("distill")
class Distill(Objective):
    """KL(dense || trained) at every token (Hinton et al., arXiv 1503.02531)."""

    temperature: float = Field(
        1.0, ge=0.01, le=100, description="of both distributions in the KL, which is scaled by its square"
    )

    needs_teacher: ClassVar[bool] = True
    of_logits: ClassVar[bool] = True

    def count(self, inputs: Inputs) -> int:
        return int(inputs["input_ids"].numel())

    def loss(self, student: Any, teacher: Any, inputs: Inputs) -> torch.Tensor:
        return distill_loss(student["logits"], teacher["logits"], self.temperature)
