"""The MoA solver: least attention influence lost under the budget, at every profiled length (arXiv 2406.14909).

With `retrieval` above 0 the loss counts the evidence that a rule is expected to hide, too, and `tables` adds others.
Influence alone misses it on models that are sure of what they look up: profiles/README.md, "Objectives", has the
figures.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, model_validator

from compress.limits import FACTOR, SECONDS
from compress.registry import solvers
from compress.search.budget.budget import check_feasible
from compress.search.choice.knapsack import Knapsack
from compress.search.choice.options import Objective, build_candidates
from compress.search.choice.pareto import pareto_front
from compress.search.problem import CandidatePlan, SearchProblem, Solver


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

    def scores_read(self) -> dict[str, str]:
        """The tables that are minimised."""
        return {name: "rules" for name, _ in self.weighed()}

    def check(self, problem: SearchProblem) -> None:
        """Whether the smallest rule meets the budget; see `Solver.check`."""
        grid = problem.grid if self.rule == "position" else problem.grid.fixed()  # the smallest rule is among these
        check_feasible(replace(problem, grid=grid))

    def solve(self, problem: SearchProblem) -> list[CandidatePlan]:
        """The Pareto set over the profiled lengths; see `Solver.solve`."""
        self.check(problem)
        objectives = [Objective(self.weighed(), length) for length in problem.lengths]
        candidates = build_candidates(problem, objectives, self.rule)
        knapsack = Knapsack(candidates, [row.most for row in problem.rows])
        names = [objective.name for objective in objectives]
        front = pareto_front(knapsack, names=names, points=self.points, gap=self.gap, time_limit=self.time_limit)
        plans = []
        for solution, question in front:
            spans = [group.spans[index] for group, index in zip(candidates, solution.choice, strict=True)]
            width = problem.shape.kv_heads
            decision = tuple(tuple(spans[start : start + width]) for start in range(0, len(spans), width))
            losses = {objective.name: float(loss) for objective, loss in zip(objectives, solution.losses, strict=True)}
            plans.append(CandidatePlan(decision, losses, solution.gap, question))
        return plans
