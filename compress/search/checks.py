"""What does not go together in a recipe, and would otherwise show only in a profile or a search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import compress.search.solvers  # noqa: F401  (importing the package registers its solvers)
from compress.errors import Problem, nearest
from compress.search.budget.budget import Budget
from compress.search.solver import Solver


def check_recipe(recipe: Any) -> list[tuple[tuple[str | int, ...], Problem]]:
    """What of a recipe only a profile or a search would find out, as keys and problems."""
    section, calibration, statistics = recipe.search, recipe.calibration, recipe.profile.statistics
    known = [task for task in calibration.documents if hasattr(task, "hides")]
    problems = section_problems(section.solver, section.budget, section.refine)
    grids = {recipe.name_of(each): each.grid for each in statistics if hasattr(each, "grid")}
    if section.solver.spans and not grids and "targets" not in section.solver.scores_read().values():
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


def section_problems(solver: Solver, budget: Budget, refine: Any) -> list[tuple[tuple[str | int, ...], Problem]]:
    """What of a search section does not go together: its solver, its budget and its refinement."""
    problems: list[tuple[tuple[str | int, ...], Problem]] = []
    usable, given = solver.budgets(), list(budget.given())
    for name in given:
        if name not in usable:
            problems.append(
                (
                    ("search", "budget", name),
                    Problem(
                        "this solver cannot meet this kind of budget",
                        f"search.budget.{name}",
                        f"{_listed(usable)} for `{solver.name}`",
                        f"`{name}`",
                        "give `moa` a `removal`, or prune first and search spans with the pruned checkpoint as `model`"
                        if solver.spans
                        else "take `moa` with a `removal`, which removes heads and neurons beside windows",
                    ),
                )
            )
    if not solver.spans and not problems and not set(usable) & set(given):
        problems.append((("search",), Problem("the solver has no budget to meet", "search.budget", _listed(usable))))
    if not solver.spans and refine is not None:
        problems.append(
            (
                ("search", "refine"),
                Problem(
                    "refinement exchanges spans, and this solver chooses none",
                    "search.refine",
                    fix="leave it out, or take `moa` with a `removal`",
                ),
            )
        )
    return problems


def _listed(names: Sequence[str]) -> str:
    return " or ".join(f"`{name}`" for name in names)
