"""How large a model is: parameters, exactly, in all and in its decoder layers."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from compress.evaluate.cell import Cell
from compress.evaluate.measure import Job, Measure, Result, Setting
from compress.models.pruning import block_parameters
from compress.registry import measures

OF_LAYERS = "parameters of the layers"


class SizeResult(Result):
    """Numbers of parameters.

    Attributes:
        parameters: of the whole model; embeddings that are tied count once.
        block_parameters: of the decoder layers, which a budget of parameters is a share of.
    """

    measure: Literal["size"] = "size"
    parameters: int = Field(ge=1)
    block_parameters: int = Field(ge=1)

    def cells(self) -> list[Cell]:
        """All parameters, and those of the layers."""
        return [
            Cell("parameters", "parameters", self.parameters, "lower", table="cost"),
            Cell(
                OF_LAYERS,
                "parameters",
                self.block_parameters,
                "lower",
                table="cost",
                axis="share of the dense layers' parameters",
            ),
        ]


@measures.register("size")
class Size(Measure):
    """Exact numbers of parameters."""

    result: ClassVar[type[Result]] = SizeResult
    always: ClassVar[bool] = True

    def jobs(self, setting: Setting) -> list[Job]:
        return [Job("size", ["size"], 0, lambda subject, step: size(subject.model))]


def size(model: Any) -> SizeResult:
    """Count a model."""
    total = sum(weight.numel() for weight in model.parameters())
    return SizeResult(parameters=total, block_parameters=block_parameters(model))
