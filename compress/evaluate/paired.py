"""Differences between two models over the same items, with their standard errors, and Wilson's interval of a share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Paired:
    """Mean difference to the dense model over the same items, and its standard error."""

    difference: float
    error: float

    @property
    def significant(self) -> bool:
        """Whether zero lies outside the 95% interval."""
        low, high = self.interval
        return not low <= 0.0 <= high

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the difference: 1.96 standard errors to each side."""
        return self.difference - 1.96 * self.error, self.difference + 1.96 * self.error


def paired(ours: Sequence[float], dense: Sequence[float]) -> Paired | None:
    """Difference of two means over the same items in the same order.

    Returns:
        None for fewer than two items, different numbers of items, or differences that are not finite.
    """
    if len(ours) != len(dense) or len(ours) < 2:
        return None
    gaps = [value - other for value, other in zip(ours, dense, strict=True)]
    if not all(map(math.isfinite, gaps)):
        return None
    mean = math.fsum(gaps) / len(gaps)
    spread = math.fsum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1)
    return Paired(difference=mean, error=math.sqrt(spread / len(gaps)))


def averaged(gaps: Sequence[Paired]) -> Paired:
    """Mean of several differences, each weighing the same; they share no items, so their errors are independent."""
    count = len(gaps)
    return Paired(
        difference=math.fsum(gap.difference for gap in gaps) / count,
        error=math.sqrt(math.fsum(gap.error**2 for gap in gaps)) / count,
    )


def wilson(right: int, total: int) -> tuple[float, float]:
    """Wilson's score interval at 95% for `right` of `total` (E. B. Wilson, JASA 22, 1927).

    Raises:
        ValueError: `total` is not positive or `right` is not between 0 and it.
    """
    from scipy.stats import binomtest

    interval = binomtest(right, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
