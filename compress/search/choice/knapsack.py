"""The multiple-choice knapsack behind a search: one option per unit, several budgets, a proven optimality gap.

A unit may also stand for several others, as a layer does for its head groups: then either it takes one of its options,
or each of the others takes one of its own.
"""

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
        choice: index into each unit's options, `[units]`; -1 for a unit in whose place another one has an option, and
            for one that could stand for others and does not.
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

    def __init__(
        self, candidates: Sequence[Choices], limits: Sequence[int], joint: Mapping[int, Sequence[int]] | None = None
    ) -> None:
        """Args:
        joint: by number of a unit that stands for several others, the numbers of these; no unit twice.
        """
        sizes = [len(group.losses) for group in candidates]
        self.groups = len(sizes)
        self.start = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.group = np.repeat(np.arange(self.groups), sizes)
        self.losses: Vector = np.concatenate([group.losses for group in candidates])
        self.costs = np.concatenate([group.costs for group in candidates])
        self.limits = np.array(limits, dtype=np.int64)
        self.blocks = [(number, np.array(members)) for number, members in sorted((joint or {}).items())]
        self.cover = self._cover()
        most, least = (each.reduceat(self.losses, self.start[:-1]) for each in (np.maximum, np.minimum))
        ranges = most - least
        for number, members in self.blocks:
            ranges[number] = np.maximum(most[number], most[members].sum(0)) - np.minimum(
                least[number], least[members].sum(0)
            )
            ranges[members] = 0
        self.scale: Vector = np.where(ranges.sum(0) > 0, ranges.sum(0), 1.0)

    def _cover(self) -> csr_matrix:
        """Which units each column decides, `[units that must be decided, columns]`."""
        standing = np.array([number for number, _ in self.blocks], dtype=np.int64)
        row = np.full(self.groups, -1)
        row[np.setdiff1d(np.arange(self.groups), standing)] = np.arange(self.groups - len(standing))
        plain = np.flatnonzero(row[self.group] >= 0)
        rows, columns = [row[self.group[plain]]], [plain]
        for number, members in self.blocks:
            own = np.arange(self.start[number], self.start[number + 1])
            rows.append(np.tile(row[members], len(own)))
            columns.append(np.repeat(own, len(members)))
        places, entries = np.concatenate(rows), np.concatenate(columns)
        size = (self.groups - len(standing), len(self.losses))
        return csr_matrix((np.ones(len(entries)), (places, entries)), shape=size)

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
        relaxed = linprog(
            cost,
            A_ub=csr_matrix(rows.T),
            b_ub=limits,
            A_eq=self.cover,
            b_eq=np.ones(self.cover.shape[0]),
            method="highs",
        )
        if relaxed.status == 2:
            return None
        solved = relaxed.status == 0
        multipliers = np.maximum(-relaxed.ineqlin.marginals, 0) if solved else np.zeros(len(limits))
        priced = cost + rows @ multipliers
        cheapest = np.minimum.reduceat(priced, self.start[:-1])
        reduced = priced - cheapest[self.group]
        total = cheapest.copy()
        for number, members in self.blocks:
            apart = cheapest[members].sum()
            total[members] = 0
            total[number] = min(cheapest[number], apart)
            reduced[self.group == number] += cheapest[number] - total[number]
            reduced[np.isin(self.group, members)] += apart - total[number]
        lagrangian = float(total.sum() - limits @ multipliers)

        bundles = self._bundles(cost, priced, rows, limits)
        first = self._largest(relaxed.x if solved else -cost)
        best = self._repair(first, cost, rows, limits, bundles)
        zero = ZERO * float(weights.sum())
        bound = lagrangian
        reach = max(gap * abs(lagrangian), zero)
        deadline = time.monotonic() + time_limit
        while True:
            objective = np.inf if best is None else float(cost[_taken(best)].sum())
            bound = min(bound, objective)
            left = deadline - time.monotonic()
            if (best is not None and _relative_gap(objective, bound, zero) <= gap) or left <= 0:
                break
            # A choice that uses a column of reduced cost r costs at least `lagrangian` + r: what is left out
            # below cannot beat `best`, or is bounded by `lagrangian` + `reach`.
            reach = min(reach, objective - lagrangian)
            columns = np.flatnonzero(reduced <= reach)
            choice, proof = self._milp(columns, cost, rows, limits, bundles, gap, left)
            complete = len(columns) == len(cost) or reach >= objective - lagrangian
            if choice is not None and cost[_taken(choice)].sum() < objective:
                best = choice
            bound = max(bound, proof if len(columns) == len(cost) else min(proof, lagrangian + reach))
            if complete:
                break
            reach *= 8
        if best is None:
            return None
        taken = _taken(best)
        objective = float(cost[taken].sum())
        bound = min(bound, objective)
        achieved = _relative_gap(objective, bound, zero)
        choice = np.where(best >= 0, best - self.start[:-1], -1)
        return Solution(choice, self.losses[taken].sum(0), objective, bound, achieved)

    def _rows(self, upper: Mapping[int, float]) -> tuple[Vector, Vector]:
        """Rows of the budget, then loss bounds in units of the scale: `[columns, rows]` and their limits."""
        bounded = sorted(upper)
        rows = np.concatenate([self.costs, self.losses[:, bounded] / self.scale[bounded]], axis=1)
        bounds = np.array([upper[objective] for objective in bounded]) / self.scale[bounded]
        return rows, np.concatenate([self.limits, bounds])

    def _largest(self, values: Vector) -> NDArray[np.int64]:
        """The column with the largest value of every unit, the first of equals, `[units]`; -1 as in `Solution.choice`.

        A unit that stands for others has its column where its values sum to more than half of what all of them have:
        of a relaxed choice, where it is taken for more than a half.
        """
        order = np.lexsort((np.arange(len(values)), -values, self.group))
        picked: NDArray[np.int64] = order[self.start[:-1]]
        sums = np.add.reduceat(np.maximum(values, 0), self.start[:-1])
        for number, members in self.blocks:
            whole = sums[number] > sums[members].mean()
            picked[members if whole else number] = -1
        return picked

    def _bundles(self, cost: Vector, priced: Vector, rows: Vector, limits: Vector) -> _Bundles:
        """What a repair may put in the place of all that a block has: an option of the unit that stands for the others,
        or options of these, the ones of the least loss, of the least price, or of the least cost."""
        weight = (rows / np.maximum(np.abs(limits), 1.0)).sum(1)
        columns, blocks = list[NDArray[np.int64]](), list[int]()
        for block, (number, members) in enumerate(self.blocks):
            own = [np.array([column]) for column in range(self.start[number], self.start[number + 1])]
            for value in (cost, priced, weight):
                each = [self.start[one] + int(value[self.start[one] : self.start[one + 1]].argmin()) for one in members]
                own.append(np.array(each))
            columns += own
            blocks += [block] * len(own)
        return _Bundles(
            columns,
            np.array(blocks, dtype=np.int64),
            np.array([cost[each].sum() for each in columns]),
            np.array([rows[each].sum(0) for each in columns]).reshape(-1, rows.shape[1]),
        )

    def _repair(
        self, choice: NDArray[np.int64], cost: Vector, rows: Vector, limits: Vector, bundles: _Bundles
    ) -> NDArray[np.int64] | None:
        """Swap options, the cheapest relief first, until every limit holds, then spend what is left; None if stuck."""
        choice = choice.copy()
        norm = np.maximum(np.abs(limits), 1.0)
        tolerance = 1e-9 * norm
        for _ in range(4 * self.groups):
            over = rows[_taken(choice)].sum(0) - limits
            at = choice[self.group]
            swapped = np.concatenate([over + rows - rows[at], over + bundles.rows - self._held(choice, rows, bundles)])
            change = np.concatenate([cost - cost[at], bundles.cost - self._held(choice, cost[:, None], bundles)[:, 0]])
            change[: len(cost)][at < 0] = np.inf
            if (over <= tolerance).all():
                change[(swapped > tolerance).any(1)] = np.inf
                pick = int(change.argmin())
                if change[pick] >= 0:
                    return choice
            else:
                relief = (np.maximum(over, 0) / norm).sum() - (np.maximum(swapped, 0) / norm).sum(1)
                helps = (relief > 1e-12) & np.isfinite(change)
                if not helps.any():
                    return None
                pick = int(np.where(helps, change / np.where(helps, relief, 1.0), np.inf).argmin())
            if pick < len(cost):
                choice[self.group[pick]] = pick
            else:
                number, members = self.blocks[bundles.block[pick - len(cost)]]
                columns = bundles.columns[pick - len(cost)]
                choice[[number, *members]] = -1
                choice[self.group[columns]] = columns
        return choice if (rows[_taken(choice)].sum(0) <= limits + tolerance).all() else None

    def _held(self, choice: NDArray[np.int64], values: Vector, bundles: _Bundles) -> Vector:
        """The sum of `[columns, ...]` values over what each bundle's block has now, `[bundles, ...]`."""
        sums = np.zeros((len(self.blocks), values.shape[1]))
        for block, (number, members) in enumerate(self.blocks):
            sums[block] = values[_taken(choice[[number, *members]])].sum(0)
        return sums[bundles.block]

    def _milp(
        self,
        columns: NDArray[np.int64],
        cost: Vector,
        rows: Vector,
        limits: Vector,
        bundles: _Bundles,
        gap: float,
        time_limit: float,
    ) -> tuple[NDArray[np.int64] | None, float]:
        """HiGHS over some columns: a choice, None without one, and a bound for choices of these columns only."""
        count = len(columns)
        result = milp(
            cost[columns] * MILP_SCALE,
            integrality=np.ones(count),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(self.cover[:, columns], 1, 1),
                LinearConstraint(csr_matrix(rows[columns].T), -np.inf, limits),
            ],
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
        return self._repair(self._largest(values), cost, rows, limits, bundles), proof


@dataclass(frozen=True)
class _Bundles:
    """Columns that go together.

    Attributes:
        columns: of each.
        block: `[bundles]`, the number of the block that each is of.
        cost: `[bundles]`, their sum.
        rows: `[bundles, rows]`, likewise.
    """

    columns: list[NDArray[np.int64]]
    block: NDArray[np.int64]
    cost: Vector
    rows: Vector


def _taken(choice: NDArray[np.int64]) -> NDArray[np.int64]:
    """The columns of a choice."""
    return choice[choice >= 0]


def _relative_gap(objective: float, bound: float, zero: float) -> float:
    return max(objective - bound, 0.0) / max(abs(objective), zero)
