"""Losses that mixers report beside their outputs."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from compress.registry import objectives
from compress.train.objectives.objective import Inputs, Objective


@objectives.register("side")
class Side(Objective):
    """A loss that the plan's mixers report by name (`runtime.step.Record`), summed over layers."""

    loss_name: str = Field(min_length=1, description="name under which the mixers report it")

    of_mixers: ClassVar[bool] = True
    unit: ClassVar[str] = "the mixers' own, summed over layers"

    def loss(self, student: Any, teacher: Any, inputs: Inputs) -> torch.Tensor:
        """The sum over layers times the tokens of the pass.

        Raises:
            ValueError: no mixer reports a loss of that name.
        """
        reported = student["record"].losses
        if self.loss_name not in reported:
            raise ValueError(f"no mixer reports a loss {self.loss_name!r}; reported: {', '.join(reported) or 'none'}")
        found = reported[self.loss_name]  # layers may lie on several devices
        return self.count(inputs) * torch.stack([loss.to(found[0].device) for loss in found]).sum()
