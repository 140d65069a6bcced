"""What a search is compared with: uniform windows within the budget, and a plan of the same widths that is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from compress.errors import UserError
from compress.search.choice.removal import Widths, drawn
from compress.search.problem import Candidate, Problem
from compress.search.solver import Solver
from compress.search.solvers.amp import Amp
from compress.search.solvers.streaming import Streaming
from compress.search.solvers.uniform import Uniform

# The uniform plans by name: their solver, and the problem that it is to solve.
UNIFORM: dict[str, Callable[[Problem], tuple[Solver, Problem]]] = {
    "uniform": lambda problem: (Uniform(), problem),
    "uniform-at-longest": lambda problem: (Uniform(), problem.only([max(problem.budget_lengths)])),
    "streaming": lambda problem: (Streaming(), problem),
}
DRAWN = "random"
NAMES = (*UNIFORM, DRAWN)


def uniform_baselines(problem: Problem) -> dict[str, Candidate]:
    """Uniform plans within the budget, by name.

    `uniform` and `streaming` meet it at every length. `uniform-at-longest` is the fixed window that has the budget's
    bytes at the longest length alone: the strongest uniform plan there, which may exceed the budget at shorter
    lengths (with one length it is `uniform`). A baseline that no window fits is left out.
    """
    plans = {}
    for name, solved in UNIFORM.items():
        solver, task = solved(problem)
        try:
            (plans[name],) = solver.solve(task)
        except UserError:
            continue
    return plans


def even_base(problem: Problem, importance: str) -> Problem:
    """The same problem with the same numbers of heads and neurons removed from every layer first, by their scores.

    Beside a plan that removes and windows at once this is the baseline's start: AMP's allocation, then one window.

    Raises:
        UserError: no equal widths meet the budget of parameters.
    """
    if problem.row("parameters") is None:
        return problem
    base = Amp(importance=importance).solve(problem)[0]
    return replace(problem, base=base.layers)


def drawn_baseline(problem: Problem, like: Candidate, seed: int) -> Candidate:
    """The plan of the same widths, and the same targets in each layer, whose units are drawn."""
    picked = drawn(problem, Widths.of(problem, like.layers), seed)
    rows = []
    for layer, asked in zip(picked, like.layers, strict=True):
        targets = iter([asked.groups[group] for group in asked.kept_groups])
        groups = tuple(group if group.removes else next(targets) for group in layer.groups)
        rows.append(layer.model_copy(update={"groups": groups}))
    return Candidate(tuple(rows), note=f"drawn with seed {seed}")


def baselines_of(solver: Solver, problem: Problem) -> Mapping[str, Candidate]:
    """The uniform baselines of a solver that chooses spans, on what an even removal leaves where it removes, too."""
    if not solver.spans:
        return {}
    if solver.ranks is not None:
        try:
            problem = even_base(problem, solver.ranks)
        except UserError:  # no equal widths meet the budget, so there is no uniform plan
            return {}
    return uniform_baselines(problem)
