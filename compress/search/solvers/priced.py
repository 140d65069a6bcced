"""The option solver: for every head group, or layer, the target of least predicted loss, of all that was priced.

The statistic `effect` prices any target that the runtime has, windows, removal and new ones, by one formula: the change
of the loss, to first order, where the group's output is that of the target. `prepare: {effect: true}` prices by the
same formula the targets that it trained. So this solver knows no target by name: what it may choose is what the recipe
lets be priced, and what that costs, state and cache alike, is what the targets say.

What all head groups of a layer become together, such as routed heads, stands beside that: a layer either takes one of
these options, or each of its head groups takes a target of its own, and the plan of least loss is exact over both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from compress.errors import UserError
from compress.registry import solvers
from compress.search.choice.options import HeadGroup, Options, WholeLayer, by_layer, nondominated
from compress.search.choice.removal import PRUNED
from compress.search.choice.whole import LeastSaving, WholeLayers, nothing_left
from compress.search.problem import FULL_GROUP, Amounts, Candidate, Layers, Problem
from compress.search.solver import check_rows
from compress.search.solvers.frontier import Frontier, met
from compress.targets.layer_option import LayerOption
from compress.targets.target import Target


@solvers.register("priced")
class Priced(Frontier, LeastSaving):
    """Chooses among the targets that were priced, prepared ones among them, under all budgets at once."""

    needs_grid: ClassVar[bool] = False
    chooses_layers: ClassVar[bool] = True
    cheaper: ClassVar[str] = "price or prepare a cheaper target"

    part: Literal["absolute", "signed", "error"] = Field(
        "absolute",
        description="absolute sums what rows lose or gain; signed lets rows that gain make up for others; error is the "
        "relative squared error of the outputs, and chooses among prepared targets alone",
    )
    level: Literal["group", "layer", "model"] = Field(
        "group", description="what gets one target: each head group, all groups of a layer, or all of the model"
    )

    @model_serializer(mode="wrap")
    def _as_written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is said of whole layers where it is as usual: plans from before there were any stay the same."""
        written: dict[str, Any] = write(self)
        for name in LeastSaving.model_fields:
            if written[name] == type(self).model_fields[name].default:
                written.pop(name)
        return written

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
            priced = [option.target for option in problem.prepared if not option.target.idle]
        else:
            priced = [target for target in problem.priced if not target.removes and not target.by_layer]
        if not priced and not self._layer_options(problem):
            raise UserError(
                "the profile prices no target",
                where="profile.statistics",
                expected="`effect` with one or more `targets`, or a section `prepare` with `effect: true`",
                fix="add `{name: effect, targets: [{target: window, sink: 64, alpha: 256, beta: 0}]}`",
            )
        return priced

    def _layer_options(self, problem: Problem) -> tuple[LayerOption, ...]:
        """The options of whole layers that were priced; errors after a preparation are of single groups."""
        return () if self.part == "error" else problem.priced_layers

    def whole_layers(self, problem: Problem) -> WholeLayers:
        """See `Solver.whole_layers`.

        Raises:
            UserError: all of them save too little, and nothing else was priced.
        """
        whole = self.worthwhile(problem, self._layer_options(problem))
        if whole.refused and not whole.options and not self.choices(problem):
            raise nothing_left(whole.refused)
        return whole

    def smallest(self, problem: Problem) -> Layers:
        """Under the target that costs least, row by row, with all removed that may be; see `Solver.smallest`."""
        layers = problem.uniform(cheapest(problem, self.choices(problem) or [FULL_GROUP]))
        return layers if self.removal is None else self.removal.least(problem, layers)

    def least_amounts(self, problem: Problem) -> Amounts:
        """In each row by itself, since windows and routed heads are each the smallest in other rows."""
        amounts = super().least_amounts(problem)
        whole = self.whole_layers(problem)
        if not whole.options or self.removal is not None:
            return amounts
        layers = self.smallest(problem)
        for number, layer in enumerate(layers):
            if options := [targets for _, targets in whole.of(number)]:
                costs = problem.layer_costs(number, [layer.groups, *options])
                amounts = amounts + costs.min(0) - costs[0]
        return amounts

    def least_words(self) -> str:
        if self.removes:
            return "which one head group a layer under the cheapest target and the least neurons (`floor`) take"
        return "which the cheapest of the targets takes in every head group"

    def solve(self, problem: Problem) -> list[Candidate]:
        """See `Frontier.solve`; for the whole model all plans of one target that none of the others beats."""
        if self.level != "model":
            return super().solve(problem)
        check_rows(problem, self.least_amounts(problem), self)
        plans = []
        for target in (FULL_GROUP, *self.choices(problem)):
            layers = problem.uniform(target)
            losses = self._losses(problem, target)[tuple(zip(*problem.free, strict=True))].sum(0)
            if problem.fits(layers):
                names = dict(zip(self.objectives(problem), losses.tolist(), strict=True))
                plans.append(Candidate(layers, names, note=f"{target.words()} everywhere"))
        for option, groups in self.whole_layers(problem).options.items():
            layers = problem.with_layers(groups)
            losses = self._layer_losses(problem, option)[list(groups)].sum(0)
            if problem.fits(layers):
                names = dict(zip(self.objectives(problem), losses.tolist(), strict=True))
                plans.append(Candidate(layers, names, note=f"{option.words()} in every layer"))
        met(plans, problem)
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
                choices = tuple(problem.placed(target, place) for target in targets[:count])
                unit = Options(HeadGroup(place), choices, losses[number, group, :count], costs[:count])
                options.append(unit)
        if self.level == "layer":
            return self._with_whole(problem, by_layer(options))
        return [*options, *self._whole(problem, joint=True)]

    def _whole(self, problem: Problem, joint: bool) -> list[Options]:
        """What whole layers may become; see `WholeLayer`."""
        whole, units = self.whole_layers(problem), []
        losses = {option: self._layer_losses(problem, option) for option in whole.options}
        for number in range(problem.shape.layers):
            if found := whole.of(number):
                choices = tuple(targets for _, targets in found)
                lost = np.stack([losses[option][number] for option, _ in found])
                costs = problem.layer_costs(number, choices)
                units.append(Options(WholeLayer((number, 0), joint), choices, lost, costs))
        return units

    def _with_whole(self, problem: Problem, layers: Sequence[Options]) -> list[Options]:
        """The options of layers that get one target, with those of whole layers among them."""
        whole = {unit.unit.place[0]: unit for unit in self._whole(problem, joint=False)}
        units = []
        for unit in layers:
            number = unit.unit.place[0]
            if number not in whole:
                units.append(unit)
                continue
            other = whole[number]
            choices = (*unit.choices, *other.choices)
            losses, costs = np.vstack([unit.losses, other.losses]), np.vstack([unit.costs, other.costs])
            units.append(Options(other.unit, choices, losses, costs))
        return units

    def _layer_losses(self, problem: Problem, option: LayerOption) -> NDArray[np.float64]:
        """What an option of whole layers loses, `[layers, objectives]`."""
        tables = [problem.layer_effect(option, length, self.part).double().sum(1).numpy() for length in problem.lengths]
        return np.stack(tables, axis=-1)

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
