"""The example target of `scaled_mixer.py`, and a solver that takes it; registered only while their tests run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from compress.models.prepared import prepared_for
from compress.registry import solvers, targets
from compress.runtime.mixer import MIXERS
from compress.search.problem import Candidate, Place, Problem
from compress.search.solver import Solver
from compress.targets.cost import Cost
from compress.targets.full import FullGroup
from compress.targets.target import Target
from compress.targets.unit import Unit
from compress.targets.window import WindowGroup


class ScaledGroup(Target):
    """A window with a learned sharpness and a learned shift."""

    runtime: ClassVar[str | None] = "tests.train.scaled_mixer"
    noun: ClassVar[str] = "a scaled window"
    objective: ClassVar[str | None] = "transfer"

    target: Literal["scaled"] = "scaled"
    window: int = Field(ge=1)

    def cost(self, unit: Unit, length: int) -> Cost:
        """That of the window, and a few parameters."""
        return WindowGroup(sink=0, alpha=self.window, beta=0.0).cost(unit, length) + Cost(parameters=1 + unit.head_dim)

    def words(self, native: int | None = None) -> str:
        """The window."""
        return f"scaled window {self.window}"

    def initial(self, attention: Any, group: int) -> dict[str, torch.Tensor]:
        """The window as it is."""
        return {"sharpness": torch.ones(()), "shift": torch.zeros(attention.head_dim)}


class LeastError(Solver):
    """Turns head groups into what was prepared for them, those of the least error first, until the budget is met."""

    def solve(self, problem: Problem) -> list[Candidate]:
        """One plan."""
        options = prepared_for(problem.dense.model)
        if not options:  # a check before anything is trained
            return [Candidate(problem.start)]
        errors, chosen = options[0].errors, set[Place]()
        for place in sorted(problem.free, key=lambda place: float(errors[place])):
            chosen.add(place)
            layers = problem.with_targets(lambda place: options[0].target if place in chosen else FullGroup())
            if problem.fits(layers):
                break
        return [Candidate(layers, note=f"{len(chosen)} of {len(problem.free)} groups")]


@contextmanager
def registered() -> Iterator[None]:
    """The target, its mixer and the solver can be named while it is open."""
    from tests.train.scaled_mixer import ScaledMixer

    targets.register("scaled")(ScaledGroup)
    solvers.register("least-error")(LeastError)
    MIXERS["scaled"] = ScaledMixer
    try:
        yield
    finally:
        targets._methods.pop("scaled")
        solvers._methods.pop("least-error")
        MIXERS.pop("scaled")
