"""What every solver gets and gives: the search problem, a candidate plan, and the base class of solvers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from compress.plan import Group, Plan, Predicted, make_plan
from compress.registry import Method, solvers
from compress.runtime.span import FULL, AnySpan, Span
from compress.search.budget import dense_bytes, effective_spans
from compress.targets.cost import kv_bytes, page_bytes
from compress.targets.full import FullGroup
from compress.targets.window import SpanGrid, WindowGroup

if TYPE_CHECKING:
    import torch

    from compress.models.shape import ModelShape

Decision = tuple[tuple[AnySpan, ...], ...]


@dataclass(frozen=True)
class SearchProblem:
    """One model, what its profile measured, and the budget.

    Attributes:
        grid: the rules that the profile priced.
        lengths: profiled lengths in tokens, ascending.
        tensor: reads a tensor of the profile by key, for instance `influence.absolute.2048`.
        limits: KV bytes allowed for one sequence, by length in tokens.
        itemsize: bytes of one cached number.
    """

    shape: ModelShape
    grid: SpanGrid
    lengths: tuple[int, ...]
    tensor: Callable[[str], torch.Tensor]
    limits: Mapping[int, int]
    itemsize: int

    @property
    def page_limits(self) -> dict[int, int]:
        """Whole cache pages allowed over all head groups, by length."""
        page = page_bytes(self.shape.head_dim, self.itemsize)
        return {length: limit // page for length, limit in self.limits.items()}

    def only(self, lengths: Sequence[int]) -> SearchProblem:
        """The same problem with the budget at some of its lengths."""
        return replace(self, limits={length: self.limits[length] for length in lengths})

    def kv_bytes(self, decision: Decision, lengths: Sequence[int] | None = None) -> dict[int, int]:
        """KV bytes of a decision, by length; at the budget's lengths by default."""
        spans = effective_spans(self.shape, decision)
        return {
            length: kv_bytes(spans, length, self.shape.head_dim, self.itemsize) for length in lengths or self.limits
        }

    def fits(self, decision: Decision) -> bool:
        """Whether a decision meets the budget at every length."""
        return all(size <= self.limits[length] for length, size in self.kv_bytes(decision).items())


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
        """The plan file of this decision, with its KV bytes at the budget's and the profiled lengths."""
        lengths = sorted({*problem.limits, *problem.lengths})
        predicted = Predicted(
            kv_bytes=problem.kv_bytes(self.decision, lengths),
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

    @abstractmethod
    def solve(self, problem: SearchProblem) -> list[CandidatePlan]:
        """One or more plans that meet the budget at every length, none dominated by another.

        The same problem gives the same plans. Which of several is used is decided by measurement afterwards.

        Raises:
            UserError: no plan meets the budget, or the profile lacks a statistic that the solver needs.
        """


def solver_name(solver: Solver) -> str:
    """The name under which a solver's class is registered."""
    return next(name for name, known in solvers.items() if known is type(solver))
