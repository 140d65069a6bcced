"""Training passes in which linear heads of some layers have only their state, so that it has to do its work.

A window that sees the last tokens answers most of what short texts ask, and the state behind it learns little; leaving
the window out now and then, less and less often, is the remedy of arXiv 2510.05901.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from compress.models.branches import branched
from compress.train.objectives.objective import Inputs
from compress.train.settings import RecoverSettings
from compress.train.windows import WindowBatches


class DroppedWindows:
    """Batches that say, as `dropped`, which of a model's mixers run without their window in a pass.

    Args:
        shares: of the passes, each for an equal part of the training.
        mixers: how many there are that have a window and a state.
    """

    def __init__(self, batches: WindowBatches, shares: Sequence[float], steps: int, mixers: int, seed: str) -> None:
        self.batches, self.shares, self.steps, self.mixers, self.seed = batches, shares, steps, mixers, seed
        self.unit, self.size = batches.unit, batches.size

    @classmethod
    def of(cls, batches: WindowBatches, model: Any, settings: RecoverSettings, seed: str) -> Any:
        """The batches as they are where the settings drop nothing."""
        if not any(settings.window_dropout):
            return batches
        return cls(batches, settings.window_dropout, settings.step_count, len(two_branched(model)), seed)

    def passes(self, step: int, processes: int) -> list[list[Inputs]]:
        """See `Batches.passes`."""
        share = self.shares[step * len(self.shares) // self.steps]
        found: list[list[Inputs]] = []
        for process, parts in enumerate(self.batches.passes(step, processes)):
            share_of = process // self.batches.context  # one of those that have the same sequences, whose draws are one
            draws = [random.Random(f"{self.seed}/{step}/{share_of}/{number}") for number in range(len(parts))]
            found.append(
                [
                    {**part, "dropped": tuple(n for n in range(self.mixers) if draw.random() < share)}
                    for part, draw in zip(parts, draws, strict=True)
                ]
            )
        return found


def two_branched(model: Any) -> list[Any]:
    """The mixers of a planned model that have a window and a state; none of a stock model."""
    return [place.mixer for place in branched(model)]


@contextmanager
def window_dropped(model: Any, numbers: Sequence[int]) -> Iterator[None]:
    """Run some of a model's mixers, by their numbers in `two_branched`, on their state alone while it is open."""
    mixers = [two_branched(model)[number] for number in numbers] if numbers else []
    before = [mixer.branches for mixer in mixers]
    for mixer in mixers:
        mixer.branches = "linear"
    try:
        yield
    finally:
        for mixer, branches in zip(mixers, before, strict=True):
            mixer.branches = branches


def windows_only(model: Any) -> Any:
    """The model, whose linear heads have only their windows from now on, until it is let go."""
    for mixer in two_branched(model):
        mixer.branches = "window"
    return model
