"""The pruned target: a head group that is removed, with its rows and columns of the projections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from compress.registry import targets
from compress.targets.target import Target

if TYPE_CHECKING:
    from compress.runtime.families import Family


@targets.register("pruned")
class PrunedGroup(Target):
    """Removed: keys, values and query heads of the group are not computed, and nothing of it is cached."""

    target: Literal["pruned"] = "pruned"

    @classmethod
    def refusal(cls, family: Family) -> str | None:
        """As `Family.whole`, with the switch that it depends on."""
        if family.whole is None or family.whole_with is None:
            return family.whole
        return f"{family.whole}, where `{family.whole_with}` is set"
