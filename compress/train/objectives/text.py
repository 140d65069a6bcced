"""Next-token cross entropy."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.nn import functional

from compress.registry import objectives
from compress.train.objectives.objective import Inputs, Objective

NO_TOKEN = -100  # where nothing follows


def next_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """What follows each token `[B, T]`; `NO_TOKEN` behind the last."""
    return functional.pad(tokens[:, 1:], (0, 1), value=NO_TOKEN)


def text_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Sum of -ln p over the tokens behind the first of each sequence, nats.

    Args:
        logits: `[B, T, V]`.
        tokens: `[B, T]`.
    """
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum")


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
        logits, following = student["logits"].flatten(0, 1).float(), inputs["next_ids"].flatten()
        return functional.cross_entropy(logits, following, ignore_index=NO_TOKEN, reduction="sum")
