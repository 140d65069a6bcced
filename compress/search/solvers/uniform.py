"""The uniform baseline: one rule for every head group, the largest that the budget allows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from compress.errors import UserError
from compress.limits import LONGEST
from compress.registry import solvers
from compress.runtime.span import BETA_UNIT, PAGE
from compress.search.problem import Candidate, Problem
from compress.search.solver import Solver
from compress.targets.pruned import PrunedGroup
from compress.targets.window import WindowGroup


@solvers.register("uniform")
class Uniform(Solver):
    """One window for all head groups, as large as the budget allows.

    A budget at one length gives a fixed window. At several lengths a fixed window would be held to the shortest
    and leave bytes unused at the others; the window then grows with the position (unless `elastic` is false), so
    that the baseline has the budget's bytes, or up to a page or two less a group, at every length.
    """

    slots: ClassVar[bool] = True

    sink: Annotated[int, Field(ge=0, le=LONGEST, description="tokens at the start that stay visible")] = 64
    elastic: Annotated[
        bool, Field(description="let the window grow with the position when the budget has several lengths")
    ] = True

    @property
    def sinks(self) -> tuple[int, ...]:
        return (self.sink,)

    def solve(self, problem: Problem) -> list[Candidate]:
        if problem.fits(problem.start):
            return [Candidate(problem.start, note="full everywhere")]
        betas = range(BETA_UNIT) if self.elastic and len(problem.budget_lengths) > 1 else range(1)
        fitting = list(largest_windows(problem, self.sink, betas))
        if not fitting:
            raise UserError(
                f"no uniform window with a sink of {self.sink} tokens meets the budget",
                where="search.budget",
                expected="room for the sink and one page of 64 tokens in every head group",
                found=", ".join(f"{row.limit:,} {row.unit} at length {row.length}" for row in problem.rows),
                fix="raise the budget, or budget at longer inputs",
            )
        lengths, most = problem.budget_lengths, np.maximum(problem.limits, 1)

        def merit(window: WindowGroup) -> tuple[float, int, int, float]:
            span: Any = window.span()
            used = float((problem.costs(problem.free[0][0], [window])[0] / most).min())
            pages = sum(span.page_count(length) for length in lengths)
            seen = sum(min(span.length(length), length) for length in lengths)
            return used, pages, seen, -span.beta

        return [Candidate(problem.uniform(max(fitting, key=merit)), note="largest uniform window")]


def largest_windows(problem: Problem, sink: int, betas: range) -> Iterator[WindowGroup]:
    """For every beta (in 1/1024, ascending), the window with the largest alpha in whole pages that meets the budget.

    A page more of alpha is a page more of cache, and 64 keys, in every head group until everything is visible, so each
    result is maximal on the page grid. A beta gives nothing when it cannot meet the budget, when it needs a negative
    alpha (which would hide their neighbours from the first tokens), or when less than a page is seen at the shortest
    length.
    """
    if not problem.free:
        return
    # Layers that agree in what a group costs, by one of them, and how many groups they have.
    layers = {problem.unit(layer): layer for layer, _ in problem.free}
    counts = Counter(problem.unit(layer) for layer, _ in problem.free)
    removed = problem.total(problem.uniform(PrunedGroup()))

    def fits(window: WindowGroup) -> bool:
        amounts = sum(problem.costs(layers[unit], [window])[0] * count for unit, count in counts.items())
        return bool((removed + amounts <= problem.limits).all())

    lengths = problem.budget_lengths
    most = -(-lengths[-1] // PAGE)  # a larger beta hides nothing more, so that what met no budget meets none again
    for units in betas:
        low, high, middle = -1, most, most
        while low < high:
            if fits(WindowGroup(sink=sink, alpha=middle * PAGE, beta=units / BETA_UNIT)):
                low = middle
            else:
                high = middle - 1
            middle = (low + high + 1) // 2
        if low < 0:
            return
        most = low
        window = WindowGroup(sink=sink, alpha=low * PAGE, beta=units / BETA_UNIT)
        span: Any = window.span()
        if span.length(lengths[0] - 1) >= PAGE:
            yield window
