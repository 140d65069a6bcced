"""Next-token cross entropy."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from compress.registry import objectives
from compress.train.objectives.objective import Inputs, Objective
from compress.train.token_losses import NO_TOKEN, following_loss, text_loss


@objectives.register("text")
class Text(Objective):
    """Cross entropy of the text that is trained on, at every token behind the first of a sequence.

    Inputs that are parts of sequences say what follows each of their tokens, `next_ids` (see `next_tokens`).
    """

    of_logits: ClassVar[bool] = True

    def count(self, inputs: Inputs) -> int:
        if "next_ids" in inputs:
            return int((inputs["next_ids"] != NO_TOKEN).sum())
        rows, columns = inputs["input_ids"].shape
        return int(rows * (columns - 1))

    def loss(self, student: Any, teacher: Any, inputs: Inputs) -> torch.Tensor:
        if "next_ids" not in inputs:
            return text_loss(student["logits"], inputs["input_ids"])
        return following_loss(student["logits"], inputs["next_ids"])
