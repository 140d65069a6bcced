"""The rules worth considering for each head group, with their losses and costs, dominated ones removed exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from compress.errors import UserError
from compress.runtime.span import FULL, Span, own_span
from compress.search.problem import SearchProblem
from compress.targets.window import Rule

if TYPE_CHECKING:
    import torch

BLOCK = 128  # rows compared at once, so that memory stays at BLOCK x kept rows


@dataclass(frozen=True)
class Objective:
    """One loss to minimise: the profile's table `influence.<kind>.<length>`, with `retrieval.lost.<length>` besides.

    Attributes:
        kind: which influence: absolute, signed or joint.
        length: the profiled length in tokens.
        retrieval: weight of the evidence that rules are expected to hide. Both tables are scaled to what the smallest
            rule in every group loses, so 1 weighs them alike; the sum keeps influence's unit.
    """

    kind: str
    length: int
    retrieval: float = 0.0

    @property
    def name(self) -> str:
        """How the objective is called in files, for instance `absolute.2048`."""
        return f"{self.kind}.{self.length}"

    @property
    def key(self) -> str:
        """The influence tensor of the profile."""
        return f"influence.{self.name}"

    @property
    def retrieval_key(self) -> str:
        """The tensor of the evidence that rules hide."""
        return f"retrieval.lost.{self.length}"


@dataclass(frozen=True)
class GroupCandidates:
    """The rules of one head group that no other rule beats everywhere.

    Attributes:
        spans: the rules; FULL is always among them.
        losses: `[rules, objectives]`, in the table's unit.
        costs: `[rules, rows]`, what the group costs in every row of the budget (`SearchProblem.rows`).
    """

    layer: int
    group: int
    spans: tuple[Span, ...]
    losses: NDArray[np.float64]
    costs: NDArray[np.int64]


def nondominated(rows: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices of the rows that no other row is at most equal to in every column; ascending.

    Of equal rows the first is kept. Exact: rows are visited in lexicographic order, in which a row can only be
    dominated by an earlier one, and compared with all that were kept.

    Args:
        rows: `[rows, columns]`, smaller is better in every column.
    """
    order = np.lexsort((np.arange(len(rows)), *rows.T[::-1]))
    kept: NDArray[np.int64] = np.empty(0, dtype=np.int64)
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        beaten = (rows[kept][:, None] <= rows[block][None]).all(-1).any(0)
        block = block[~beaten]
        inside = (rows[block][:, None] <= rows[block][None]).all(-1)
        block = block[~np.triu(inside, 1).any(0)]
        kept = np.concatenate([kept, block])
    return np.sort(kept)


def rule_losses(table: torch.Tensor, rules: Sequence[Rule]) -> NDArray[np.float64]:
    """Losses `[layers, kv_heads, rules]` out of an influence table `[layers, kv_heads, sinks, betas, alphas]`.

    Full attention, and alphas beyond the table's last (which already hides nothing at the table's length), are 0.
    """
    values = table.double().numpy()
    losses = np.zeros((*values.shape[:2], len(rules)))
    for number, rule in enumerate(rules):
        if rule.index is not None and rule.index[2] < values.shape[4]:
            losses[:, :, number] = values[:, :, *rule.index]
    return losses


def build_candidates(problem: SearchProblem, objectives: Sequence[Objective]) -> list[GroupCandidates]:
    """Candidates of every head group, layer by layer.

    A layer with a sliding window of its own has only `full`, which there means the model's own window.

    Raises:
        UserError: a table is missing, does not have the shape that model and grid ask for, or is not finite.
    """
    shape = problem.shape
    rules = problem.grid.rules(max(problem.lengths))
    # What sees most comes first, so that of two rules that are equal at all known lengths the more careful one stays.
    rules = rules[:1] + sorted(rules[1:], key=lambda rule: (-rule.span.beta, -rule.span.alpha, -rule.span.sink))
    losses = np.stack([rule_losses(_table(problem, objective), rules) for objective in objectives], axis=-1)
    costs = _costs([rule.span for rule in rules], problem)
    candidates = []
    for layer, native in enumerate(shape.native_windows):
        for group in range(shape.kv_heads):
            if native is not None:
                zero = np.zeros((1, len(objectives)))
                candidates.append(GroupCandidates(layer, group, (FULL,), zero, _costs([own_span(native)], problem)))
                continue
            own = losses[layer, group]
            kept = nondominated(np.concatenate([own, costs], axis=1))
            if kept[0] != 0:
                kept = np.concatenate([[0], kept])
            spans = tuple(rules[index].span for index in kept)
            candidates.append(GroupCandidates(layer, group, spans, own[kept], costs[kept]))
    return candidates


def _costs(spans: Sequence[Span], problem: SearchProblem) -> NDArray[np.int64]:
    rows = problem.rows
    return np.array([[row.cost(span) for row in rows] for span in spans], dtype=np.int64)


def _table(problem: SearchProblem, objective: Objective) -> torch.Tensor:
    """The loss of every rule, `[layers, kv_heads, sinks, betas, alphas]`."""
    influence = _checked(problem, objective.key, objective.length)
    if objective.retrieval == 0:
        return influence
    lost = _checked(problem, objective.retrieval_key, objective.length)
    # The first sink, beta and alpha are the smallest rule. Signed influence may be negative, so its size is taken.
    most, most_lost = (table[:, :, 0, 0, 0].abs().sum() for table in (influence, lost))
    if not most_lost > 0:
        raise UserError(
            "no rule hides any evidence, so retrieval has nothing to weigh",
            where=f"profile: {objective.retrieval_key}",
            expected="recall documents whose evidence lies beyond the smallest window",
            fix="profile longer recall documents, or set the solver's `retrieval` to 0",
        )
    return influence + objective.retrieval * (most / most_lost) * lost


def _checked(problem: SearchProblem, key: str, length: int) -> torch.Tensor:
    """One rule table, checked against model and grid."""
    table = problem.tensor(key)
    shape, grid = problem.shape, problem.grid
    expected = (
        shape.layers,
        shape.kv_heads,
        len(grid.sinks),
        len(grid.betas),
        len(grid.alphas(length)),
    )
    if tuple(table.shape) != expected:
        raise UserError(
            "a rule table does not fit the model and the span grid",
            where=f"profile: {key}",
            expected=f"shape {list(expected)}",
            found=f"shape {list(table.shape)}",
            fix="profile again with `--overwrite`",
        )
    if not bool(table.isfinite().all()):
        raise UserError(
            "a rule table has values that are not finite",
            where=f"profile: {key}",
            fix="profile again in float32",
        )
    return table.cpu()
