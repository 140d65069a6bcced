"""Transfer: a layer's attention outputs as the dense model's on the same inputs."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from compress.registry import objectives
from compress.train.objectives.hidden import Hidden
from compress.train.objectives.objective import Inputs, Objective

LEAST = 0.01  # share of the attention below which the error of a mean fades out


@objectives.register("transfer")
class Transfer(Objective):
    """Squared error of a layer's attention outputs on the dense model's activations (LoLCATs, arXiv 2410.10254)."""

    part: Literal["all", "state"] = Field(
        "all",
        description="`all` of a head's output, which its window can make good for the most part, or of its `state` "
        "alone: its mean of the hidden values, by the attention that they have",
    )

    needs_teacher: ClassVar[bool] = True
    of_layer: ClassVar[bool] = True
    unit: ClassVar[str] = "squared error a token, summed over layers"

    @property
    def needs_parts(self) -> bool:  # type: ignore[override]
        """For the state alone."""
        return self.part == "state"

    def loss(self, student: Any, teacher: Any, inputs: Inputs) -> torch.Tensor:
        """Of one layer.

        Args:
            student, teacher: `outputs` of both are `[B, T, H, D]`; for the state alone `parts` (see `Hidden.of`), and
                `lse` of the teacher.
        """
        if self.part == "state":
            return Hidden.of(student["parts"], teacher).mean_error(LEAST).mean(1).sum()
        difference = student["outputs"].float() - teacher["outputs"].float()
        return difference.square().mean((-2, -1)).sum()
