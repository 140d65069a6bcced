"""Next-token cross entropy."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.nn import functional

from compress.registry import objectives
from compress.train.objectives.objective import Inputs, Objective


def text_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Sum of -ln p over the tokens behind the first of each sequence, nats.

    Args:
        logits: `[B, T, V]`.
        tokens: `[B, T]`.
    """
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum")


@objectives.register("text")
class Text(Objective):
    """Cross entropy of the text that is trained on, at every token behind the first of a sequence."""

    of_logits: ClassVar[bool] = True

    def count(self, inputs: Inputs) -> int:
        rows, columns = inputs["input_ids"].shape
        return int(rows * (columns - 1))

    def loss(self, student: Any, teacher: Any, inputs: Inputs) -> torch.Tensor:
        return text_loss(student["logits"], inputs["input_ids"])
