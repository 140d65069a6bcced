"""The example target of `scaled_mixer.py`; registered only while its tests run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from compress.registry import targets
from compress.runtime.mixer import MIXERS
from compress.targets.cost import Cost
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


@contextmanager
def registered() -> Iterator[None]:
    """The target and its mixer can be named while it is open."""
    from tests.train.scaled_mixer import ScaledMixer

    targets.register("scaled")(ScaledGroup)
    MIXERS["scaled"] = ScaledMixer
    try:
        yield
    finally:
        targets._methods.pop("scaled")
        MIXERS.pop("scaled")
