"""DuoAttention's objective (arXiv 2410.10819): hidden states as the dense model's, with gates as small as can be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from compress.limits import FACTOR
from compress.registry import objectives
from compress.train.objectives.objective import Inputs, Objective


@objectives.register("gates")
class Gates(Objective):
    """Mean squared difference of the last hidden states, plus a penalty on the mean gate. Gates stay in 0 to 1."""

    penalty: float = Field(0.05, ge=0, le=FACTOR, description="weight of the mean gate beside the squared difference")

    needs_teacher: ClassVar[bool] = True
    unit: ClassVar[str] = "squared difference of hidden states, with the penalty"

    def count(self, inputs: Inputs) -> int:
        return 1

    def loss(self, student: Any, teacher: Any, inputs: Inputs) -> torch.Tensor:
        """Of one document.

        Args:
            student: `states` `[rows, hidden]` and `gates`, those that are free.
            teacher: `states` `[rows, hidden]`.
        """
        difference = (student["states"].float() - teacher["states"].float()).square().mean()
        penalty: torch.Tensor = self.penalty * student["gates"].abs().mean()
        return difference + penalty

    @torch.no_grad()
    def constrain(self, trained: Mapping[str, nn.Parameter]) -> None:
        for gates in trained.values():
            gates.clamp_(0, 1)
