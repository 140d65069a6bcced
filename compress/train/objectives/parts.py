"""Match the parts: the mean of what a head hides, and the attention that it has, each by itself."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from compress.limits import FACTOR
from compress.registry import objectives
from compress.train.objectives.hidden import Hidden, Mass
from compress.train.objectives.objective import Inputs, Objective


@objectives.register("parts")
class Parts(Objective):
    """Error of the mean of the hidden values, by their attention, plus the error of that attention.

    Full attention splits into the keys in sight and the hidden ones. The state of a linear head is to have the mean and
    the mass of the hidden ones; where it has, the head equals full attention, and nothing that its window does can make
    up for it. An error of the whole output can be bought by the window, whose state then learns little (arXiv
    2510.05901).
    """

    mean: float = Field(1.0, ge=0, le=FACTOR, description="weight of the error of the mean of hidden values")
    mass: float = Field(1.0, ge=0, le=FACTOR, description="weight of the error of their attention")
    form: Mass = Field(
        "divergence",
        description="of the error of the attention: `divergence` of the two shares, or the squared difference of the "
        "`log` masses",
    )
    least: float = Field(
        0.01, gt=0, le=1, description="share of the attention below which the error of the mean fades out"
    )

    needs_teacher: ClassVar[bool] = True
    of_layer: ClassVar[bool] = True
    needs_parts: ClassVar[bool] = True
    unit: ClassVar[str] = "error of the mean over the values' square, and of the mass, a token, summed over layers"

    def loss(self, student: Any, teacher: Any, inputs: Inputs) -> torch.Tensor:
        """Of one layer, the mean over its heads.

        Args:
            student: `parts` (see `Hidden.of`).
            teacher: `outputs`, `lse` (likewise), and `size` `[B, H]`, the mean square of a number of the values.
        """
        hidden = Hidden.of(student["parts"], teacher)
        error = self.mean * hidden.mean_error(self.least) / teacher["size"][..., None]
        if self.mass:
            error = error + self.mass * hidden.mass_error(self.form)
        return error.mean(1).sum()
