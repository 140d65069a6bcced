"""The learning rate of every step: a linear rise, then half a cosine down to nothing, or a linear fall at the end."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Learning rate of each of `steps` steps.

    Attributes:
        rate: the highest.
        rise: length of the linear rise in steps; the first step has more than nothing.
        fall: length of the linear fall at the end in steps; None falls as half a cosine from the end of the rise on.
        floor: least share of the highest rate.
    """

    rate: float
    steps: int
    rise: float
    fall: float | None = None
    floor: float = 0.0

    @classmethod
    def cosine(cls, rate: float, steps: int, warmup: float) -> Schedule:
        """A rise over a share of the steps, then half a cosine to nothing."""
        return cls(rate, steps, warmup * steps)

    @classmethod
    def trapezoid(cls, rate: float, steps: int) -> Schedule:
        """A rise over the first fifth, a fall over the last, never below a tenth (DuoAttention, arXiv 2410.10819)."""
        fifth = max(steps / 5, 1)
        return cls(rate, steps, fifth, fifth, 0.1)

    def __call__(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        up = (step + 1) / self.rise if step + 1 <= self.rise else 1.0
        if self.fall is not None:
            down = min(1.0, (self.steps - step) / self.fall)
        elif step > self.rise:
            down = 0.5 * (1 + math.cos(math.pi * (step - self.rise) / (self.steps - self.rise)))
        else:
            down = 1.0
        return self.rate * max(min(up, down), self.floor)
