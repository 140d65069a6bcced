"""The MoA solver: least attention influence lost under the budget, at every profiled length (arXiv 2406.14909).

With `retrieval` above 0 the loss counts the evidence that a rule is expected to hide, too, and `tables` adds others.
Influence alone misses it on models that are sure of what they look up: profiles/README.md, "Objectives", has the
figures.

With `removal` head groups and neurons may be removed in the same plan. Two kinds of loss then stand in one sum: what a
window hides, from the tables, and what a removed unit was worth, from an importance statistic. Both are first-order
estimates in units of their own, so the scores of units are scaled by what both know: removing every head group is
taken to lose what the smallest window of the grid loses in every head group. Neurons are scaled alike, so the statistic
must measure heads and neurons in one unit, as `taylor` does (nats). What a removed unit counts beside a hidden key is
not known better than to a factor before it is measured: every one of `weights` gives plans of its own, and the loss on
held-out documents chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from compress.limits import FACTOR, SECONDS
from compress.registry import solvers
from compress.search.choice.knapsack import Knapsack
from compress.search.choice.options import Objective, Options, layers_of, room, window_options
from compress.search.choice.pareto import pareto_front
from compress.search.choice.removal import PRUNED, Removal
from compress.search.problem import Candidate, Layers, Problem, smallest_window
from compress.search.solver import Solver


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

    def options(self, problem: Problem, windows: Sequence[Options], weight: float) -> list[Options]:
        """The options of head groups with `pruned` among them, then those of neurons, all losses in one unit.

        Args:
            windows: what head groups can become otherwise.
            weight: one of `weights`.
        """
        heads, neurons = self.scores(self.importance, problem)
        groups = heads.sum(-1)  # what query heads lose adds up
        alone = self.protected(problem.shape.layers)
        free = [unit for unit in windows if len(unit.choices) > 1]
        hidden = np.abs(np.sum([unit.losses[unit.costs.sum(1).argmin()] for unit in free], axis=0))
        worth = sum(float(groups[unit.unit.place]) for unit in free)
        scale = weight * (hidden / worth if worth > 0 and hidden.all() else np.ones(windows[0].losses.shape[1]))
        options = []
        for unit in windows:
            layer, group = unit.unit.place
            if layer in alone or group == int(groups[layer].argmax()):
                options.append(unit)
            else:
                loss = float(groups[layer, group]) * scale
                options.append(unit.with_choice(PRUNED, loss.tolist(), [0] * unit.costs.shape[1]).kept())
        for unit in self.neuron_options(problem, neurons):
            options.append(replace(unit, losses=unit.losses * scale))
        return options


@solvers.register("moa")
class Moa(Solver):
    """Chooses a span for every head group so that the influence lost is least, as a Pareto set over lengths.

    There is no limit on the distinct rules of a layer, and no lower bound on what a plan uses of the budget.
    """

    influence: Annotated[
        Literal["absolute", "signed", "joint", "none"],
        Field(
            description="absolute sums |E| (the released MoA code), signed sums E (the paper's formula), joint is the "
            "first-order effect of masking all of a rule's keys at once; none leaves it to `retrieval` and `tables`"
        ),
    ] = "absolute"
    retrieval: Annotated[
        float,
        Field(
            ge=0,
            le=FACTOR,
            description="weight of the evidence that a rule hides from the answer (statistic `retrieval`) beside "
            "influence; 0 is the published method, 1 weighs both alike",
        ),
    ] = 0.0
    tables: dict[str, Annotated[float, Field(gt=0, le=FACTOR)]] = Field(
        default_factory=dict,
        description="further rule tables of the profile and their weights, for instance `{hidden_mass: 1}`",
    )
    rule: Annotated[
        Literal["position", "length"],
        Field(
            description="what a window's beta is a share of: the query's position, or the length of the input as in "
            "the paper, which allows no chunks, no further turns and no batch of inputs of different lengths"
        ),
    ] = "position"
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

    @model_validator(mode="after")
    def _something_to_weigh(self) -> Moa:
        if not self.weighed():
            raise ValueError("influence: none leaves nothing to minimise; set `retrieval` or `tables`")
        return self

    def weighed(self) -> tuple[tuple[str, float], ...]:
        """The rule tables that are minimised, with their weights."""
        every = {} if self.influence == "none" else {f"influence.{self.influence}": 1.0}
        if self.retrieval > 0:
            every["retrieval.lost"] = self.retrieval
        return tuple({**every, **self.tables}.items())

    @property
    def removes(self) -> bool:
        """Where the recipe asks for it."""
        return self.removal is not None

    def scores_read(self) -> dict[str, str]:
        """The tables that are minimised, and the statistic that says what may be removed."""
        tables = {name: "rules" for name, _ in self.weighed()}
        return tables | ({} if self.removal is None else {self.removal.importance: "units"})

    def smallest(self, problem: Problem) -> Layers:
        """Under the smallest rule everywhere, with all removed that may be; see `Solver.smallest`."""
        grid = problem.grid if self.rule == "position" else problem.grid.fixed()  # the smallest rule is among these
        layers = problem.uniform(smallest_window(grid))
        return layers if self.removal is None else self.removal.least(problem, layers)

    def solve(self, problem: Problem) -> list[Candidate]:
        """The Pareto set over the profiled lengths; see `Solver.solve`."""
        self.check(problem)
        objectives = [Objective(self.weighed(), length) for length in problem.lengths]
        windows = window_options(problem, objectives, self.rule)
        if self.removal is None:
            return self._front(problem, objectives, windows)
        plans = []
        for weight in self.removal.weights:
            for plan in self._front(problem, objectives, self.removal.options(problem, windows, weight)):
                note = f"{plan.note}, removed units count {weight:g}"
                plans.append(replace(plan, note=note, importance=self.removal.importance))
        return plans

    def _front(self, problem: Problem, objectives: Sequence[Objective], options: Sequence[Options]) -> list[Candidate]:
        """The plans of one weighing of the losses."""
        names = [objective.name for objective in objectives]
        knapsack = Knapsack(options, room(problem, options).tolist())
        share = 1 if self.removal is None else len(self.removal.weights)
        front = pareto_front(
            knapsack, names=names, points=self.points, gap=self.gap, time_limit=self.time_limit / share
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
