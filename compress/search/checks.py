"""What does not go together in a recipe, and would otherwise show only in a profile or a search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import compress.search.solvers  # noqa: F401  (importing the package registers its solvers)
from compress.errors import Problem, UserError
from compress.registry import solvers
from compress.search.problem import Solver, solver_name
from compress.search.removal import PruningSolver


def parse_solver(value: Any) -> Any:
    """A `Solver` or `PruningSolver` from its recipe form, `{name: moa, points: 4}`; either is returned as it is.

    Raises:
        UserError: no name, or an unknown one.
        pydantic.ValidationError: a wrong parameter.
    """
    if isinstance(value, Solver | PruningSolver):
        return value
    if not isinstance(value, Mapping) or "name" not in value:
        raise UserError(
            "the solver has no name",
            where="search.solver",
            expected=f"a mapping with name: one of {', '.join(solvers)}",
            found=repr(value),
        )
    fields = {key: item for key, item in value.items() if key != "name"}
    solver: Solver | PruningSolver = solvers[value["name"]](**fields)
    return solver


def kind_problems(solver: Any, budget: Any, refine: Any) -> list[tuple[tuple[str | int, ...], Problem]]:
    """What of a search section does not go together: its solver, its budget and its refinement."""
    prunes = isinstance(solver, PruningSolver)
    problems: list[tuple[tuple[str | int, ...], Problem]] = []
    if isinstance(solver, Solver | PruningSolver) and prunes != (getattr(budget, "parameters", None) is not None):
        problems.append(
            (
                ("search",),
                Problem(
                    "the solver and the budget do not belong together",
                    "search",
                    "`budget: {parameters: ...}` for this solver"
                    if prunes
                    else "a solver that prunes, as `amp`, for `budget: {parameters: ...}`",
                    f"solver `{solver_name(solver)}`",
                ),
            )
        )
    if prunes and refine is not None:
        problems.append(
            (
                ("search", "refine"),
                Problem(
                    "refinement exchanges spans, and a pruned plan has none",
                    "search.refine",
                    fix="leave it out; search spans afterwards with the pruned checkpoint as `model`",
                ),
            )
        )
    return problems
