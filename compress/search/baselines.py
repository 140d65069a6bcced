"""What a search is compared with: uniform windows within the budget, a plan that is drawn, and layers taken in turn."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

from compress.errors import UserError
from compress.search.choice.removal import drawn, widths_of
from compress.search.problem import FULL_GROUP, Candidate, Place, Problem
from compress.search.solver import Solver
from compress.search.solvers.amp import Amp
from compress.search.solvers.streaming import Streaming
from compress.search.solvers.uniform import Uniform
from compress.targets.target import Target

# The uniform plans by name: their solver, and the problem that it is to solve.
UNIFORM: dict[str, Callable[[Problem], tuple[Solver, Problem]]] = {
    "uniform": lambda problem: (Uniform(), problem),
    "uniform-at-longest": lambda problem: (Uniform(), problem.only([max(problem.budget_lengths)])),
    "streaming": lambda problem: (Streaming(), problem),
}
DRAWN, INTERLEAVED = "random", "interleaved"
NAMES = (*UNIFORM, DRAWN, INTERLEAVED)


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
    picked = drawn(problem, widths_of(problem, like.layers), seed)
    rows = []
    for layer, asked in zip(picked, like.layers, strict=True):
        targets = iter([asked.groups[group] for group in asked.kept_groups])
        groups = tuple(group if group.removes else next(targets) for group in layer.groups)
        rows.append(layer.model_copy(update={"groups": groups}))
    return Candidate(tuple(rows), note=f"drawn with seed {seed}")


def drawn_places(problem: Problem, like: Candidate, seed: int) -> Candidate:
    """The plan of the same targets, each as often, whose places among the head groups that may change are drawn."""
    targets = [like.layers[layer].groups[group] for layer, group in problem.free]
    random.Random(seed).shuffle(targets)
    placed = dict(zip(problem.free, targets, strict=True))
    return Candidate(
        problem.with_targets(placed.__getitem__), note=f"the same targets in places drawn with seed {seed}"
    )


def interleaved(problem: Problem, like: Candidate) -> Candidate | None:
    """The layer hybrid: every n-th layer full, all others the target that a plan has most often beside full attention.

    As many layers are full, evenly spread, as cost no more than that plan in every row of the budget. None where the
    plan has no such target, or where it alone in every layer costs more.
    """
    counts = Counter(like.layers[layer].groups[group] for layer, group in problem.free)
    others = [target for target, _ in counts.most_common() if not target.as_built and not target.removes]
    if not others:
        return None
    layers, most = sorted({layer for layer, _ in problem.free}), problem.total(like.layers)
    for full in range(len(layers), -1, -1):
        # The last of every stretch of layers.
        kept = {layers[(number + 1) * len(layers) // full - 1] for number in range(full)}
        plan = problem.with_targets(_hybrid(kept, others[0]))
        if bool((problem.total(plan) <= most).all()):
            return Candidate(plan, note=f"{full} of {len(layers)} layers full, the others {others[0].words()}")
    return None


def _hybrid(full: set[int], other: Target) -> Callable[[Place], Target]:
    return lambda place: FULL_GROUP if place[0] in full else other


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
