"""The multiple-choice knapsack behind a search: one option per unit, several budgets, a proven optimality gap."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_matrix

Vector = NDArray[np.float64]

ZERO = 1e-6  # losses below this share of what the options can lose at all count as nothing when a gap is relative
MILP_SCALE = 1e4  # HiGHS stops at an absolute gap of 1e-6; in these units that is far below ZERO


class Choices(Protocol):
    """What one unit can become: losses `[choices, objectives]` and costs `[choices, rows]`."""

    @property
    def losses(self) -> Vector:
        """By choice and objective."""

    @property
    def costs(self) -> NDArray[np.int64]:
        """By choice and budget row, whole numbers."""


@dataclass(frozen=True)
class Solution:
    """One option per unit.

    Attributes:
        choice: index into each unit's options, `[units]`.
        losses: sum of the losses by objective, `[objectives]`.
        objective: the weighted sum that was minimised, each objective divided by its scale.
        bound: no choice has a smaller objective; proven by Lagrangian duality or by the MILP's dual bound.
        gap: (objective - bound) / |objective|; an objective near zero counts as `ZERO` of the largest possible one.
    """

    choice: NDArray[np.int64]
    losses: Vector
    objective: float
    bound: float
    gap: float


class Knapsack:
    """min over choices x of sum_g c_g(x_g), with sum_g costs_g(x_g) <= limit in every row.

    Solved with HiGHS: the LP relaxation gives multipliers, whose Lagrangian bound holds whatever the solver's
    tolerances; a rounded and repaired choice gives a first solution; a MILP closes what is left of the gap over
    the columns whose reduced cost lets them be part of a better solution, which keeps 80 layers x 8 groups x
    hundreds of rules small. A choice is checked in whole numbers, never by the solver's own.
    """

    def __init__(self, candidates: Sequence[Choices], limits: Sequence[int]) -> None:
        sizes = [len(group.losses) for group in candidates]
        self.groups = len(sizes)
        self.start = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.group = np.repeat(np.arange(self.groups), sizes)
        self.losses: Vector = np.concatenate([group.losses for group in candidates])
        self.costs = np.concatenate([group.costs for group in candidates])
        self.limits = np.array(limits, dtype=np.int64)
        ranges = np.maximum.reduceat(self.losses, self.start[:-1]) - np.minimum.reduceat(self.losses, self.start[:-1])
        self.scale: Vector = np.where(ranges.sum(0) > 0, ranges.sum(0), 1.0)

    def solve(
        self, weights: Vector, *, gap: float, time_limit: float, upper: Mapping[int, float] | None = None
    ) -> Solution | None:
        """The choice with the smallest weighted loss, to a relative gap; None when the bounds cannot be met.

        A choice that is not proven within `time_limit` is returned with the gap that it has.

        Args:
            weights: one per objective; objectives are divided by their scale (`self.scale`) first.
            gap: relative optimality gap to stop at, 0 for the optimum.
            time_limit: seconds for the MILP; LP and repair come on top.
            upper: largest loss allowed by objective, in the table's unit.
        """
        cost = (self.losses / self.scale) @ weights
        rows, limits = self._rows(upper or {})
        ones = csr_matrix((np.ones(len(cost)), (self.group, np.arange(len(cost)))), shape=(self.groups, len(cost)))
        relaxed = linprog(
            cost, A_ub=csr_matrix(rows.T), b_ub=limits, A_eq=ones, b_eq=np.ones(self.groups), method="highs"
        )
        if relaxed.status == 2:
            return None
        solved = relaxed.status == 0
        multipliers = np.maximum(-relaxed.ineqlin.marginals, 0) if solved else np.zeros(len(limits))
        priced = cost + rows @ multipliers
        cheapest = np.minimum.reduceat(priced, self.start[:-1])
        lagrangian = float(cheapest.sum() - limits @ multipliers)
        reduced = priced - cheapest[self.group]

        best = self._repair(self._largest(relaxed.x if solved else -cost), cost, rows, limits)
        zero = ZERO * float(weights.sum())
        bound = lagrangian
        reach = max(gap * abs(lagrangian), zero)
        deadline = time.monotonic() + time_limit
        while True:
            objective = np.inf if best is None else float(cost[best].sum())
            bound = min(bound, objective)
            left = deadline - time.monotonic()
            if (best is not None and _relative_gap(objective, bound, zero) <= gap) or left <= 0:
                break
            # A choice that uses a column of reduced cost r costs at least `lagrangian` + r: what is left out
            # below cannot beat `best`, or is bounded by `lagrangian` + `reach`.
            reach = min(reach, objective - lagrangian)
            columns = np.flatnonzero(reduced <= reach)
            choice, proof = self._milp(columns, cost, rows, limits, gap, left)
            complete = len(columns) == len(cost) or reach >= objective - lagrangian
            if choice is not None and cost[choice].sum() < objective:
                best = choice
            bound = max(bound, proof if len(columns) == len(cost) else min(proof, lagrangian + reach))
            if complete:
                break
            reach *= 8
        if best is None:
            return None
        objective = float(cost[best].sum())
        bound = min(bound, objective)
        achieved = _relative_gap(objective, bound, zero)
        return Solution(best - self.start[:-1], self.losses[best].sum(0), objective, bound, achieved)

    def _rows(self, upper: Mapping[int, float]) -> tuple[Vector, Vector]:
        """Rows of the budget, then loss bounds in units of the scale: `[columns, rows]` and their limits."""
        bounded = sorted(upper)
        rows = np.concatenate([self.costs, self.losses[:, bounded] / self.scale[bounded]], axis=1)
        bounds = np.array([upper[objective] for objective in bounded]) / self.scale[bounded]
        return rows, np.concatenate([self.limits, bounds])

    def _largest(self, values: Vector) -> NDArray[np.int64]:
        """The column with the largest value in every group, the first of equals; `[groups]`."""
        order = np.lexsort((np.arange(len(values)), -values, self.group))
        return order[self.start[:-1]]

    def _repair(
        self, choice: NDArray[np.int64], cost: Vector, rows: Vector, limits: Vector
    ) -> NDArray[np.int64] | None:
        """Swap options, the cheapest relief first, until every limit holds, then spend what is left; None if stuck."""
        choice = choice.copy()
        norm = np.maximum(np.abs(limits), 1.0)
        tolerance = 1e-9 * norm
        for _ in range(4 * self.groups):
            total = rows[choice].sum(0)
            over = total - limits
            swapped = over + rows - rows[choice][self.group]
            change = cost - cost[choice][self.group]
            if (over <= tolerance).all():
                change[(swapped > tolerance).any(1)] = np.inf
                pick = int(change.argmin())
                if change[pick] >= 0:
                    return choice
            else:
                relief = (np.maximum(over, 0) / norm).sum() - (np.maximum(swapped, 0) / norm).sum(1)
                helps = relief > 1e-12
                if not helps.any():
                    return None
                pick = int(np.where(helps, change / np.where(helps, relief, 1.0), np.inf).argmin())
            choice[self.group[pick]] = pick
        return choice if (rows[choice].sum(0) <= limits + tolerance).all() else None

    def _milp(
        self, columns: NDArray[np.int64], cost: Vector, rows: Vector, limits: Vector, gap: float, time_limit: float
    ) -> tuple[NDArray[np.int64] | None, float]:
        """HiGHS over some columns: a choice, None without one, and a bound for choices of these columns only."""
        count = len(columns)
        ones = csr_matrix((np.ones(count), (self.group[columns], np.arange(count))), shape=(self.groups, count))
        result = milp(
            cost[columns] * MILP_SCALE,
            integrality=np.ones(count),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(ones, 1, 1), LinearConstraint(csr_matrix(rows[columns].T), -np.inf, limits)],
            options={"mip_rel_gap": gap / 2, "time_limit": time_limit},
        )
        if result.status == 2:
            return None, np.inf
        dual = result.get("mip_dual_bound")
        proof = -np.inf if dual is None else float(dual) / MILP_SCALE
        if result.x is None:
            return None, proof
        values = np.full(len(cost), -1.0)
        values[columns] = result.x
        return self._repair(self._largest(values), cost, rows, limits), proof


def _relative_gap(objective: float, bound: float, zero: float) -> float:
    return max(objective - bound, 0.0) / max(abs(objective), zero)
