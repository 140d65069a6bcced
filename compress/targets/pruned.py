"""The pruned target: a head group that is removed, with its rows and columns of the projections."""

from __future__ import annotations

from typing import Literal

from compress.registry import targets
from compress.targets.target import Target


@targets.register("pruned")
class PrunedGroup(Target):
    """Removed: keys, values and query heads of the group are not computed, and nothing of it is cached."""

    target: Literal["pruned"] = "pruned"
