"""What of a recipe's search section does not go together: its solver, its budget and its refinement."""

from __future__ import annotations

from compress.errors import Problem
from compress.registry import budget_kinds, solvers
from compress.search.budget.budget import Budget
from compress.search.refine.refine import Refine
from compress.search.serve import Serve
from compress.search.solver import Solver
from compress.words import either

Finding = tuple[tuple[str | int, ...], Problem]


def section_problems(
    solver: Solver, budget: Budget, refine: Refine | None, serve: Serve | None = None
) -> list[Finding]:
    """What of a search section does not go together: its solver, its budget, its refinement and its engine."""
    problems: list[Finding] = []
    usable, given = solver.budgets(), list(budget.given())
    of_layers = either(name for name, kind in solvers.items() if kind.chooses_layers)
    removing = either(name for name, kind in solvers.items() if kind.takes_removal)
    for name in given:
        if name not in usable:
            problems.append(
                (
                    ("search", "budget", name),
                    Problem(
                        "this solver cannot meet this kind of budget",
                        f"search.budget.{name}",
                        f"{either(usable)} for `{solver.registered}`",
                        f"`{name}`",
                        f"take {of_layers}, which choose what whole layers become, such as routed heads"
                        if not budget_kinds[name].spent
                        else f"take {removing} with a `removal`, or prune first and search spans with the pruned "
                        "checkpoint as `model`"
                        if solver.spans
                        else f"take {removing} with a `removal`, which removes heads and neurons beside windows",
                    ),
                )
            )
    if not solver.spans and not problems and not set(usable) & set(given):
        problems.append((("search",), Problem("the solver has no budget to meet", "search.budget", either(usable))))
    if not solver.spans and refine is not None:
        problems.append(
            (
                ("search", "refine"),
                Problem(
                    "refinement exchanges spans, and this solver chooses none",
                    "search.refine",
                    fix=f"leave it out, or take {removing} with a `removal`",
                ),
            )
        )
    if serve is not None and (solver.removes or not solver.slots):
        able = either(name for name, kind in solvers.items() if kind.slots)
        problems.append(
            (
                ("search", "serve"),
                Problem(
                    f"`{solver.registered}` with `removal` gives layers other numbers of heads, which no slots divide"
                    if solver.slots
                    else f"`{solver.registered}` decides head group by head group, or what the engine does not serve",
                    "search.serve",
                    f"{able}, without `removal`",
                    fix="take one of these, or leave `serve` out",
                ),
            )
        )
    return problems
