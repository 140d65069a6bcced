"""The exchange of rules between head groups that a quadratic model of the loss likes best, within budget and radius."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from compress.runtime.span import Span, own_span
from compress.search.choice.options import costs_of
from compress.search.problem import SearchProblem
from compress.search.refine.effects import Rules

Decision = tuple[tuple[Span, ...], ...]
Vector = NDArray[np.float64]
Indices = NDArray[np.int64]

LEAST = 1e-12  # a change of the model below this is rounding


def exchange(
    problem: SearchProblem, decision: Decision, rules: Rules, effects: torch.Tensor, radius: int, believed: float
) -> tuple[Decision, float, float]:
    """The exchange of at most `radius` groups that lowers the model most, by single moves and pairs of them, greedily.

    Args:
        decision: within the budget, of `rules` in every group.
        rules: `[layers][rules][groups]`.
        effects: `[samples, layers, groups, rules]`; the model's loss is the sum over samples of the squared sum over
            groups.
        believed: share of the interactions between groups that counts, 0 to 1.

    Returns:
        The new decision, and the model's loss of the old and the new one.
    """
    table = _Table.of(problem, rules, effects, believed)
    first = table.places(decision)
    chosen = first.copy()
    before = table.loss(chosen)
    while picks := table.best(chosen, left=radius - int((chosen != first).sum()), fresh=chosen == first):
        for pick in picks:
            chosen[table.group[pick]] = pick
    return table.decision(chosen, decision), before, table.loss(chosen)


@dataclass(frozen=True)
class _Table:
    """All rules of all groups that can change, one column each, group by group.

    Attributes:
        free: (layer, group) of each group.
        spans: rules of each group.
        group: `[columns]`, the group of a column.
        gram: `[columns, columns]` products of the effects; two rules chosen add twice theirs to the loss.
        costs: `[columns, rows of the budget]`.
        room: `[rows]`, what the columns may cost together.
    """

    free: list[tuple[int, int]]
    spans: list[list[Span]]
    group: Indices
    gram: Vector
    costs: Indices
    room: Indices

    @staticmethod
    def of(problem: SearchProblem, rules: Rules, effects: torch.Tensor, believed: float) -> _Table:
        """The columns of a problem; products of different groups count by `believed`."""
        shape = problem.shape
        natives = [own_span(native) for native in shape.native_windows if native is not None]
        free = [
            (layer, group)
            for layer, native in enumerate(shape.native_windows)
            if native is None
            for group in range(shape.kv_heads)
        ]
        spans = [[row[group] for row in rules[layer]] for layer, group in free]
        number = np.repeat(np.arange(len(free)), len(rules[0]))
        vectors = np.concatenate([effects[:, layer, group].double().numpy() for layer, group in free], axis=1)
        gram = vectors.T @ vectors
        gram[number[:, None] != number] *= believed
        taken = shape.kv_heads * costs_of(natives, problem).sum(0) if natives else 0
        room = np.array([row.most for row in problem.rows]) - taken
        return _Table(free, spans, number, gram, np.concatenate([costs_of(each, problem) for each in spans]), room)

    def places(self, decision: Decision) -> Indices:
        """The column of every group's rule."""
        width = len(self.spans[0])
        own = [each.index(decision[layer][group]) for (layer, group), each in zip(self.free, self.spans, strict=True)]
        return np.arange(len(self.free)) * width + np.array(own)

    def decision(self, chosen: Indices, old: Decision) -> Decision:
        """The decision of some columns; what cannot change is that of `old`."""
        rows = [list(row) for row in old]
        for (layer, group), each, column in zip(self.free, self.spans, chosen, strict=True):
            rows[layer][group] = each[column % len(each)]
        return tuple(tuple(row) for row in rows)

    def loss(self, chosen: Indices) -> float:
        """The model's loss of one column a group."""
        return float(self.gram[np.ix_(chosen, chosen)].sum())

    def best(self, chosen: Indices, left: int, fresh: NDArray[np.bool_]) -> list[int]:
        """The columns, one or two, that lower the loss most when chosen; none when nothing lowers it.

        Args:
            left: how many fresh groups may still change.
            fresh: `[groups]`, whether a group has its first rule.
        """
        gram, at = self.gram, chosen[self.group]
        pull = gram[:, chosen].sum(1)
        alone = gram.diagonal() + gram.diagonal()[at] - 2 * gram[np.arange(len(at)), at] + 2 * (pull - pull[at])
        more = self.costs - self.costs[at]
        spare = self.room - self.costs[chosen].sum(0)
        new = fresh[self.group]
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
            change[over | both | (self.group[frees][:, None] == self.group[takes])] = np.inf
            row, column = np.unravel_index(int(change.argmin()), change.shape)
            if change[row, column] < least:
                picks = [int(frees[row]), int(takes[column])]
        return picks
