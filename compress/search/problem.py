"""What every solver gets and gives: the search problem, a candidate plan, and the base class of solvers."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from compress.plan import Group, Plan, Predicted, make_plan
from compress.registry import Method, solvers
from compress.runtime.span import FULL, AnySpan, Span
from compress.search.budget.budget import dense_bytes, effective_spans
from compress.search.budget.step_time import TimeLimit
from compress.targets.cost import kv_bytes, page_bytes, visible_keys
from compress.targets.full import FullGroup
from compress.targets.window import SpanGrid, WindowGroup

if TYPE_CHECKING:
    import torch

    from compress.plan import ModelShape

Decision = tuple[tuple[AnySpan, ...], ...]


@dataclass(frozen=True)
class Row:
    """One constraint: what all head groups together may cost at one length, in whole numbers.

    Attributes:
        kind: what is counted for every group, cache pages or the keys that the last query sees.
        most: the sum that is allowed.
    """

    kind: Literal["pages", "keys"]
    length: int
    most: int

    def cost(self, span: AnySpan) -> int:
        """What one head group of this span costs."""
        return (
            span.at_length(self.length).page_count(self.length)
            if self.kind == "pages"
            else visible_keys(span, self.length)
        )


@dataclass(frozen=True)
class SearchProblem:
    """One model, what its profile measured, and the budget.

    Attributes:
        grid: the rules that the profile priced.
        lengths: profiled lengths in tokens, ascending.
        tensor: reads a tensor of the profile by key, for instance `influence.absolute.2048`.
        limits: KV bytes that the budget's `kv` allows for one sequence, by length in tokens.
        itemsize: bytes of one cached number.
        key_limits: keys that the last query may see over all head groups (`density`), by length.
        times: the limit of the decode time, which is one of KV bytes, too; None without one.
    """

    shape: ModelShape
    grid: SpanGrid
    lengths: tuple[int, ...]
    tensor: Callable[[str], torch.Tensor]
    limits: Mapping[int, int]
    itemsize: int
    key_limits: Mapping[int, int] = field(default_factory=dict)
    times: TimeLimit | None = None

    @property
    def byte_limits(self) -> dict[int, int]:
        """KV bytes allowed for one sequence by `kv` and `decode_time` together, by length, ascending."""
        timed = self.times.limits if self.times is not None else {}
        return {
            length: min(limits[length] for limits in (self.limits, timed) if length in limits)
            for length in sorted({*self.limits, *timed})
        }

    @property
    def rows(self) -> list[Row]:
        """Every constraint: whole cache pages by length, then visible keys by length."""
        page = page_bytes(self.shape.head_dim, self.itemsize)
        pages = [Row("pages", length, limit // page) for length, limit in self.byte_limits.items()]
        return pages + [Row("keys", length, limit) for length, limit in sorted(self.key_limits.items())]

    @property
    def budget_lengths(self) -> list[int]:
        """The lengths at which anything is limited, ascending."""
        return sorted({row.length for row in self.rows})

    def only(self, lengths: Sequence[int]) -> SearchProblem:
        """The same problem with the budget at some of its lengths."""
        return replace(
            self,
            limits={length: limit for length, limit in self.limits.items() if length in lengths},
            key_limits={length: limit for length, limit in self.key_limits.items() if length in lengths},
            times=None if self.times is None else self.times.only(lengths),
        )

    def kv_bytes(self, decision: Decision, lengths: Sequence[int] | None = None) -> dict[int, int]:
        """KV bytes of a decision, by length; at the budget's lengths by default."""
        spans = effective_spans(self.shape, decision)
        return {
            length: kv_bytes(spans, length, self.shape.head_dim, self.itemsize)
            for length in lengths or self.budget_lengths
        }

    def fits(self, decision: Decision) -> bool:
        """Whether a decision meets the budget in every row."""
        counts = Counter(span for row in effective_spans(self.shape, decision) for span in row)
        return all(sum(number * row.cost(span) for span, number in counts.items()) <= row.most for row in self.rows)


@dataclass(frozen=True)
class CandidatePlan:
    """One decision of a solver.

    Attributes:
        decision: span of every head group, `[layers][kv_heads]`; FULL in layers that slide by themselves.
        losses: predicted loss by objective, for instance `{"absolute.2048": 0.3}`; empty for a baseline.
        gap: how far the solved objective is from the proven optimum at most, relative; None for a baseline.
        note: which of the solver's questions this plan answers.
    """

    decision: Decision
    losses: dict[str, float] = field(default_factory=dict)
    gap: float | None = None
    note: str = ""

    def groups(self) -> list[list[Group]]:
        """The targets of the plan file."""
        return [[group_of(span) for span in row] for row in self.decision]

    def to_plan(self, problem: SearchProblem, provenance: dict[str, Any]) -> Plan:
        """The plan file of this decision, with its KV bytes at the budget's and the profiled lengths.

        Under a `decode_time` the provenance also has the predicted times.
        """
        lengths = sorted({*problem.budget_lengths, *problem.lengths})
        sizes = problem.kv_bytes(self.decision, lengths)
        if problem.times is not None:
            provenance = {**provenance, "decode_time": problem.times.report(sizes)}
        predicted = Predicted(
            kv_bytes=sizes,
            dense_kv_bytes={length: dense_bytes(problem.shape, length, problem.itemsize) for length in lengths},
            loss=list(self.losses.values())[-1] if self.losses else None,
        )
        return make_plan(problem.shape, self.groups(), predicted=predicted, provenance=provenance)


def group_of(span: AnySpan) -> Group:
    """The plan's target for a span."""
    if span.is_full:
        return FullGroup()
    return WindowGroup(sink=span.sink, alpha=span.alpha, beta=span.beta, rule=span.rule)


def positional(decision: Sequence[Sequence[AnySpan]]) -> tuple[tuple[Span, ...], ...] | None:
    """The decision when all of its rules go by position; None when one goes by the length of the input."""
    spans = tuple(tuple(span for span in row if span.rule == "position") for row in decision)
    return spans if [len(row) for row in spans] == [len(row) for row in decision] else None


def uniform_decision(shape: ModelShape, span: Span) -> Decision:
    """One span in every head group, except in layers that slide by themselves."""
    return tuple((span if native is None else FULL,) * shape.kv_heads for native in shape.native_windows)


class Solver(Method):
    """Base of every solver: its fields are recipe keys, and `solve` answers a problem."""

    def check(self, problem: SearchProblem) -> None:
        """Raise UserError where no plan meets the budget whatever the profile's tables say; `tensor` gives none."""
        if "rules" not in self.scores_read().values():
            self.solve(problem)

    @abstractmethod
    def solve(self, problem: SearchProblem) -> list[CandidatePlan]:
        """One or more plans that meet the budget at every length, none dominated by another.

        The same problem gives the same plans. Which of several is used is decided by measurement afterwards.

        Raises:
            UserError: no plan meets the budget, or the profile lacks a statistic that the solver needs.
        """


def solver_name(solver: Method) -> str:
    """The name under which a solver's class is registered."""
    return next(name for name, known in solvers.items() if known is type(solver))
