"""The StreamingLLM baseline: a few sink tokens and the largest fixed window, in every head group (arXiv 2309.17453)."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from compress.limits import LONGEST
from compress.registry import solvers
from compress.search.problem import Candidate, Problem
from compress.search.solver import Solver
from compress.search.solvers.uniform import Uniform


@solvers.register("streaming")
class Streaming(Solver):
    """StreamingLLM: the first tokens and one fixed window for all head groups.

    The window is fixed, as in the paper, so a budget at several lengths is bound by the length where it is tightest.
    """

    slots: ClassVar[bool] = True

    sink: Annotated[int, Field(ge=0, le=LONGEST, description="tokens at the start that stay visible")] = 4

    @property
    def sinks(self) -> tuple[int, ...]:
        return (self.sink,)

    def solve(self, problem: Problem) -> list[Candidate]:
        (plan,) = Uniform(sink=self.sink, elastic=False).solve(problem)
        return [plan]
