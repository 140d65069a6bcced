"""Whole layers full, the others one window: the form that stock architectures have (MASFormer, arXiv 2310.12442)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compress.limits import LONGEST
from compress.registry import solvers
from compress.runtime.span import PAGE
from compress.search.problem import Candidate, Place, Problem
from compress.search.solver import Solver
from compress.search.solvers.heads import Heads, decide, widened, widest


@solvers.register("layers")
class Layers(Solver):
    """Full attention for as many layers as the budget allows; the others share one window of what is left."""

    slots: ClassVar[bool] = True

    order: Annotated[
        Literal["score", "first", "last", "spread"],
        Field(description="which layers are full: of the highest score, the first, the last, or spread evenly"),
    ] = "score"
    score: Annotated[
        str | dict[str, float], Field(min_length=1, description="as in `heads`; a layer's is the mean of its groups")
    ] = "retrieval"
    sink: Annotated[int, Field(ge=0, le=LONGEST, description="tokens at the start that stay visible")] = 0
    window: Annotated[
        int, Field(ge=PAGE, le=LONGEST, multiple_of=PAGE, description="tokens of the others' window, at least")
    ] = 256

    @property
    def sinks(self) -> tuple[int, ...]:
        return (self.sink,)

    def scores_read(self) -> dict[str, str]:
        """As `heads`, where the order is that of the score."""
        return Heads(score=self.score).scores_read() if self.order == "score" else {}

    def solve(self, problem: Problem) -> list[Candidate]:
        """One plan; see `Solver.solve`.

        Raises:
            UserError: not even the smallest windows fit, or the profile has no such score.
        """
        window = widest(problem, self.sink, self.window)
        if window is None:
            return [Candidate(problem.start, note="full everywhere")]
        chosen: list[int] = []

        def full() -> set[Place]:
            return {place for place in problem.free if place[0] in chosen}

        for layer in self._ranked(problem, sorted({layer for layer, _ in problem.free})):
            chosen.append(layer)
            if not problem.fits(decide(problem, full(), window)):
                chosen.pop()
                if self.order != "score":
                    break
        return [Candidate(widened(problem, full(), window), note=f"full layers {sorted(chosen)}")]

    def _ranked(self, problem: Problem, layers: list[int]) -> list[int]:
        if self.order == "first":
            return layers
        if self.order == "last":
            return layers[::-1]
        if self.order == "spread":  # halves, quarters, eighths, ... of the depth
            return sorted(layers, key=lambda layer: (_level(layers.index(layer), len(layers)), layer))
        score = Heads(score=self.score).scores(problem).mean(1)
        return sorted(layers, key=lambda layer: (-float(score[layer]), layer))


def _level(index: int, count: int) -> int:
    """The first power of two at which an even division of `count` layers has a cut at this one."""
    level = 0
    while level < 16 and index not in {round(count * part / 2**level) for part in range(2**level)}:
        level += 1
    return level
