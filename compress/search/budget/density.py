"""The budget `density`: keys that the last query sees, in tokens."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, field_validator

from compress.registry import budget_kinds
from compress.search.budget.kind import ShareByLength, Shares


@budget_kinds.register("density")
class Density(ShareByLength):
    """Visible keys over all head groups: MoA's density (arXiv 2406.14909), token by token."""

    reads: ClassVar[tuple[str, ...]] = ("keys",)
    unit: ClassVar[str] = "keys"
    of: ClassVar[str] = "the dense model's visible keys"

    density: Annotated[
        float | dict[int, float] | None,
        Field(
            description="share of the keys that the dense model's last query sees, above 0 and up to 1, in tokens over "
            "all head groups; for all `lengths`, or a mapping from length to a share"
        ),
    ] = None

    @field_validator("density")
    @classmethod
    def _check_density(cls, value: Shares) -> Shares:
        return Density.check(value)
