"""What does not go together in a recipe, and would otherwise show only in a profile or a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import compress.search.solvers  # noqa: F401  (importing the package registers its solvers)
from compress.errors import Problem, UserError, nearest
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


def check_recipe(recipe: Any) -> list[tuple[tuple[str | int, ...], Problem]]:
    """What of a recipe only a profile or a search would find out, as keys and problems."""
    section, calibration, statistics = recipe.search, recipe.calibration, recipe.profile.statistics
    known = [task for task in calibration.documents if hasattr(task, "hides")]
    problems = kind_problems(section.solver, section.budget, section.refine)
    grids = {recipe.name_of(each): each.grid for each in statistics if hasattr(each, "grid")}
    if isinstance(section.solver, Solver) and not grids:
        problems.append(
            (
                ("profile", "statistics"),
                Problem(
                    "no statistic prices rules, of which a span search chooses",
                    expected="`influence`, `hidden_mass` or `retrieval`",
                    fix="add `{name: influence}`",
                ),
            )
        )
    if len(set(grids.values())) > 1:
        problems.append(
            (
                ("profile", "statistics"),
                Problem(
                    "the statistics price different span grids",
                    expected="one grid",
                    found="; ".join(f"{name}: {grid!r}" for name, grid in grids.items()),
                    fix="give every statistic the same `grid`, or leave it out everywhere",
                ),
            )
        )
    reads = [getattr(each, "reads", "projections") for each in statistics]
    if calibration.second is not None and "projections" not in reads:
        problems.append(
            (
                ("calibration", "second"),
                Problem(
                    "no statistic is measured on a second corpus",
                    expected="an importance statistic that reads documents: amp, flap, taylor or wanda_sp",
                    found=", ".join(recipe.name_of(each) for each in statistics),
                    fix="leave `calibration.second` out, or add such a statistic",
                ),
            )
        )
    learnt = [task.task for task in (calibration.training or calibration.documents) if hasattr(task, "hides")]
    for number, statistic in enumerate(statistics):
        trained = getattr(statistic, "task", None)
        if trained is not None and learnt and trained not in learnt:
            problems.append(
                (
                    ("profile", "statistics", number),
                    Problem(
                        f"there are no documents of task `{trained}` to train on",
                        expected=f"`- {{task: {trained}, ...}}` in `calibration.training`",
                        found=", ".join(sorted(set(learnt))),
                        fix=nearest(trained, learnt) or "add such documents, or set `task` to null to train on all",
                    ),
                )
            )
    return problems + _without_evidence(section.solver, known) + _unknown_weights(section.refine, calibration)


def _without_evidence(solver: Any, documents: Sequence[Any]) -> list[tuple[tuple[str | int, ...], Problem]]:
    """Lengths at which a solver reads where evidence lies, and no document hides anything."""
    lengths = {task.length for task in documents}
    hiding = {task.length for task in documents if task.hides}
    read = solver.scores_read()
    if read.get("retrieval.lost"):
        lacking = lengths - hiding
    else:
        lacking = lengths if "retrieval" in read and not hiding else set()
    if not lacking:
        return []
    return [
        (
            ("search", "solver"),
            Problem(
                "the solver reads what heads retrieve, and no document hides anything to retrieve",
                expected="a task as `passkey` among `calibration.documents`"
                + (", at every length" if read.get("retrieval.lost") else ""),
                found=f"none at {', '.join(f'{length:,} tokens' for length in sorted(lacking))}",
            ),
        )
    ]


def _unknown_weights(refine: Any, calibration: Any) -> list[tuple[tuple[str | int, ...], Problem]]:
    """Weights of tasks that a refinement has no documents of."""
    known = {task.task for task in (*calibration.documents, *calibration.training) if hasattr(task, "hides")}
    unknown = sorted(set(getattr(refine, "weights", ())) - known)
    if not unknown or not known:
        return []
    return [
        (
            ("search", "refine", "weights"),
            Problem(
                f"there are no documents of task {', '.join(unknown)} to weigh",
                expected=f"some of {', '.join(sorted(known))}",
                fix=nearest(unknown[0], known),
            ),
        )
    ]


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
