"""Full or streaming for every head group by one score: the form of DuoAttention (arXiv 2410.10819), without training.

DuoAttention trains a gate for every key/value head and cuts at a share of them. Its own gates saturate, so the
cut lies among equals; a score that is measured once on recall documents costs seconds and says how far apart the
groups at the cut are.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from compress.errors import UserError
from compress.registry import solvers
from compress.runtime.span import FULL, PAGE, Span
from compress.search.problem import CandidatePlan, Decision, SearchProblem, Solver
from compress.search.uniform import Uniform


@solvers.register("heads")
class Heads(Solver):
    """The groups of the highest score see everything, as many as the budget holds; all others get one window.

    What is left of the budget then makes the window larger. Where not even the windows fit, they are smaller.
    """

    score: Annotated[
        str, Field(description="a statistic with one number a group: `retrieval`, or `entropy`, `sink_mass`")
    ] = "retrieval"
    sink: Annotated[int, Field(ge=0, description="tokens at the start that stay visible")] = 64
    window: Annotated[int, Field(ge=PAGE, multiple_of=PAGE, description="tokens of the others' window, at least")] = 256
    most_per_layer: Annotated[
        int | None, Field(ge=0, description="full groups that a layer may have at most; null for no limit")
    ] = None

    def solve(self, problem: SearchProblem) -> list[CandidatePlan]:
        """One plan, with the scores on both sides of the cut; see `Solver.solve`.

        Raises:
            UserError: not even the smallest windows fit, or the profile has no such score.
        """
        (least,) = Uniform(sink=self.sink, elastic=False).solve(problem)
        free = [row for row, native in zip(least.decision, problem.shape.native_windows, strict=True) if native is None]
        if not free or free[0][0] == FULL:
            return [CandidatePlan(least.decision, note="full everywhere")]
        score = self.scores(problem)
        groups = [
            (layer, group)
            for layer, native in enumerate(problem.shape.native_windows)
            if native is None
            for group in range(problem.shape.kv_heads)
        ]
        ranked = sorted(groups, key=lambda place: (-float(score[place]), place))
        window = Span(self.sink, min(self.window, free[0][0].alpha), 0.0)
        chosen: list[tuple[int, int]] = []
        for place in ranked:
            full = self.most_per_layer is None or sum(layer == place[0] for layer, _ in chosen) < self.most_per_layer
            if full and problem.fits(decide(problem, {*chosen, place}, window)):
                chosen.append(place)
        while len(chosen) < len(groups):
            wider = Span(self.sink, window.alpha + PAGE, 0.0)
            if wider.alpha > max(problem.budget_lengths) or not problem.fits(decide(problem, set(chosen), wider)):
                break
            window = wider
        return [CandidatePlan(decide(problem, set(chosen), window), note=self._note(score, ranked, chosen))]

    def scores(self, problem: SearchProblem) -> torch.Tensor:
        """The mean over the profiled lengths that have it, `[layers, groups]`."""
        found = []
        for length in problem.lengths:
            try:
                found.append(problem.tensor(f"{self.score}.{length}").double())
            except (UserError, KeyError):  # a length without recall documents has no such tensor
                continue
        if not found or found[0].ndim != 2:
            raise UserError(
                f"the profile has no `{self.score}` with one number for every head group",
                where="search.solver.score",
                expected="retrieval, entropy or sink_mass, and its statistic in `profile.statistics`",
            )
        return torch.stack(found).mean(0)

    def _note(self, score: torch.Tensor, ranked: list[tuple[int, int]], chosen: list[tuple[int, int]]) -> str:
        rest = [place for place in ranked if place not in chosen]
        last = min((float(score[place]) for place in chosen), default=float("nan"))
        first = max((float(score[place]) for place in rest), default=float("nan"))
        return f"{len(chosen)} of {len(ranked)} groups full by {self.score}; at the cut {last:.3g} and {first:.3g}"


def decide(problem: SearchProblem, full: set[tuple[int, int]], window: Span) -> Decision:
    """Everything for the groups of `full` and for layers that slide by themselves, the window for all others."""
    return tuple(
        tuple(
            FULL if native is not None or (layer, group) in full else window for group in range(problem.shape.kv_heads)
        )
        for layer, native in enumerate(problem.shape.native_windows)
    )
