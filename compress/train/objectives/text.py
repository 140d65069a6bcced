"""Next-token cross entropy."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from compress.registry import objectives
from compress.train.objectives.objective import Inputs, Objective
from compress.train.token_losses import text_loss


@objectives.register("text")
class Text(Objective):
    """Cross entropy of the text that is trained on, at every token behind the first of a sequence."""

    of_logits: ClassVar[bool] = True

    def count(self, inputs: Inputs) -> int:
        rows, columns = inputs["input_ids"].shape
        return int(rows * (columns - 1))

    def loss(self, student: Any, teacher: Any, inputs: Inputs) -> torch.Tensor:
        return text_loss(student["logits"], inputs["input_ids"])
