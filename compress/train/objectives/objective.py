"""What every objective answers: which parameters it trains, its loss on a batch, and what holds after every step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from compress.limits import FACTOR
from compress.registry import Method

Inputs = Mapping[str, Any]  # keyword arguments of what is trained, a part of a batch


def tokens_of(inputs: Inputs) -> int:
    """Tokens of a part of a batch that are no padding."""
    mask = inputs.get("attention_mask")
    return int(inputs["input_ids"].numel() if mask is None else mask.sum())


class Objective(Method):
    """One loss of a training; several are added up by their weights. Registered by `@objectives.register("name")`.

    A loss is a sum over the terms of a part of a batch, such as its tokens. The loop divides it by the terms of the
    whole batch, so that every term weighs the same however the batch is split over passes and processes.

    Attributes:
        needs_teacher: whether it reads what the teacher gives.
        of_logits: whether it reads logits and token ids alone, sequence by sequence; and where the inputs have the ids
            of the tokens that follow, `next_ids`, any tokens of a sequence by themselves.
        of_layer: whether it is a loss of one layer, which `prepare` takes, and not one of a whole model.
        needs_parts: of a layer's loss, whether it asks for the softmax and the state of its heads apart.
        needs_features: likewise, whether it asks for the features that the state's weights are made of.
        needs_choice: likewise, whether it asks for what tokens choose, and for nothing else.
        repeats: likewise, whether it is of scorers (`runtime.scorers`), on texts that the dense model repeats.
        of_routers: whether it is a loss of what routers did in a whole model; a model without any goes without it.
        of_keeping: likewise, of which tokens heads kept.
        of_mixers: whether it is of what targets of a plan report; the dense model goes without it.
        unit: of the loss a term.
    """

    weight: float = Field(1.0, ge=0, le=FACTOR, description="weight in the sum of losses; 0 only records it")

    needs_teacher: ClassVar[bool] = False
    of_logits: ClassVar[bool] = False
    of_layer: ClassVar[bool] = False
    needs_parts: ClassVar[bool] = False
    needs_features: ClassVar[bool] = False
    needs_choice: ClassVar[bool] = False
    repeats: ClassVar[bool] = False
    of_routers: ClassVar[bool] = False
    of_keeping: ClassVar[bool] = False
    of_mixers: ClassVar[bool] = False
    unit: ClassVar[str] = "nats a token"

    @property
    def of_record(self) -> bool:
        """Whether it reads what mixers report of a pass (`runtime.step.Record`); a model without goes without it."""
        return self.of_routers or self.of_keeping

    def check(self, context: int | None) -> None:
        """Refuse parameters that a model with a context of so many tokens, None for any, has no room for. Raises
        UserError."""

    def trained(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name: all that need gradients."""
        return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}

    def count(self, inputs: Inputs) -> int:
        """Number of terms in a part of a batch, known before anything is computed: its tokens."""
        return int(inputs["input_ids"].numel())

    @abstractmethod
    def loss(self, student: Any, teacher: Any, inputs: Inputs) -> torch.Tensor:
        """Sum of the terms over a part of a batch.

        Args:
            student, teacher: what the trained and the dense model give for it (a transformers output, or a mapping of
                the same form); `teacher` is None where nothing needs one.
        """

    def constrain(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Put parameters back, in place, into the range they have to be in; called after every step."""
