"""Plans that trade the loss at one length against the loss at another: the Pareto front by epsilon-constraints."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc

from compress.search.choice.knapsack import Knapsack, Solution
from compress.search.choice.options import nondominated

AUGMENT = 1e-3  # weight of the other objectives, so that a front has no weakly dominated points


def pareto_front(
    knapsack: Knapsack,
    *,
    names: Sequence[str],
    points: int,
    gap: float,
    time_limit: float,
) -> list[tuple[Solution, str]]:
    """Non-dominated solutions over the objectives of a knapsack, each with the question that it answers.

    First every objective alone, which gives its range (the payoff table), and all of them in equal parts. Then
    `points` epsilon-constraint problems (MoA, arXiv 2406.14909, App. E.3): one objective is minimised with the others
    held below levels within their ranges. Levels are an evenly spread sequence instead of a full grid, whose size
    is exponential in the objectives. Objectives that agree within the gap have nothing to trade and add no levels.

    Args:
        names: one per objective, for the questions.
        points: epsilon-constraint problems to solve besides.
        gap: relative optimality gap of every solve.
        time_limit: seconds for all of it; what is not started by then is left out, except the first solve.

    Returns:
        None of them where no choice is within the limits.
    """
    count = len(knapsack.scale)
    deadline = time.monotonic() + time_limit
    front: list[tuple[Solution, str]] = []
    total = 1 if count == 1 else count + 1 + points
    done = 0

    def ask(weights: NDArray[np.float64], question: str, upper: dict[int, float] | None = None) -> None:
        nonlocal done
        left = deadline - time.monotonic()
        done += 1
        if left > 0 or not front:
            seconds = left / max(total - done + 1, 1) if front else left
            # An even part each, but nobody waits on less than a few seconds: most problems need far less.
            solution = knapsack.solve(weights, gap=gap, time_limit=max(seconds, min(left, 5.0)), upper=upper)
            if solution is not None:
                front.append((solution, question))

    identity = np.eye(count)
    for objective in range(count):
        ask(np.maximum(identity[objective], AUGMENT), f"least {names[objective]}")
    if count > 1 and front:
        ask(np.full(count, 1 / count), "least mean over " + ", ".join(names))
        losses = np.stack([solution.losses for solution, _ in front])
        low, high = losses.min(0), losses.max(0)
        traded = high - low > np.maximum(gap * np.abs(low), 1e-9 * knapsack.scale)
        if traded.any():
            levels = _spread(points, count)
            for number in range(points):
                primary = number % count
                upper = {
                    other: float(low[other] + levels[number, other] * (high[other] - low[other]))
                    for other in range(count)
                    if other != primary and traded[other]
                }
                if upper:
                    ask(
                        np.maximum(identity[primary], AUGMENT), f"least {names[primary]} with the others bounded", upper
                    )
    if not front:
        return []
    losses = np.stack([solution.losses for solution, _ in front])
    return [front[index] for index in nondominated(losses)]


def _spread(count: int, dimensions: int) -> NDArray[np.float64]:
    """`count` points spread evenly over the unit cube, always the same: Halton's sequence without its origin."""
    points: NDArray[np.float64] = qmc.Halton(dimensions, scramble=False).random(count + 1)[1:]
    return points
