"""The uniform baseline: one rule for every head group, the largest that the budget allows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from compress.errors import UserError
from compress.limits import LONGEST
from compress.registry import solvers
from compress.runtime.span import BETA_UNIT, FULL, PAGE, Span, own_span
from compress.search.problem import CandidatePlan, SearchProblem, Solver, uniform_decision


@solvers.register("uniform")
class Uniform(Solver):
    """One window for all head groups, as large as the budget allows.

    A budget at one length gives a fixed window. At several lengths a fixed window would be held to the shortest
    and leave bytes unused at the others; the window then grows with the position (unless `elastic` is false), so
    that the baseline has the budget's bytes, or up to a page or two less a group, at every length.
    """

    sink: Annotated[int, Field(ge=0, le=LONGEST, description="tokens at the start that stay visible")] = 64
    elastic: Annotated[
        bool, Field(description="let the window grow with the position when the budget has several lengths")
    ] = True

    def solve(self, problem: SearchProblem) -> list[CandidatePlan]:
        """One plan; see `Solver.solve`."""
        if problem.fits(uniform_decision(problem.shape, FULL)):
            return [CandidatePlan(uniform_decision(problem.shape, FULL), note="full everywhere")]
        betas = range(BETA_UNIT) if self.elastic and len(problem.budget_lengths) > 1 else range(1)
        fitting = list(largest_windows(problem, self.sink, betas))
        if not fitting:
            raise UserError(
                f"no uniform window with a sink of {self.sink} tokens meets the budget",
                where="search.budget",
                expected="room for the sink and one page of 64 tokens in every head group",
                found=", ".join(f"{row.most:,} {row.kind} at length {row.length}" for row in problem.rows),
                fix="raise the budget, or budget at longer inputs",
            )
        lengths, rows = problem.budget_lengths, problem.rows

        def merit(span: Span) -> tuple[float, int, int, float]:
            used = min(row.cost(span) / max(row.most, 1) for row in rows)
            pages = sum(span.page_count(length) for length in lengths)
            seen = sum(min(span.length(length), length) for length in lengths)
            return used, pages, seen, -span.beta

        best = max(fitting, key=merit)
        return [CandidatePlan(uniform_decision(problem.shape, best), note="largest uniform window")]


def largest_windows(problem: SearchProblem, sink: int, betas: range) -> Iterator[Span]:
    """For every beta (in 1/1024), the window with the largest alpha in whole pages that meets the budget.

    A page more of alpha is a page more of cache, and 64 keys, in every head group until everything is visible, so each
    result is maximal on the page grid. A beta gives nothing when it cannot meet the budget, when it needs a negative
    alpha (which would hide their neighbours from the first tokens), or when less than a page is seen at the shortest
    length.
    """
    free = sum(native is None for native in problem.shape.native_windows) * problem.shape.kv_heads
    if free == 0:
        return
    natives = [native for native in problem.shape.native_windows if native is not None]
    # What one head group may cost in every row, after the layers that slide by themselves.
    room = []
    for row in problem.rows:
        taken = problem.shape.kv_heads * sum(row.cost(own_span(native)) for native in natives)
        room.append((row, (row.most - taken) // free))

    def fits(span: Span) -> bool:
        return all(row.cost(span) <= most for row, most in room)

    lengths = problem.budget_lengths
    for units in betas:
        beta = units / BETA_UNIT
        low, high = -1, -(-lengths[-1] // PAGE)
        while low < high:
            middle = (low + high + 1) // 2
            if fits(Span(sink, middle * PAGE, beta)):
                low = middle
            else:
                high = middle - 1
        span = Span(sink, low * PAGE, beta)
        if low >= 0 and span.length(lengths[0] - 1) >= PAGE:
            yield span
