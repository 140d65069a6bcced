"""Training of routed heads in which what a token does not choose fades: the model loses it little by little."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from compress.models.planned import mixers_of
from compress.train.objectives.objective import Inputs
from compress.train.settings import RecoverSettings


def fading_of(model: Any) -> list[Any]:
    """The mixers of a planned model whose units that are off can fade; none of any other."""
    return [mixer for mixer in mixers_of(model) if mixer.left is not None]


class FadingUnits:
    """Batches that say, as `left`, what a unit that is off is multiplied by in a pass: see `RecoverSettings.fade`."""

    def __init__(self, batches: Any, settings: RecoverSettings) -> None:
        self.batches, self.settings = batches, settings
        self.unit, self.size = batches.unit, batches.size

    @classmethod
    def of(cls, batches: Any, model: Any, settings: RecoverSettings) -> Any:
        """The batches as they are where nothing fades."""
        return cls(batches, settings) if settings.fade and fading_of(model) else batches

    def passes(self, step: int, processes: int) -> list[list[Inputs]]:
        """See `Batches.passes`."""
        left = left_at(self.settings, step)
        return [[{**part, "left": left} for part in parts] for parts in self.batches.passes(step, processes)]


def left_at(settings: RecoverSettings, step: int) -> float:
    """What a unit that is off is multiplied by in a step, from 0: it falls evenly from 1 to 0 at the end of `fade`."""
    faded = settings.fade * settings.step_count
    return max(0.0, 1 - step / faded) if faded else 0.0


@contextmanager
def faded(model: Any, left: float) -> Iterator[None]:
    """Multiply the units of a model that are off by `left`, in passes with gradients, while it is open."""
    mixers = fading_of(model) if left else []
    for mixer in mixers:
        mixer.left = left
    try:
        yield
    finally:
        for mixer in mixers:
            mixer.left = 0.0
