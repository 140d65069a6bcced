"""The option solver: for every head group the target of least predicted loss, of all that `effect` priced.

The statistic `effect` prices any target that the runtime has, windows, removal and new ones, by one formula: the change
of the loss, to first order, where the group's output is that of the target. So this solver knows no target by name:
what it may choose is what the recipe lets `effect` price, and what that costs is what the targets say.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from compress.errors import UserError
from compress.registry import solvers
from compress.search.choice.options import HeadGroup, Options
from compress.search.choice.removal import PRUNED
from compress.search.problem import FULL_GROUP, Layers, Problem
from compress.search.solvers.frontier import Frontier
from compress.targets.target import Target


@solvers.register("priced")
class Priced(Frontier):
    """Chooses among the targets that the statistic `effect` priced, under all budgets at once."""

    part: Literal["absolute", "signed"] = Field(
        "absolute", description="absolute sums what rows lose or gain; signed lets rows that gain make up for others"
    )

    def scores_read(self) -> dict[str, str]:
        """The effects, and the statistic that says what may be removed."""
        return {f"effect.{self.part}": "targets"} | super().scores_read()

    def targets(self, problem: Problem) -> list[Target]:
        """What was priced and leaves the group in place.

        Raises:
            UserError: nothing was.
        """
        profile: Any = problem.profile
        priced = [target for target in getattr(profile, "priced", ()) if not target.removes]
        if not priced:
            raise UserError(
                "the profile prices no target",
                where="profile.statistics",
                expected="`effect` with one or more `targets`",
                fix="add `{name: effect, targets: [{target: window, sink: 64, alpha: 256, beta: 0}]}`",
            )
        return priced

    def smallest(self, problem: Problem) -> Layers:
        """Under the target that costs least, row by row, with all removed that may be; see `Solver.smallest`."""
        targets = self.targets(problem)
        costs = problem.costs(problem.free[0][0], targets) if problem.free else np.zeros((len(targets), 1))
        least = targets[int((costs / np.maximum(costs.max(0), 1)).sum(1).argmin())]
        layers = problem.uniform(least)
        return layers if self.removal is None else self.removal.least(problem, layers)

    def objectives(self, problem: Problem) -> list[str]:
        """One for every profiled length."""
        return [f"effect.{self.part}.{length}" for length in problem.lengths]

    def group_options(self, problem: Problem) -> list[Options]:
        """Full attention, and what was priced."""
        targets = [FULL_GROUP, *self.targets(problem)]
        losses = np.stack([self._losses(problem, target) for target in targets], axis=2)
        free, options = set(problem.free), []
        for number, layer in enumerate(problem.start):
            costs = problem.costs(number, targets)
            for group in layer.kept_groups:
                place = (number, group)
                count = len(targets) if place in free else 1
                unit = Options(HeadGroup(place), tuple(targets[:count]), losses[number, group, :count], costs[:count])
                options.append(unit.kept())
        return options

    def removal_losses(self, problem: Problem) -> NDArray[np.float64] | None:
        """What `effect` says of `pruned`, where it was priced."""
        profile: Any = problem.profile
        return self._losses(problem, PRUNED) if PRUNED in profile.priced else None

    def _losses(self, problem: Problem, target: Target) -> NDArray[np.float64]:
        """What a target loses, `[layers, groups, objectives]`."""
        profile: Any = problem.profile
        tables = [profile.effect(target, length, self.part).double().numpy() for length in problem.lengths]
        return np.stack(tables, axis=-1)
