"""Routed heads as options of a layer: how many units are always on, how many a token chooses, and which are shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.limits import ENTRIES
from compress.registry import Method, layer_options
from compress.targets.layer_option import LayerOption, Worth
from compress.targets.routed import MOST_UNITS, RoutedGroup, Router
from compress.targets.target import Target

FIRST = "first"
Share = Annotated[float, Field(gt=0, lt=1)]
RouterName = Annotated[
    Router, Field(description="what scores the units: `two_stage`, `norm`, or `random` as a control")
]
UnitName = Annotated[
    Literal["group", "head"],
    Field(description="what is chosen: head groups, or query heads, which under grouped queries save almost nothing"),
]
SharedBy = Annotated[
    str,
    Field(
        pattern=r"^[a-z]\w*(\.[a-z]\w*)*$",
        description="the statistic whose highest scores are always on, for instance `taylor`, `removal` or "
        "`retrieval`; `first` takes the first units of every layer, as the paper does",
    ),
]


class RoutedGrid(Method):
    """Routed layers to choose from: every share that is on with every share that is always on, by every router."""

    active: tuple[Share, ...] = Field(
        (0.25, 0.5, 0.75),
        min_length=1,
        max_length=ENTRIES,
        description="shares of a layer's units that a token uses, shared ones among them, in whole units",
    )
    shared: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = Field(
        (0.0, 0.25, 0.5),
        min_length=1,
        max_length=ENTRIES,
        description="shares of a layer's units that are always on, in whole units",
    )
    units: tuple[UnitName, ...] = Field(("group",), min_length=1, description="what is chosen: `group`, `head`")
    routers: tuple[RouterName, ...] = Field(("norm",), min_length=1, description="what scores the units")
    shared_by: SharedBy = FIRST


@layer_options.register("routed")
class RoutedOption(LayerOption):
    """Mixture-of-Head in a layer (arXiv 2410.11842): some units always on, and some of the others chosen by each token.

    The paper has the first half of the heads shared, and half of the others chosen: `shared: 0.5`, `shared_by: first`.
    """

    grid: ClassVar[type[Method] | None] = RoutedGrid

    shared: Annotated[int, Field(ge=0, le=MOST_UNITS)] | Share = Field(
        0, description="units of a layer that are always on: how many, or a share of them below 1"
    )
    active: int = Field(1, ge=1, le=MOST_UNITS, description="of the others, how many a token chooses")
    unit: UnitName = "group"
    router: RouterName = "norm"
    gates: Literal["weighted", "one"] | None = Field(
        None, description="what outputs are multiplied by: the router's weights, or 1; null as the router has it"
    )
    shared_by: SharedBy = FIRST

    @classmethod
    def options(cls, groups: int, queries: int, grid: RoutedGrid | None = None) -> list[LayerOption]:
        """Every entry of the grid that a layer can have."""
        grid = grid or RoutedGrid()
        found: list[LayerOption] = []
        for unit in grid.units:
            count = groups * (queries if unit == "head" else 1)
            for share in grid.active:
                on = min(count - 1, max(1, int(share * count + 0.5)))
                for always in sorted({int(part * count + 0.5) for part in grid.shared}):
                    for router in grid.routers if always < on else ():
                        by = grid.shared_by if always else FIRST
                        about: dict[str, Any] = {"unit": unit, "router": router, "shared_by": by}
                        found.append(cls(shared=always, active=on - always, **about))
        return list(dict.fromkeys(found))

    @classmethod
    def ranks(cls, grid: RoutedGrid | None = None) -> tuple[str, ...]:
        """What says which heads are shared, where the grid shares any."""
        return () if grid is None or grid.shared_by == FIRST or not any(grid.shared) else (grid.shared_by,)

    @property
    def ranked_by(self) -> str | None:
        """The statistic of `shared_by`, where anything is shared."""
        return None if self.shared_by == FIRST or not self.shared else self.shared_by

    def count(self, groups: int, queries: int) -> int:
        """Units of a layer."""
        return groups * (queries if self.unit == "head" else 1)

    def always(self, groups: int, queries: int) -> int:
        """Units of a layer that are always on."""
        return int(self.shared) or int(self.shared * self.count(groups, queries) + 0.5)

    def entries(self, groups: int, queries: int, worth: Worth | None = None) -> tuple[Target, ...]:
        """See `LayerOption.entries`: the shared units are those of the highest scores, of equal ones the first. A head
        group is worth what its query heads are together."""
        count, always = self.count(groups, queries), self.always(groups, queries)
        if always + self.active >= count:
            what = "query heads" if self.unit == "head" else "head groups"
            raise ValueError(
                f"{always} of {count} {what} shared and {self.active} chosen leaves none that is ever off; expected "
                f"fewer than {count} on"
            )
        shared = list(range(always))
        if self.ranked_by is not None:
            shared = self._highest(self._scores(groups, queries, worth), always)
        gates = {} if self.gates is None else {"gates": self.gates}
        about: Any = {"unit": self.unit, "router": self.router, "group_size": queries, **gates}
        return tuple(RoutedGroup.layer(groups, self.active, shared=shared, **about))

    @staticmethod
    def _highest(scores: Sequence[float], count: int) -> list[int]:
        return sorted(sorted(range(len(scores)), key=lambda unit: (-scores[unit], unit))[:count])

    def _scores(self, groups: int, queries: int, worth: Worth | None) -> list[float]:
        """One score a unit."""
        if worth is None:
            raise ValueError(f"the scores of `{self.shared_by}` are missing, which say what is shared")
        if self.unit == "group":
            return [sum(scores) for scores in worth]
        if queries > 1 and len(worth[0]) == 1:
            raise ValueError(
                f"`{self.shared_by}` has one number for every head group, and query heads are chosen: take a statistic "
                "with a score of every head, such as `taylor`"
            )
        return [score for scores in worth for score in scores]

    def ladder(self, groups: int, queries: int) -> list[Self]:
        """With as many shared units, where so many leave any to choose from."""
        free = self.count(groups, queries) - self.always(groups, queries)
        return [self.model_copy(update={"active": active}) for active in range(free - 1, 0, -1)]

    def words(self) -> str:
        how = {"two_stage": "a router", "norm": "the norms of queries", "random": "chance"}[self.router]
        shared = f"{self.shared:.0%}" if self.shared != int(self.shared) else f"{self.shared}"
        noun = "query heads" if self.unit == "head" else "head groups"
        by = f" by {self.shared_by}" if self.shared else ""
        return f"{noun} routed, {shared} shared{by} and {self.active} chosen by {how}"

    def little(self, groups: int, queries: int) -> str:
        """See `Target.little`, of a group none of whose heads is shared."""
        free = self.count(groups, queries) - self.always(groups, queries)
        return RoutedGroup(unit=self.unit, router=self.router, active=self.active, of=free).little(queries)

    def unpriced(self) -> str | None:
        """A router with weights chooses by nothing before it was trained."""
        if self.router == "two_stage":
            return "its router chooses by weights that are zero before they are trained"
        return None

    @model_validator(mode="after")
    def _gates_of_weights(self) -> Self:
        if self.router == "random" and self.gates == "weighted":
            raise ValueError("gates: a random router has no weights to trust, so expected one, got weighted")
        return self
