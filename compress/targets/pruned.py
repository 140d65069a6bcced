"""The pruned target: a head group that is removed, with its rows and columns of the projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from compress.registry import targets
from compress.targets.cost import Cost
from compress.targets.target import Target
from compress.targets.unit import Unit

if TYPE_CHECKING:
    from compress.runtime.families import Family


@targets.register("pruned")
class PrunedGroup(Target):
    """Removed: keys, values and query heads of the group are not computed, and nothing of it is cached."""

    noun: ClassVar[str] = "removed"
    removes: ClassVar[bool] = True
    as_built: ClassVar[bool] = True
    takes_back: ClassVar[bool] = True
    in_vllm: ClassVar[bool] = True

    target: Literal["pruned"] = "pruned"

    @classmethod
    def refusal(cls, family: Family) -> str | None:
        """As `Family.why_whole`."""
        return family.why_whole

    @classmethod
    def options(cls, unit: Unit, lengths: Sequence[int], grid: Any = None) -> list[Target]:
        return [cls()]

    def cost(self, unit: Unit, length: int) -> Cost:
        return Cost()

    def words(self, native: int | None = None) -> str:
        return "removed"

    def short(self, native: int | None = None) -> str:
        return "-"
