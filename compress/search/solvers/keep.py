"""Full attention where it is needed most, one other target everywhere else (after arXiv 2602.11374).

Retrieval-aware distillation ablates every head on a synthetic key-value probe, keeps the 2% of them that matter most as
attention, and distils all others into recurrent heads. Here any statistic with one number a head group ranks: that
probe without the ablation (`retrieval`), `ar_loss`, `state_rank`, or what the target itself loses, `error` of its
outputs after the preparation, and `effect.absolute`, the loss of the model to first order. What the others become is
what the recipe prepared, whatever target that is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from compress import registry
from compress.errors import UserError
from compress.limits import FACTOR
from compress.registry import solvers
from compress.search.choice.saving import saves_too_little
from compress.search.choice.whole import WholeLayers
from compress.search.problem import FULL_GROUP, Candidate, Layers, Place, Problem
from compress.search.solver import Solver, check_rows
from compress.search.solvers.heads import score_of, weighed
from compress.search.solvers.priced import cheapest
from compress.targets.layer_option import Alike
from compress.targets.target import Target

# What is measured of the target itself; any other name is a statistic of the profile.
ERROR, EFFECTS = "error", ("effect.absolute", "effect.signed")


@solvers.register("keep")
class Keep(Solver):
    """The head groups, or layers, of the highest statistic keep full attention; all others get one target."""

    placed: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = False
    chooses_layers: ClassVar[bool] = True
    cheaper: ClassVar[str] = "lower `share` or prepare a smaller target"
    other_scores: ClassVar[tuple[str, ...]] = (ERROR, *EFFECTS)

    statistic: str | dict[str, Annotated[float, Field(ge=-FACTOR, le=FACTOR)]] = Field(
        "retrieval",
        min_length=1,
        description="what ranks, the highest first: `retrieval`, `ar_loss`, `state_rank` or another statistic with one "
        "number a group, or what is measured of the target itself: `error`, after its preparation, "
        "`effect.absolute` or `effect.signed`; or several with weights, each divided by its mean over groups",
    )
    share: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of the groups or layers that stay full, rounded up; null keeps as many as the budget holds",
    )
    target: Annotated[Target, registry.targets] | None = Field(
        None,
        description="what the others become; null takes each target that was prepared, or else priced by `effect`, in "
        "a plan of its own, of which held-out loss chooses",
    )
    level: Literal["group", "layer"] = Field(
        "group", description="what stays full: single head groups, or whole layers"
    )

    def scores_read(self) -> dict[str, str]:
        names = [self.statistic] if isinstance(self.statistic, str) else self.statistic
        forms = {ERROR: "prepared", **dict.fromkeys(EFFECTS, "targets")}
        return {name: forms.get(name, "groups") for name in names}

    @property
    def named(self) -> tuple[Target, ...]:
        return () if self.target is None else (self.target,)

    def words(self) -> str:
        """How many stay full, and by what."""
        many = "as many as the budget holds" if self.share is None else f"{self.share:.0%}"
        return f"{self.registered}: {many} of the {self._units} full, by {self._ranked_by}"

    @property
    def _units(self) -> str:
        return "groups" if self.level == "group" else "layers"

    @property
    def _ranked_by(self) -> str:
        return self.statistic if isinstance(self.statistic, str) else " + ".join(self.statistic)

    def choices(self, problem: Problem) -> list[Target]:
        """What groups that are not kept may become.

        Raises:
            UserError: nothing was prepared or priced, and the recipe names no target; or it is one of whole layers,
                and single groups are to stay full.
        """
        prepared = [option.target for option in problem.prepared if not option.target.idle]
        if problem.effects is not None:
            prepared += [target for target in problem.effects.priced if target.open]
        found = list(self.named) or prepared or [target for target in problem.profile.priced if not target.removes]
        together = next((target for target in found if target.by_layer), None)
        if together is not None and self.level == "group" and self.share != 0:
            raise UserError(
                f"the head groups of a layer become `{together.target}` together, so single ones cannot stay full",
                where="search.solver.level",
                expected="layer, or `share: 0`",
                found="group",
                fix="write `level: layer`",
            )
        if not found:
            raise UserError(
                "nothing says what head groups become that are not kept",
                where="search.solver.target",
                expected="a target, or a section `prepare` that names one",
                fix="add `target: {target: window, sink: 64, alpha: 256, beta: 0}` to the solver, or prepare one",
            )
        return found

    def whole_layers(self, problem: Problem) -> WholeLayers:
        """None to choose from; but targets that whole layers become are flagged where they save too little."""
        options = [Alike(target=target) for target in self.choices(problem) if target.by_layer]
        told = [saves_too_little(problem, option, problem.entries(option)) for option in options]
        return WholeLayers(flagged=tuple(why for why in told if why is not None))

    def smallest(self, problem: Problem) -> Layers:
        """With the target that costs least, and nothing kept but what `share` says; see `Solver.smallest`."""
        target = cheapest(problem, self.choices(problem))
        places = self._ranked(problem, target)
        return _plan(problem, [] if self.share is None else places[: self._count(places)], target)

    def least_words(self) -> str:
        full = "" if not self.share else f" beside {self.share:.0%} of them full (`share`)"
        return f"which the cheapest target takes in every head group{full}"

    def solve(self, problem: Problem) -> list[Candidate]:
        """One plan for every target that the budget holds; see `Solver.solve`.

        Raises:
            UserError: not even the cheapest fits, or the profile has no such statistic.
        """
        check_rows(problem, self.least_amounts(problem), self)
        plans: dict[Layers, Candidate] = {}
        for target in self.choices(problem):
            places = self._ranked(problem, target)
            if self.share is not None:
                count = self._count(places)
            else:
                count = _most(problem, places, target)
            layers = _plan(problem, places[:count], target)
            if problem.fits(layers):
                plans.setdefault(layers, Candidate(layers, note=self._note(problem, places, count, target)))
        return list(plans.values())

    def _count(self, places: Sequence[Sequence[Place]]) -> int:
        """How many of the ranked groups or layers stay full."""
        return math.ceil(len(places) * (self.share or 0.0) - 1e-9)

    def _scores(self, problem: Problem, target: Target) -> torch.Tensor:
        """What ranks, `[layers, groups]`."""

        def read(name: str) -> torch.Tensor:
            if name == ERROR:
                return problem.error(target).double().nan_to_num()
            if name in EFFECTS:
                part = name.partition(".")[2]
                return torch.stack([problem.effect(target, length, part).double() for length in problem.lengths]).mean(
                    0
                )
            return score_of(problem, name)

        return weighed(self.statistic, read)

    def _ranked(self, problem: Problem, target: Target) -> list[list[Place]]:
        """Groups, or the groups of layers, that may change, the highest score first; of equal ones the first."""
        score = self._scores(problem, target)
        units: dict[int | Place, list[Place]] = {}
        for place in problem.free:
            units.setdefault(place if self.level == "group" else place[0], []).append(place)
        return sorted(units.values(), key=lambda places: (-_mean(score, places), places))

    def _note(self, problem: Problem, places: Sequence[Sequence[Place]], count: int, target: Target) -> str:
        score = self._scores(problem, target)
        note = f"{count} of {len(places)} {self._units} full by {self._ranked_by}, the others {target.words()}"
        if 0 < count < len(places):
            note += f"; at the cut {_mean(score, places[count - 1]):.3g} and {_mean(score, places[count]):.3g}"
        return note


def _mean(score: torch.Tensor, places: Sequence[Place]) -> float:
    return sum(float(score[place]) for place in places) / len(places)


def _most(problem: Problem, places: Sequence[Sequence[Place]], target: Target) -> int:
    """The largest number of first units that the budget holds full beside the target in all others.

    Full attention may cost less than a target in a row (a state is larger than a short cache), so that every number is
    tried, from the largest on.
    """
    return next(
        (count for count in range(len(places), -1, -1) if problem.fits(_plan(problem, places[:count], target))), 0
    )


def _plan(problem: Problem, kept: Sequence[Sequence[Place]], target: Target) -> Layers:
    full = {place for places in kept for place in places}
    return problem.with_targets(lambda place: FULL_GROUP if place in full else target)
