"""One share of the tokens, or one threshold of their scores, for all head groups: controls of searched thresholds.

KVzip (arXiv 2505.23416) keeps the tokens of the highest scores of all layers and heads together, so that one threshold
decides, and how much a head keeps follows from its scores. A fitted scorer varies less than what it stands for, most
where it knows least, so that one threshold of its own scores gives such heads all or nothing: `same: score` takes how
much a head keeps from the scores that it was fitted to, and which tokens from the scorer. The other control keeps the
same share everywhere, by a threshold of its own in every head group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compress import registry
from compress.errors import UserError
from compress.registry import solvers
from compress.runtime.span import BETA_UNIT
from compress.search.problem import Candidate, Layers, Place, Problem
from compress.search.solver import Solver, check_rows
from compress.targets.retain import LEVELS
from compress.targets.target import Target, Thresholds

LEAST, MOST = 1 / LEVELS, 1 - 1 / LEVELS  # shares that thresholds are measured for
HALVINGS = 40  # of the range of thresholds
SCORES = -64.0, 64.0  # beyond all logarithms of KVzip's scores and KVzip+'s


@solvers.register("shares")
class Shares(Solver):
    """The same for all head groups: one share of the tokens that is kept, one threshold of scores, or one of the scores
    that these stand for, as the budget allows."""

    placed: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = False
    cheaper: ClassVar[str] = "prepare or price heads with a smaller window"

    same: Literal["share", "threshold", "score"] = Field(
        "share",
        description="what all head groups have in common: the share of the tokens that is kept; the threshold, as "
        "KVzip has it; or the threshold of the scores that the scorer was fitted to, so that a head group keeps the "
        "share that KVzip would, and the scorer says which tokens",
    )
    target: Annotated[Target, registry.targets] | None = Field(
        None,
        description="heads that keep tokens, with window and scorer; null takes each window and scorer that was "
        "prepared or priced, in a plan of its own, of which held-out loss chooses",
    )

    @property
    def named(self) -> tuple[Target, ...]:
        return () if self.target is None else (self.target,)

    def words(self) -> str:
        """What is the same."""
        return f"{self.registered}, one {self.same} for all head groups"

    def choices(self, problem: Problem) -> list[Target]:
        """The windows and scorers, with the least, the largest and a share between.

        Raises:
            UserError: there are none, or one whose thresholds are not known.
        """
        return [kind.with_share(share) for kind in self._kinds(problem) for share in (LEAST, 0.5, MOST)]

    def _kinds(self, problem: Problem) -> list[Target]:
        kinds = kinds_of(list(self.named) or [*problem.priced, *(one.target for one in problem.prepared)])
        known = {option.target.prepared_as for option in problem.prepared}
        lacking = [kind for kind in kinds if kind.prepared_as not in known]
        if not kinds or lacking:
            raise UserError(
                "nothing says which thresholds keep which share of the tokens",
                where="search.solver.target" if self.named else "search.solver",
                expected="heads that keep tokens by a scorer that `prepare.targets` names",
                found="; ".join(kind.words() for kind in lacking) or None,
                fix="add `{target: retain, scorer: ridge}` to `prepare.targets`",
            )
        return kinds

    def smallest(self, problem: Problem) -> Layers:
        """With the least share; see `Solver.smallest`."""
        plans = [problem.uniform(kind.with_share(LEAST)) for kind in self._kinds(problem)]
        return min(plans, key=lambda layers: float((problem.total(layers) / problem.limits.clip(1)).sum()))

    def least_words(self) -> str:
        return f"which a share of 1/{LEVELS} takes in every head group"

    def solve(self, problem: Problem) -> list[Candidate]:
        """A plan for every window and scorer that fits; see `Solver.solve`."""
        check_rows(problem, self.least_amounts(problem), self)
        made = {"share": same_share, "threshold": one_threshold, "score": one_score}[self.same]
        plans = [plan for kind in self._kinds(problem) if (plan := made(problem, kind)) is not None]
        if not plans:
            raise UserError(
                f"no {self.same} meets all of the budget at once, though each part of it could be met by itself",
                where="search.budget",
                fix="raise the budget, or name heads with a smaller window",
            )
        return plans


def kinds_of(targets: list[Target]) -> list[Target]:
    """The windows and scorers of heads that keep tokens, whatever their share and threshold, each once."""
    return list(dict.fromkeys(kind for target in targets if (kind := target.with_share(0.5)).open))


def same_share(problem: Problem, kind: Target) -> Candidate | None:
    """The largest share, in 1/1024, that meets the budget in all head groups; None where not even 1/64 does.

    Args:
        kind: a window and a scorer.
    """

    def plan(units: int) -> Layers:
        return problem.uniform(kind.with_share(units / BETA_UNIT))

    low, high = round(LEAST * BETA_UNIT) - 1, round(MOST * BETA_UNIT)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if problem.fits(plan(middle)) else (low, middle - 1)
    if low < LEAST * BETA_UNIT:
        return None
    return Candidate(plan(low), note=f"{low / BETA_UNIT:.1%} of the tokens in every head group")


def one_threshold(problem: Problem, kind: Target) -> Candidate | None:
    """The lowest threshold for all layers and heads that meets the budget (KVzip's); None where the highest does not.

    Before anything is known of thresholds it is the plan of `same_share`.

    Args:
        kind: a window and a scorer.
    """
    known = problem.thresholds(kind)
    if known is None:
        return same_share(problem, kind)
    (most, _), (least, _) = known.at(LEAST), known.at(MOST)
    high = max(float(most[place]) for place in problem.free)
    low = min(float(least[place]) for place in problem.free)
    return _lowest(problem, low, high, lambda threshold: _all_above(kind, threshold, known), "threshold")


def one_score(problem: Problem, kind: Target) -> Candidate | None:
    """The lowest threshold of the scores that a scorer was fitted to that meets the budget: each head group keeps the
    share of the tokens that is above it, between `LEAST` and `MOST`, by the scorer; None where the highest does not.

    Before anything is known of scores it is the plan of `same_share`.

    Args:
        kind: a window and a scorer.

    Raises:
        UserError: the scorer was prepared before such shares were measured.
    """
    known = problem.thresholds(kind)
    if known is None:
        return same_share(problem, kind)

    def shares_above(score: float) -> Callable[[Place], Target]:
        shares = known.wanted_above(score)
        if shares is None:
            raise UserError(
                "the preparation does not say what the scores are that its scorer was fitted to",
                where="search.solver.same",
                fix="prepare the scorer again, or take `same: threshold`",
            )
        found = shares.clamp(LEAST, MOST)
        return lambda place: kind.with_share(float(found[place]))

    return _lowest(problem, *SCORES, shares_above, "score")


def _lowest(
    problem: Problem, low: float, high: float, chosen: Callable[[float], Callable[[Place], Target]], what: str
) -> Candidate | None:
    """The plan of the lowest number between two that meets the budget; None where the highest does not.

    Args:
        chosen: the target of every head group by that number.
        what: the number is.
    """

    def plan(number: float) -> Layers:
        return problem.with_targets(chosen(number))

    if not problem.fits(plan(high)):
        return None
    if problem.fits(plan(low)):
        high = low
    for _ in range(HALVINGS if high > low else 0):
        middle = (low + high) / 2
        low, high = (low, middle) if problem.fits(plan(middle)) else (middle, high)
    return Candidate(plan(high), note=f"one {what} for all head groups, {high:.4g}")


def _all_above(kind: Target, threshold: float, known: Thresholds) -> Callable[[Place], Target]:
    shares, spreads = known.above(threshold)
    return lambda place: kind.with_threshold(threshold, float(shares[place]), float(spreads[place]))
