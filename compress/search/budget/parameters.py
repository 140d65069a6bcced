"""The budget `parameters`: parameters of the decoder layers that stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, field_validator

from compress.limits import BYTES
from compress.registry import budget_kinds
from compress.search.budget.kind import BudgetKind, Row

if TYPE_CHECKING:
    from compress.search.dense import Dense


@budget_kinds.register("parameters")
class Parameters(BudgetKind):
    """Parameters of the decoder layers and their norms, without embeddings and output head; for solvers that remove."""

    reads: ClassVar[tuple[str, ...]] = ("parameters",)

    parameters: Annotated[
        float | None,
        Field(
            gt=0,
            le=BYTES,
            description="share of the decoder layers' parameters that stays, above 0 and up to 1, or a whole number of "
            "them; for solvers that remove heads and neurons",
        ),
    ] = None

    @field_validator("parameters")
    @classmethod
    def _check_parameters(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and value != int(value):
            raise ValueError(f"expected a share in (0, 1] or a whole number, got {value}")
        return value

    @classmethod
    def rows(cls, budget: Any, dense: Dense, profiled: Sequence[int]) -> list[Row]:
        given = cls.value(budget)
        return [] if given is None else [cls.row(given, dense)]

    @classmethod
    def row(cls, given: float, dense: Dense) -> Row:
        """The row of a share of the decoder layers' parameters, or of a whole number of them."""
        whole = dense.parameters
        limit = int(given) if given > 1 else math.floor(given * whole)
        of = "the decoder layers' parameters"
        return Row(cls.registered, "parameters", of, None, limit, whole, (("parameters", 1),))
