"""The exchange of options between units that a quadratic model of the loss likes best, within budget and radius."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.search.choice.options import Options, room
from compress.search.problem import Problem

Vector = NDArray[np.float64]
Indices = NDArray[np.int64]

LEAST = 1e-12  # a change of the model below this is rounding


def exchange(
    problem: Problem,
    units: Sequence[Options],
    now: Sequence[int],
    effects: Vector,
    radius: int,
    believed: float,
    doubt: float = 0.0,
) -> tuple[list[int], float, float]:
    """The exchange of at most `radius` units that lowers the model most, by single moves and pairs of them, greedily.

    The best of thousands of moves by a model of samples is best by chance as well. `doubt` holds so many standard
    errors of a move's change over the samples against it.

    Args:
        units: what can change, with what it can become.
        now: the option of every unit, by index; together they are within the budget.
        effects: `[samples, columns]`, all options of all units behind each other; the model's loss is the sum over
            samples of the squared sum over units.
        believed: share of the interactions between units that counts, 0 to 1.
        doubt: standard errors by which a move has to lower the model, 0 or more.

    Returns:
        The new option of every unit, and the model's loss of the old and the new ones.
    """
    table = _Table.of(problem, units, effects, believed, doubt)
    first = table.start + np.array(now)
    chosen = first.copy()
    before = table.loss(chosen)
    while picks := table.best(chosen, left=radius - int((chosen != first).sum()), fresh=chosen == first):
        for pick in picks:
            chosen[table.unit[pick]] = pick
    return (chosen - table.start).tolist(), before, table.loss(chosen)


@dataclass(frozen=True)
class _Table:
    """All options of all units, one column each, unit by unit.

    Attributes:
        start: `[units]`, the first column of each.
        unit: `[columns]`, the unit of a column.
        gram: `[columns, columns]` products of the effects; two options chosen add twice theirs to the loss.
        costs: `[columns, rows of the budget]`.
        room: `[rows]`, what the columns may cost together.
        samples: `[samples, columns]`, the effects.
        believed, doubt: as in `exchange`.
    """

    start: Indices
    unit: Indices
    gram: Vector
    costs: Indices
    room: Indices
    samples: Vector
    believed: float
    doubt: float

    @staticmethod
    def of(problem: Problem, units: Sequence[Options], effects: Vector, believed: float, doubt: float) -> _Table:
        """The columns of a problem; products of different units count by `believed`."""
        sizes = [len(unit.choices) for unit in units]
        number = np.repeat(np.arange(len(units)), sizes)
        gram = effects.T @ effects
        gram[number[:, None] != number] *= believed
        costs = np.concatenate([unit.costs for unit in units])
        start = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        return _Table(start, number, gram, costs, room(problem, units), effects, believed, doubt)

    def loss(self, chosen: Indices) -> float:
        """The model's loss of one column a unit."""
        return float(self.gram[np.ix_(chosen, chosen)].sum())

    def _error(self, chosen: Indices) -> Vector:
        """Standard errors of what each column, chosen alone, changes the loss by; `[columns]`."""
        at, effects, count = chosen[self.unit], self.samples, len(self.samples)
        others = effects[:, chosen].sum(1, keepdims=True) - effects[:, at]
        changes = effects**2 - effects[:, at] ** 2 + 2 * self.believed * (effects - effects[:, at]) * others
        spread: Vector = changes.std(0) * count**0.5
        return spread

    def best(self, chosen: Indices, left: int, fresh: NDArray[np.bool_]) -> list[int]:
        """The columns, one or two, that lower the loss most when chosen; none when nothing lowers it.

        Args:
            left: how many fresh units may still change.
            fresh: `[units]`, whether a unit has its first option.
        """
        gram, at = self.gram, chosen[self.unit]
        pull = gram[:, chosen].sum(1)
        alone = gram.diagonal() + gram.diagonal()[at] - 2 * gram[np.arange(len(at)), at] + 2 * (pull - pull[at])
        if self.doubt:
            alone += self.doubt * self._error(chosen)
        more = self.costs - self.costs[at]
        spare = self.room - self.costs[chosen].sum(0)
        new = fresh[self.unit]
        options = np.flatnonzero((np.arange(len(at)) != at) & (~new | (left >= 1)))
        least, picks = -LEAST, list[int]()
        fitting = options[(more[options] <= spare).all(1)]
        if len(fitting) and alone[fitting].min() < least:
            pick = int(fitting[alone[fitting].argmin()])
            least, picks = float(alone[pick]), [pick]
        # Pairs: what one group frees, another takes.
        frees, takes = options[(more[options] <= 0).all(1)], options[(more[options] > 0).any(1)]
        if len(frees) and len(takes):
            product = gram[np.ix_(frees, takes)] - gram[np.ix_(at[frees], takes)]
            product += gram[np.ix_(at[frees], at[takes])] - gram[np.ix_(frees, at[takes])]
            change = alone[frees][:, None] + alone[takes] + 2 * product
            over = (more[frees][:, None] + more[takes] > spare).any(-1)
            both = new[frees][:, None] & new[takes] if left < 2 else np.zeros_like(over)
            change[over | both | (self.unit[frees][:, None] == self.unit[takes])] = np.inf
            row, column = np.unravel_index(int(change.argmin()), change.shape)
            if change[row, column] < least:
                picks = [int(frees[row]), int(takes[column])]
        return picks
