"""What the solvers share that choose an option for every unit under all budgets at once, as a Pareto set over lengths.

With `removal` head groups and neurons may be removed in the same plan. Two kinds of loss then stand in one sum: what a
target costs a group that stays, and what a removed unit was worth, from an importance statistic. Both are first-order
estimates, mostly in units of their own, so the scores of units are scaled by what both know, the loss of head groups
that are removed: where that is not priced as a target, removing every head group is taken to lose what the smallest
target loses in every head group. Neurons are scaled alike, so the statistic must measure heads and neurons in one unit,
as `taylor` does (nats). What a removed unit counts beside a hidden key is not known better than to a factor before it
is measured: every one of `weights` gives plans of its own, and so does keeping all head groups, which models of few
groups need; the loss on held-out documents chooses.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from compress.errors import UserError
from compress.limits import FACTOR, SECONDS
from compress.search.choice.knapsack import Knapsack, Vector
from compress.search.choice.options import Options, in_place_of, layers_of, losses_of, room
from compress.search.choice.pareto import pareto_front
from compress.search.choice.removal import PRUNED, Removal
from compress.search.choice.slots import by_counts, few_targets, from_targets, in_slots
from compress.search.problem import Candidate, Problem
from compress.search.serve import Serve, distinct
from compress.search.solver import Solver, check_rows

SETS = 3  # of the sets of targets that lose least in slots, so many are weighed with slots of any groups


class UnitRemoval(Removal):
    """The removal of head groups and neurons beside windows; the group of the highest score of a layer stays."""

    importance: Annotated[
        str,
        Field(
            min_length=1, description="the statistic that says what heads and neurons are worth, in one unit for both"
        ),
    ] = "taylor"
    weights: Annotated[
        tuple[Annotated[float, Field(gt=0, le=FACTOR)], ...],
        Field(
            min_length=1,
            max_length=16,
            description="what a removed unit counts beside hidden keys; several are several plans, of which held-out "
            "loss chooses",
        ),
    ] = (0.25, 1.0, 4.0)

    def options(
        self,
        problem: Problem,
        stay: Sequence[Options],
        weight: float,
        priced: NDArray[np.float64] | None,
    ) -> list[Options]:
        """The options of head groups with `pruned` among them, then those of neurons, all losses in one unit.

        Args:
            stay: what head groups that stay can become.
            weight: one of `weights`.
            priced: what a group loses that is removed, `[layers, groups, objectives]`; None where that is not known.
        """
        heads, neurons = self.scores(self.importance, problem)
        groups = heads.sum(-1)  # what query heads lose adds up
        alone = self.protected(problem.shape.layers)
        free = [unit for unit in stay if len(unit.choices) > 1 and not unit.unit.joint]
        if priced is None:
            lost = np.sum([unit.losses[unit.costs.sum(1).argmin()] for unit in free], axis=0)
        else:
            lost = np.sum([priced[unit.unit.place] for unit in free], axis=0)
        worth = sum(float(groups[unit.unit.place]) for unit in free)
        usable = worth > 0 and bool(np.all(lost))
        scale = weight * (np.abs(lost) / worth if usable else np.ones(stay[0].losses.shape[1]))
        options = []
        for unit in stay:
            layer, group = unit.unit.place
            if layer in alone or unit.unit.joint or group == int(groups[layer].argmax()):
                options.append(unit)
            else:
                loss = float(groups[layer, group]) * scale if priced is None else weight * priced[layer, group]
                options.append(unit.with_choice(PRUNED, loss.tolist(), [0] * unit.costs.shape[1]))
        for unit in self.neuron_options(problem, neurons):
            options.append(replace(unit, losses=unit.losses * scale))
        return options


class Frontier(Solver):
    """Base of these solvers: a subclass says what head groups that stay can become, and what that loses."""

    takes_removal: ClassVar[bool] = True
    slots: ClassVar[bool] = True

    removal: UnitRemoval | None = Field(
        None, description="remove head groups and neurons in the same plan; null removes nothing"
    )
    points: Annotated[
        int,
        Field(
            ge=0, le=1000, description="epsilon-constraint problems solved besides the extreme plans of every length"
        ),
    ] = 4
    gap: Annotated[float, Field(ge=0, lt=1, description="relative optimality gap at which a solve may stop")] = 0.01
    time_limit: Annotated[float, Field(gt=0, le=SECONDS, description="seconds for the whole Pareto set")] = 120.0

    @property
    def removes(self) -> bool:
        return self.removal is not None

    @abstractmethod
    def objectives(self, problem: Problem) -> list[str]:
        """What losses are called, one for every length that is weighed."""

    @abstractmethod
    def group_options(self, problem: Problem) -> list[Options]:
        """What the head groups that stay can become, in the order of the layers, dominated options among it.

        Raises:
            UserError: the profile does not say what that loses.
        """

    def removal_losses(self, problem: Problem) -> NDArray[np.float64] | None:
        """What a head group loses that is removed, `[layers, groups, objectives]`; None where nothing says it."""
        return None

    def scores_read(self) -> dict[str, str]:
        return {} if self.removal is None else {self.removal.importance: "units"}

    def solve(self, problem: Problem) -> list[Candidate]:
        """The Pareto set over the objectives; see `Solver.solve`."""
        check_rows(problem, self.least_amounts(problem), self)
        stay = self.group_options(problem)
        if problem.serve is not None:
            return met(self._served(problem, problem.serve, stay), problem)
        stay = [unit.kept() for unit in stay]
        if self.removal is None:
            return met(self._front(problem, stay), problem)
        priced, plans = self.removal_losses(problem), []
        plain = self.removal.options(problem, stay, 1.0, priced)
        ways = [
            (self.removal.options(problem, stay, weight, priced), f"removed units count {weight:g}")
            for weight in self.removal.weights
        ]
        ways.append(([*stay, *plain[len(stay) :]], "neurons alone removed"))
        for options, how in ways:
            for plan in self._front(problem, [unit.kept() for unit in options]):
                note = f"{plan.note}, {how}"
                losses = dict(zip(plan.losses, losses_of(plain, plan.layers).tolist(), strict=True))
                plans.append(replace(plan, note=note, losses=losses, importance=self.removal.importance))
        return met(plans, problem)

    def most_plans(self, lengths: int) -> int:
        """Every length alone, their mean and the points, once for each weight of what is removed, and without that."""
        fronts = 1 if self.removal is None else len(self.removal.weights) + 1
        return fronts * (1 if lengths == 1 else lengths + 1 + self.points)

    def _served(self, problem: Problem, serve: Serve, stay: Sequence[Options]) -> list[Candidate]:
        """The plans that an engine serves: of slots, and of few targets, those that lose least of the sets tried.

        Raises:
            UserError: an option is not served, or the budget needs more targets.
        """
        groups = problem.shape.kv_heads
        slots = in_slots(stay, serve, groups)
        for unit in slots:
            for choice in unit.choices:
                serve.check_targets(unit.unit.targets(choice))
        most = [unit.kept() for unit in slots]
        free = self._front(problem, most)
        if not free:
            return []
        few = frozenset(target for plan in free for target in distinct(plan.layers))
        note = ""
        if len(few) <= serve.spans:
            sets = [few]
        elif all(len(distinct(plan.layers)) <= serve.spans for plan in free):
            return free
        else:
            sets, note = (
                few_targets([plan.layers for plan in free], slots, serve),
                f", of {serve.spans} targets at most",
            )
        scale = Knapsack(most, room(problem, most).tolist()).scale
        seconds = self.time_limit / 3 / (len(sets) + SETS)
        considered = from_targets(slots, frozenset().union(*sets))
        by_slots = [from_targets(considered, targets) for targets in sets]
        losses = [self._least(problem, options, scale, seconds) for options in by_slots]
        best: list[Options] | None = None
        least = np.inf
        for number in sorted(range(len(sets)), key=losses.__getitem__)[:SETS]:
            options, loss = by_slots[number], losses[number]
            exact = by_counts(from_targets(stay, sets[number]), serve, groups, scale)
            if exact is not None:
                options, loss = exact, self._least(problem, exact, scale, seconds)
            if loss < least:
                best, least = options, loss
        if best is None:
            raise UserError(
                "no plan of so few targets meets the budget",
                where="search.serve.spans",
                expected=f"more than {serve.spans} targets",
                fix="raise it, or the budget",
            )
        plans = self._front(problem, [unit.kept() for unit in best])
        return [replace(plan, note=plan.note + note) for plan in plans]

    def _least(self, problem: Problem, options: Sequence[Options], scale: Vector, seconds: float) -> float:
        """The least mean over the objectives, each divided by its scale, that a plan of these options loses; infinity
        where none is within the budget."""
        kept = [unit.kept() for unit in options]
        knapsack = Knapsack(kept, room(problem, kept).tolist())
        solution = knapsack.solve(knapsack.scale / scale / len(scale), gap=self.gap, time_limit=seconds)
        return np.inf if solution is None else float((solution.losses / scale).mean())

    def _front(self, problem: Problem, options: Sequence[Options]) -> list[Candidate]:
        """The plans of one weighing of the losses."""
        names = self.objectives(problem)
        fronts = 1 if self.removal is None else len(self.removal.weights) + 1
        if problem.serve is not None:
            fronts = 3  # all targets, sets of them, the best set
        front = pareto_front(
            Knapsack(options, room(problem, options).tolist(), in_place_of(options)),
            names=names,
            points=self.points,
            gap=self.gap,
            time_limit=self.time_limit / fronts,
        )
        return [
            Candidate(
                layers_of(problem, options, solution.choice.tolist()),
                dict(zip(names, map(float, solution.losses), strict=True)),
                solution.gap,
                question,
            )
            for solution, question in front
        ]


def met(plans: list[Candidate], problem: Problem) -> list[Candidate]:
    """The plans.

    Raises:
        UserError: there are none: each row of the budget can be met by itself, and not all of them at once.
    """
    if not plans:
        raise UserError(
            "no plan meets all of the budget at once, though each part of it could be met by itself",
            where="search.budget",
            found="; ".join(f"{row.limit:,} {row.unit} ({row.kind})" for row in problem.rows),
            fix="raise one of them, or price cheaper options",
        )
    return plans
