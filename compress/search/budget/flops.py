"""The budget `flops`: floating-point operations of a prefill of one sequence."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, field_validator

from compress.registry import budget_kinds
from compress.search.budget.kind import Row, ShareByLength, Shares

if TYPE_CHECKING:
    from compress.search.dense import Dense


@budget_kinds.register("flops")
class Flops(ShareByLength):
    """Operations of the decoder layers: those of attention, and 2 for every parameter and token.

    Attention has 4 x head_dim for every query head and every visible pair of query and key (scores, weighted values).
    """

    reads: ClassVar[tuple[str, ...]] = ("flops", "parameters")
    unit: ClassVar[str] = "FLOPs"
    of: ClassVar[str] = "the dense model's FLOPs"

    flops: Annotated[
        float | dict[int, float] | None,
        Field(
            description="share of the FLOPs of the dense model's decoder layers in a prefill, above 0 and up to 1, for "
            "all `lengths`, or a mapping from length to a share"
        ),
    ] = None

    @field_validator("flops")
    @classmethod
    def _check_flops(cls, value: Shares) -> Shares:
        return Flops.check(value)

    @classmethod
    def row(cls, length: int, fraction: float, dense: Dense) -> Row:
        """As `ShareByLength.row`; where nothing can be removed, all plans have the same operations of parameters."""
        projections = 2 * length * dense.parameters
        whole = dense.cost(length).flops + projections
        counts = (("flops", 1), ("parameters", 2 * length)) if dense.removes else (("flops", 1),)
        fixed = 0 if dense.removes else projections
        return Row(cls.registered, cls.unit, cls.of, length, math.floor(fraction * whole), whole, counts, fixed)
