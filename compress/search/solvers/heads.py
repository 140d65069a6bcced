"""Full or streaming for every head group by one score: the form of DuoAttention (arXiv 2410.10819).

With `score: gates` this is DuoAttention itself, whose gates the statistic `gates` trains. They saturate, so the cut may
lie among equals: the plan's note says how far apart the groups at the cut are. Other scores need no training; a
retrieval score that is measured once on recall documents costs seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
from pydantic import Field

from compress.errors import UserError
from compress.limits import LONGEST
from compress.profile.key import Key
from compress.profile.statistic import giving
from compress.registry import solvers
from compress.runtime.span import PAGE
from compress.search.problem import FULL_GROUP, Candidate, Layers, Place, Problem
from compress.search.solver import Solver
from compress.search.solvers.uniform import Uniform
from compress.targets.window import WindowGroup


@solvers.register("heads")
class Heads(Solver):
    """Full attention for the head groups of the highest score, as many as the budget allows; one window for all others.

    What is left of the budget enlarges the window. Where not even the windows fit, they are made smaller.
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

    @property
    def sinks(self) -> tuple[int, ...]:
        return (self.sink,)

    def scores_read(self) -> dict[str, str]:
        return dict.fromkeys([self.score] if isinstance(self.score, str) else self.score, "groups")

    def solve(self, problem: Problem) -> list[Candidate]:
        """One plan, with the scores on both sides of the cut; see `Solver.solve`.

        Raises:
            UserError: not even the smallest windows fit, or the profile has no such score.
        """
        window = widest(problem, self.sink, self.window)
        if window is None:
            return [Candidate(problem.start, note="full everywhere")]
        score = self.scores(problem)
        ranked = sorted(problem.free, key=lambda place: (-float(score[place]), place))
        chosen: list[Place] = []
        for place in ranked:
            full = self.most_per_layer is None or sum(layer == place[0] for layer, _ in chosen) < self.most_per_layer
            if full and problem.fits(decide(problem, {*chosen, place}, window)):
                chosen.append(place)
        return [Candidate(widened(problem, set(chosen), window), note=self._note(score, ranked, chosen))]

    def scores(self, problem: Problem) -> torch.Tensor:
        """`[layers, groups]`; of each statistic the mean over the profiled lengths that have it."""
        return weighed(self.score, lambda name: score_of(problem, name))

    def _note(self, score: torch.Tensor, ranked: list[Place], chosen: list[Place]) -> str:
        rest = [place for place in ranked if place not in chosen]
        last = min((float(score[place]) for place in chosen), default=float("nan"))
        first = max((float(score[place]) for place in rest), default=float("nan"))
        names = self.score if isinstance(self.score, str) else " + ".join(self.score)
        return f"{len(chosen)} of {len(ranked)} groups full by {names}; at the cut {last:.3g} and {first:.3g}"


def weighed(score: str | Mapping[str, float], read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """One score, or several with weights, each divided by its mean over groups, `[layers, groups]`.

    Args:
        read: gives one score by its name.
    """
    if isinstance(score, str):
        return read(score)
    return torch.stack([weight * _relative(read(name)) for name, weight in score.items()]).sum(0)


def score_of(problem: Problem, name: str) -> torch.Tensor:
    """One statistic of the profile, `[layers, groups]` float64: the mean over the lengths that have it.

    Raises:
        UserError: no length has it, or it is not one number a group.
    """
    tensors = [problem.profile.find(Key.parse(name).at(length)) for length in problem.lengths]
    values = [tensor.double() for tensor in tensors if tensor is not None]
    if not values or values[0].ndim != 2:
        raise UserError(
            f"the profile has no `{name}` with one number for every head group",
            where="search.solver.score",
            expected=f"a statistic of `profile.statistics` that gives one: {', '.join(giving('groups'))}",
        )
    return torch.stack(values).mean(0)


def _relative(score: torch.Tensor) -> torch.Tensor:
    return score / score.abs().mean().clamp(min=torch.finfo(torch.float64).tiny)


def widest(problem: Problem, sink: int, most: int) -> WindowGroup | None:
    """The window of at most `most` tokens that all groups may have at once; None where all may see everything.

    Raises:
        UserError: not even the smallest windows fit.
    """
    (least,) = Uniform(sink=sink, elastic=False).solve(problem)
    if not problem.free or least.layers == problem.start:
        return None
    layer, group = problem.free[0]
    largest: Any = least.layers[layer].groups[group]
    return WindowGroup(sink=sink, alpha=min(most, largest.alpha), beta=0.0)


def widened(problem: Problem, full: set[Place], window: WindowGroup) -> Layers:
    """The decision with the largest window, a page more at a time, that the budget has room for."""
    decision = decide(problem, full, window)
    while len(full) < len(problem.free):
        window = window.model_copy(update={"alpha": window.alpha + PAGE})
        wider = decide(problem, full, window)
        if window.alpha > max(problem.budget_lengths) or not problem.fits(wider):
            break
        decision = wider
    return decision


def decide(problem: Problem, full: set[Place], window: WindowGroup) -> Layers:
    """Everything for the groups of `full`, the window for all others that may change."""
    return problem.with_targets(lambda place: FULL_GROUP if place in full else window)
