"""The option solver: for every head group, or layer, the target of least predicted loss, of all that was priced.

The statistic `effect` prices any target that the runtime has, windows, removal and new ones, by one formula: the change
of the loss, to first order, where the group's output is that of the target. `prepare: {effect: true}` prices by the
same formula the targets that it trained. So this solver knows no target by name: what it may choose is what the recipe
lets be priced, and what that costs, state and cache alike, is what the targets say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from compress.errors import UserError
from compress.registry import solvers
from compress.search.choice.options import HeadGroup, Options, by_layer, nondominated
from compress.search.choice.removal import PRUNED
from compress.search.problem import FULL_GROUP, Candidate, Layers, Problem
from compress.search.solver import check_rows
from compress.search.solvers.frontier import Frontier
from compress.targets.target import Target


@solvers.register("priced")
class Priced(Frontier):
    """Chooses among the targets that were priced, prepared ones among them, under all budgets at once."""

    needs_grid: ClassVar[bool] = False
    cheaper: ClassVar[str] = "price or prepare a cheaper target"

    part: Literal["absolute", "signed", "error"] = Field(
        "absolute",
        description="absolute sums what rows lose or gain; signed lets rows that gain make up for others; error is the "
        "relative squared error of the outputs, and chooses among prepared targets alone",
    )
    level: Literal["group", "layer", "model"] = Field(
        "group", description="what gets one target: each head group, all groups of a layer, or all of the model"
    )

    @model_validator(mode="after")
    def _removes_groups(self) -> Self:
        if self.removal is not None and self.level != "group":
            raise ValueError("`removal` decides head group by head group: write `level: group`, or leave it out")
        return self

    def scores_read(self) -> dict[str, str]:
        """The effects or errors, and the statistic that says what may be removed."""
        read = {"error": "prepared"} if self.part == "error" else {f"effect.{self.part}": "targets"}
        return read | super().scores_read()

    def words(self) -> str:
        """What gets a target, where that is not each head group."""
        level = {"group": "", "layer": ", one target a layer", "model": ", one target for the whole model"}[self.level]
        return self.registered + (", by the error after preparation" if self.part == "error" else "") + level

    def choices(self, problem: Problem) -> list[Target]:
        """What was priced and leaves the group in place.

        Raises:
            UserError: nothing was.
        """
        if self.part == "error":
            priced = [option.target for option in problem.prepared]
        else:
            priced = [target for target in problem.priced if not target.removes]
        if not priced:
            raise UserError(
                "the profile prices no target",
                where="profile.statistics",
                expected="`effect` with one or more `targets`, or a section `prepare` with `effect: true`",
                fix="add `{name: effect, targets: [{target: window, sink: 64, alpha: 256, beta: 0}]}`",
            )
        return priced

    def smallest(self, problem: Problem) -> Layers:
        """Under the target that costs least, row by row, with all removed that may be; see `Solver.smallest`."""
        layers = problem.uniform(cheapest(problem, self.choices(problem)))
        return layers if self.removal is None else self.removal.least(problem, layers)

    def least_words(self) -> str:
        if self.removes:
            return "which one head group a layer under the cheapest target and the least neurons (`floor`) take"
        return "which the cheapest of the targets takes in every head group"

    def solve(self, problem: Problem) -> list[Candidate]:
        """See `Frontier.solve`; for the whole model all plans of one target that none of the others beats."""
        if self.level != "model":
            return super().solve(problem)
        check_rows(problem, self.smallest(problem), self)
        plans = []
        for target in (FULL_GROUP, *self.choices(problem)):
            layers = problem.uniform(target)
            losses = self._losses(problem, target)[tuple(zip(*problem.free, strict=True))].sum(0)
            if problem.fits(layers):
                names = dict(zip(self.objectives(problem), losses.tolist(), strict=True))
                plans.append(Candidate(layers, names, note=f"{target.words()} everywhere"))
        merits = [[*candidate.losses.values(), *problem.total(candidate.layers)] for candidate in plans]
        return [plans[index] for index in nondominated(np.array(merits, dtype=np.float64))]

    def objectives(self, problem: Problem) -> list[str]:
        """One for every profiled length; errors have no length."""
        if self.part == "error":
            return ["error"]
        return [f"effect.{self.part}.{length}" for length in problem.lengths]

    def group_options(self, problem: Problem) -> list[Options]:
        """Full attention, and what was priced, for head groups or for whole layers."""
        targets = [FULL_GROUP, *self.choices(problem)]
        losses = np.stack([self._losses(problem, target) for target in targets], axis=2)
        free, options = set(problem.free), []
        for number, layer in enumerate(problem.start):
            costs = problem.costs(number, targets)
            for group in layer.kept_groups:
                place = (number, group)
                count = len(targets) if place in free else 1
                unit = Options(HeadGroup(place), tuple(targets[:count]), losses[number, group, :count], costs[:count])
                options.append(unit)
        return [unit.kept() for unit in (by_layer(options) if self.level == "layer" else options)]

    def removal_losses(self, problem: Problem) -> NDArray[np.float64] | None:
        """What `effect` says of `pruned`, where it was priced."""
        return self._losses(problem, PRUNED) if self.part != "error" and PRUNED in problem.priced else None

    def _losses(self, problem: Problem, target: Target) -> NDArray[np.float64]:
        """What a target loses, `[layers, groups, objectives]`."""
        if self.part == "error":
            shape = problem.shape
            full = torch.zeros(shape.layers, shape.kv_heads)
            return np.asarray((full if target == FULL_GROUP else problem.error(target)).double().numpy()[..., None])
        tables = [problem.effect(target, length, self.part).double().numpy() for length in problem.lengths]
        return np.stack(tables, axis=-1)


def cheapest(problem: Problem, targets: Sequence[Target]) -> Target:
    """The target that costs a head group least, relative to the dearest one, in all rows together."""
    costs = problem.costs(problem.free[0][0], targets) if problem.free else np.zeros((len(targets), 1))
    return targets[int((costs / np.maximum(costs.max(0), 1)).sum(1).argmin())]
