"""The budget `active`: query heads that a token computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from compress.registry import budget_kinds
from compress.search.budget.kind import BudgetKind, Row

if TYPE_CHECKING:
    from compress.search.dense import Dense


@budget_kinds.register("active")
class Active(BudgetKind):
    """Query heads of all layers that a token computes, those of routed heads that it does not choose left out.

    It is how published routed models are described, and no cost: what such a share saves, `flops` and `bytes_read` say.
    """

    reads: ClassVar[tuple[str, ...]] = ("heads",)
    spent: ClassVar[bool] = False
    newer: ClassVar[bool] = True

    active: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the query heads of all layers that a token computes; for plans with routed heads",
    )

    @classmethod
    def rows(cls, budget: Any, dense: Dense, profiled: Sequence[int]) -> list[Row]:
        given = cls.value(budget)
        whole = dense.cost(1).heads
        of = "the dense model's query heads"
        return [Row(cls.registered, "query heads", of, None, math.floor(given * whole), whole, (("heads", 1),))]
