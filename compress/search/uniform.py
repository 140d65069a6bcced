"""The uniform baseline: one rule for every head group, the largest that the budget allows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from compress.errors import UserError
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

    sink: Annotated[int, Field(ge=0, description="tokens at the start that stay visible")] = 64
    elastic: Annotated[
        bool, Field(description="let the window grow with the position when the budget has several lengths")
    ] = True

    def solve(self, problem: SearchProblem) -> list[CandidatePlan]:
        """One plan; see `Solver.solve`."""
        if problem.fits(uniform_decision(problem.shape, FULL)):
            return [CandidatePlan(uniform_decision(problem.shape, FULL), note="full everywhere")]
        betas = range(BETA_UNIT) if self.elastic and len(problem.limits) > 1 else range(1)
        fitting = list(largest_windows(problem, self.sink, betas))
        if not fitting:
            raise UserError(
                f"no uniform window with a sink of {self.sink} tokens meets the budget",
                where="search.budget",
                expected="room for the sink and one page of 64 tokens in every head group",
                found=", ".join(f"{limit:,} bytes at length {length}" for length, limit in problem.limits.items()),
                fix="raise the budget, or budget at longer inputs",
            )
        lengths = list(problem.limits)
        limits = problem.page_limits

        def merit(span: Span) -> tuple[float, int, int, float]:
            pages = [span.page_count(length) for length in lengths]
            used = min(count / max(limits[length], 1) for count, length in zip(pages, lengths, strict=True))
            seen = sum(min(span.length(length), length) for length in lengths)
            return used, sum(pages), seen, -span.beta

        best = max(fitting, key=merit)
        return [CandidatePlan(uniform_decision(problem.shape, best), note="largest uniform window")]


def largest_windows(problem: SearchProblem, sink: int, betas: range) -> Iterator[Span]:
    """For every beta (in 1/1024), the window with the largest alpha in whole pages that meets the budget.

    A page more of alpha is a page more of cache in every head group until everything is visible, so each result is
    maximal on the page grid. A beta gives nothing when it cannot meet the budget, when it needs a negative alpha
    (which would hide their neighbours from the first tokens), or when less than a page is seen at the shortest
    length.
    """
    free = sum(native is None for native in problem.shape.native_windows) * problem.shape.kv_heads
    if free == 0:
        return
    natives = [native for native in problem.shape.native_windows if native is not None]
    # Pages for one head group at every length, after the layers that slide by themselves.
    room = {}
    for length, pages in problem.page_limits.items():
        taken = problem.shape.kv_heads * sum(own_span(native).page_count(length) for native in natives)
        room[length] = (pages - taken) // free

    def fits(span: Span) -> bool:
        return all(span.page_count(length) <= pages for length, pages in room.items())

    for units in betas:
        beta = units / BETA_UNIT
        low, high = -1, -(-max(room) // PAGE)
        while low < high:
            middle = (low + high + 1) // 2
            if fits(Span(sink, middle * PAGE, beta)):
                low = middle
            else:
                high = middle - 1
        span = Span(sink, low * PAGE, beta)
        if low >= 0 and span.length(min(room) - 1) >= PAGE:
            yield span
