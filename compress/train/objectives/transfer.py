"""Transfer: a layer's attention outputs as the dense model's on the same inputs."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from compress.registry import objectives
from compress.train.objectives.objective import Inputs, Objective


@objectives.register("transfer")
class Transfer(Objective):
    """Squared error of a layer's attention outputs on the dense model's activations (LoLCATs, arXiv 2410.10254)."""

    needs_teacher: ClassVar[bool] = True
    unit: ClassVar[str] = "squared error a token, summed over layers"

    def count(self, inputs: Inputs) -> int:
        """Tokens."""
        return int(inputs["input_ids"].numel())

    def loss(self, student: Any, teacher: Any, inputs: Inputs) -> torch.Tensor:
        """Of one layer; `outputs` of both are `[B, T, H, D]`."""
        difference = student["outputs"].float() - teacher["outputs"].float()
        return difference.square().mean((-2, -1)).sum()
