"""Full or streaming for every head group by one score: the form of DuoAttention (arXiv 2410.10819).

With `score: gates` this is DuoAttention itself, whose gates the statistic `gates` trains. They saturate, so the cut may
lie among equals: the plan's note says how far apart the groups at the cut are. Other scores need no training; a
retrieval score that is measured once on recall documents costs seconds.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from compress.errors import UserError
from compress.limits import LONGEST
from compress.registry import solvers
from compress.runtime.span import FULL, PAGE, Span
from compress.search.problem import CandidatePlan, Decision, SearchProblem, Solver
from compress.search.solvers.uniform import Uniform


@solvers.register("heads")
class Heads(Solver):
    """The groups of the highest score see everything, as many as the budget holds; all others get one window.

    What is left of the budget then makes the window larger. Where not even the windows fit, they are smaller.
    """

    score: Annotated[
        str | dict[str, float],
        Field(
            min_length=1,
            description="a statistic with one number a group: `retrieval`, `gates`, `output_error`, `entropy`; or "
            "several with weights, each divided by its mean over groups, for instance `{retrieval: 1, gates: 1}`",
        ),
    ] = "retrieval"
    sink: Annotated[int, Field(ge=0, le=LONGEST, description="tokens at the start that stay visible")] = 64
    window: Annotated[
        int, Field(ge=PAGE, le=LONGEST, multiple_of=PAGE, description="tokens of the others' window, at least")
    ] = 256
    most_per_layer: Annotated[
        int | None, Field(ge=0, description="full groups that a layer may have at most; null for no limit")
    ] = None

    def scores_read(self) -> dict[str, str]:
        """Those that rank."""
        return dict.fromkeys([self.score] if isinstance(self.score, str) else self.score, "groups")

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
        """`[layers, groups]`; of each statistic the mean over the profiled lengths that have it."""
        if isinstance(self.score, str):
            return score_of(problem, self.score)
        parts = [weight * _relative(score_of(problem, name)) for name, weight in self.score.items()]
        return torch.stack(parts).sum(0)

    def _note(self, score: torch.Tensor, ranked: list[tuple[int, int]], chosen: list[tuple[int, int]]) -> str:
        rest = [place for place in ranked if place not in chosen]
        last = min((float(score[place]) for place in chosen), default=float("nan"))
        first = max((float(score[place]) for place in rest), default=float("nan"))
        told = self.score if isinstance(self.score, str) else " + ".join(self.score)
        return f"{len(chosen)} of {len(ranked)} groups full by {told}; at the cut {last:.3g} and {first:.3g}"


def score_of(problem: SearchProblem, name: str) -> torch.Tensor:
    """One statistic of the profile, `[layers, groups]` float64: the mean over the lengths that have it.

    Raises:
        UserError: no length has it, or it is not one number a group.
    """
    found = []
    for length in problem.lengths:
        try:
            found.append(problem.tensor(f"{name}.{length}").double())
        except (UserError, KeyError):  # a length without recall documents has no such tensor
            continue
    if not found or found[0].ndim != 2:
        raise UserError(
            f"the profile has no `{name}` with one number for every head group",
            where="search.solver.score",
            expected="retrieval, gates, output_error, entropy or sink_mass, and its statistic in `profile.statistics`",
        )
    return torch.stack(found).mean(0)


def _relative(score: torch.Tensor) -> torch.Tensor:
    return score / score.abs().mean().clamp(min=torch.finfo(torch.float64).tiny)


def decide(problem: SearchProblem, full: set[tuple[int, int]], window: Span) -> Decision:
    """Everything for the groups of `full` and for layers that slide by themselves, the window for all others."""
    return tuple(
        tuple(
            FULL if native is not None or (layer, group) in full else window for group in range(problem.shape.kv_heads)
        )
        for layer, native in enumerate(problem.shape.native_windows)
    )
