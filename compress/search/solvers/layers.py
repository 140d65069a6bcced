"""Whole layers full, the others one window: the form that stock architectures have (MASFormer, arXiv 2310.12442)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from compress.limits import LONGEST
from compress.registry import solvers
from compress.runtime.span import FULL, PAGE, Span
from compress.search.problem import CandidatePlan, SearchProblem, Solver
from compress.search.solvers.heads import Heads, decide
from compress.search.solvers.uniform import Uniform


@solvers.register("layers")
class Layers(Solver):
    """As many full layers as the budget holds beside windows in the others, which then take what is left."""

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

    def scores_read(self) -> dict[str, str]:
        """As `heads`, where the order is that of the score."""
        return Heads(score=self.score).scores_read() if self.order == "score" else {}

    def solve(self, problem: SearchProblem) -> list[CandidatePlan]:
        """One plan; see `Solver.solve`.

        Raises:
            UserError: not even the smallest windows fit, or the profile has no such score.
        """
        (least,) = Uniform(sink=self.sink, elastic=False).solve(problem)
        own = [layer for layer, native in enumerate(problem.shape.native_windows) if native is None]
        if not own or least.decision[own[0]][0] == FULL:
            return [CandidatePlan(least.decision, note="full everywhere")]
        window = Span(self.sink, min(self.window, least.decision[own[0]][0].alpha), 0.0)
        every = range(problem.shape.kv_heads)
        chosen: list[int] = []
        for layer in self._ranked(problem, own):
            if problem.fits(decide(problem, {(each, group) for each in [*chosen, layer] for group in every}, window)):
                chosen.append(layer)
            elif self.order != "score":
                break
        full = {(layer, group) for layer in chosen for group in every}
        while len(chosen) < len(own):
            wider = Span(self.sink, window.alpha + PAGE, 0.0)
            if wider.alpha > max(problem.budget_lengths) or not problem.fits(decide(problem, full, wider)):
                break
            window = wider
        return [CandidatePlan(decide(problem, full, window), note=f"full layers {sorted(chosen)}")]

    def _ranked(self, problem: SearchProblem, own: list[int]) -> list[int]:
        if self.order == "first":
            return own
        if self.order == "last":
            return own[::-1]
        if self.order == "spread":  # halves, quarters, eighths, ... of the depth
            return sorted(own, key=lambda layer: (_level(own.index(layer), len(own)), layer))
        score = Heads(score=self.score).scores(problem).mean(1)
        return sorted(own, key=lambda layer: (-float(score[layer]), layer))


def _level(index: int, count: int) -> int:
    """The first power of two at which an even division of `count` layers has a cut at this one."""
    level = 0
    while level < 16 and index not in {round(count * part / 2**level) for part in range(2**level)}:
        level += 1
    return level
