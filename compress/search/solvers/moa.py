"""The MoA solver: least attention influence lost under the budget, at every profiled length (arXiv 2406.14909).

With `retrieval` above 0 the loss counts the evidence that a rule is expected to hide, too, and `tables` adds others.
Influence alone misses it on models that are sure of what they look up: profiles/README.md, "Objectives", has the
figures.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from compress.limits import FACTOR
from compress.registry import solvers
from compress.search.choice.options import Objective, Options, window_options
from compress.search.problem import Layers, Problem, smallest_window
from compress.search.solvers.frontier import Frontier


@solvers.register("moa")
class Moa(Frontier):
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

    @model_validator(mode="after")
    def _something_to_weigh(self) -> Moa:
        if not self.weighed():
            raise ValueError("influence: none leaves nothing to minimise; set `retrieval` or `tables`")
        return self

    def weighed(self) -> tuple[tuple[str, float], ...]:
        """The rule tables that are minimised, with their weights."""
        weights = {} if self.influence == "none" else {f"influence.{self.influence}": 1.0}
        if self.retrieval > 0:
            weights["retrieval.lost"] = self.retrieval
        return tuple({**weights, **self.tables}.items())

    def scores_read(self) -> dict[str, str]:
        """The tables that are minimised, and the statistic that says what may be removed."""
        return {name: "rules" for name, _ in self.weighed()} | super().scores_read()

    def smallest(self, problem: Problem) -> Layers:
        """Under the smallest rule everywhere, with all removed that may be; see `Solver.smallest`."""
        grid = problem.grid if self.rule == "position" else problem.grid.fixed()  # the smallest rule is among these
        layers = problem.uniform(smallest_window(grid))
        return layers if self.removal is None else self.removal.least(problem, layers)

    def objectives(self, problem: Problem) -> list[str]:
        return [objective.name for objective in self._objectives(problem)]

    def group_options(self, problem: Problem) -> list[Options]:
        """Full attention and the windows of the grid; see `window_options`."""
        return window_options(problem, self._objectives(problem), self.rule)

    def _objectives(self, problem: Problem) -> list[Objective]:
        return [Objective(self.weighed(), length) for length in problem.lengths]
