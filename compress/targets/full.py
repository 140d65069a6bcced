"""The full target: a head group as the model has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from compress.registry import targets
from compress.runtime.span import own_span
from compress.targets.cost import Cost, span_cost
from compress.targets.target import StockForm, Target
from compress.targets.unit import Unit


@targets.register("full")
class FullGroup(Target):
    """Sees every earlier key, or what the architecture's own sliding window lets it see."""

    as_built: ClassVar[bool] = True

    target: Literal["full"] = "full"

    @classmethod
    def options(cls, unit: Unit, lengths: Sequence[int], grid: Any = None) -> list[Target]:
        """The one that there is."""
        return [cls()]

    def cost(self, unit: Unit, length: int) -> Cost:
        """That of all tokens, or of those in the layer's own window."""
        return span_cost(own_span(unit.native), unit, length)

    def words(self) -> str:
        """As a report says it."""
        return "full"

    def stock(self, native: int | None) -> StockForm | None:
        """The layer as it is."""
        return StockForm(native)
