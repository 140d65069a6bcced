"""How large a model is: parameters, exactly, in all and in its decoder layers."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from compress.models.pruning import block_parameters


class SizeResult(BaseModel):
    """Numbers of parameters.

    Attributes:
        parameters: of the whole model; embeddings that are tied count once.
        block_parameters: of the decoder layers, which a budget of parameters is a share of.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    parameters: int = Field(ge=1)
    block_parameters: int = Field(ge=1)


def size(model: Any) -> SizeResult:
    """Count a model."""
    total = sum(weight.numel() for weight in model.parameters())
    return SizeResult(parameters=total, block_parameters=block_parameters(model))
