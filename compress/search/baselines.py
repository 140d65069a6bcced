"""What a search is compared with: uniform windows within the budget, a plan that is drawn, and layers taken in turn."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from compress.errors import UserError
from compress.models.families import check_pruning
from compress.profile.worth import worth_of
from compress.search.budget.budget import Budget
from compress.search.choice.removal import PRUNED, drawn, top, widths_of
from compress.search.choice.whole import WholeLayers
from compress.search.problem import FULL_GROUP, Candidate, Place, Problem
from compress.search.solver import Solver
from compress.search.solvers.amp import Amp
from compress.search.solvers.even import evenly
from compress.search.solvers.shares import kinds_of, one_score, one_threshold, same_share
from compress.search.solvers.streaming import Streaming
from compress.search.solvers.uniform import Uniform
from compress.targets.target import Target, layer_cost

# The uniform plans by name: their solver, and the problem that it is to solve.
UNIFORM: dict[str, Callable[[Problem], tuple[Solver, Problem]]] = {
    "uniform": lambda problem: (Uniform(), problem),
    "uniform-at-longest": lambda problem: (Uniform(), problem.only([max(problem.budget_lengths)])),
    "streaming": lambda problem: (Streaming(), problem),
}
DRAWN, INTERLEAVED = "random", "interleaved"
EVEN, CHANCE, PRUNED_ALIKE = "even", "random-routing", "static-pruning"  # beside plans with routed layers
SAME_SHARE, ONE_THRESHOLD = "uniform-share", "global-threshold"  # beside plans with heads that keep tokens
ONE_SCORE = "global-score"  # what a refinement may start from, too
NAMES = (*UNIFORM, DRAWN, INTERLEAVED, EVEN, CHANCE, PRUNED_ALIKE, SAME_SHARE, ONE_THRESHOLD)
# What ranks the heads that a static pruning keeps, where no option of layers says it, the first that was measured.
RANKS = ("taylor", "removal", "wanda_sp", "flap", "amp")


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
    """The plan of the same targets, each as often, whose places among the head groups that may change are drawn; what
    the groups of a layer became together, among the layers."""
    chance = random.Random(seed)
    free = sorted({layer for layer, _ in problem.free})
    if any(group.by_layer for layer in like.layers for group in layer.groups):
        drawn_layers = [like.layers[layer].groups for layer in free]
        chance.shuffle(drawn_layers)
        plan = problem.with_layers(dict(zip(free, drawn_layers, strict=True)))
        return Candidate(plan, note=f"the same layers in places drawn with seed {seed}")
    targets = [problem.anywhere(like.layers[layer].groups[group]) for layer, group in problem.free]
    chance.shuffle(targets)
    placed = dict(zip(problem.free, targets, strict=True))
    return Candidate(
        problem.with_targets(placed.__getitem__), note=f"the same targets in places drawn with seed {seed}"
    )


def interleaved(problem: Problem, like: Candidate) -> Candidate | None:
    """The layer hybrid: every n-th layer full, all others the target that a plan has most often beside full attention.

    As many layers are full, evenly spread, as cost no more than that plan in every row of the budget. None where the
    plan has no such target, or where it alone in every layer costs more.
    """
    counts = Counter(problem.anywhere(like.layers[layer].groups[group]) for layer, group in problem.free)
    others = [
        target
        for target, _ in counts.most_common()
        if not target.as_built and not target.removes and not target.by_layer
    ]
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


def even_layers(problem: Problem, like: Candidate) -> Candidate | None:
    """In every layer the option of whole layers that a plan has most often, of those that cost no more in any row, with
    other numbers of what tokens choose (`solvers.even`).

    None where the plan's layers are none of the options that were priced, or where no number of them costs so little.
    """
    known = {entries: option for option in problem.priced_layers for entries in problem.entries(option).values()}
    counts = Counter(known[layer.groups] for layer in like.layers if layer.groups in known)
    rows = zip(problem.rows, problem.total(like.layers).tolist(), strict=True)
    within = replace(problem, rows=tuple(replace(row, limit=row.amount(amount)) for row, amount in rows))
    shape = problem.shape
    for option, _ in counts.most_common():
        ladder = {each: problem.entries(each) for each in option.ladder(shape.kv_heads, shape.group_size)}
        if (plan := evenly(within, WholeLayers(ladder))) is not None:
            return plan
    return None


def kept_alike(problem: Problem, plans: Sequence[Candidate]) -> dict[str, Candidate]:
    """Plans in which all head groups keep tokens alike: by one share, and by one threshold as KVzip has it.

    Both meet the budget, with the window and the scorer that plans have most often. Empty where they have none, or
    where nothing is known of their thresholds; one that the budget does not hold is left out.
    """
    groups = [plan.layers[layer].groups[group] for plan in plans for layer, group in problem.free]
    kinds = Counter(kind for group in groups for kind in kinds_of([group]) if problem.thresholds(kind) is not None)
    if not kinds:
        return {}
    kind = kinds.most_common(1)[0][0]
    made = {SAME_SHARE: same_share(problem, kind), ONE_THRESHOLD: one_threshold(problem, kind)}
    return {name: plan for name, plan in made.items() if plan is not None}


def thresholds_alike(problem: Problem, choices: Sequence[Target]) -> dict[str, Candidate]:
    """Plans whose head groups all keep tokens by one threshold, or by the shares that one threshold of the scores keeps
    that a scorer stands for: both for every window and scorer that may be chosen, by name.

    Scores that all heads share are better guides to how much each keeps than prices of single heads are, so a
    refinement starts from the best of these where it is better than what was solved. What nothing is known of, and what
    the budget does not hold, is left out.
    """
    made: dict[str, Candidate | None] = {}
    for kind in kinds_of(list(choices)):
        known = problem.thresholds(kind)
        if known is None:
            continue
        made[f"{ONE_THRESHOLD}, {kind.chooser}"] = one_threshold(problem, kind)
        if known.wanted_above(0.0) is not None:
            made[f"{ONE_SCORE}, {kind.chooser}"] = one_score(problem, kind)
    return {name: plan for name, plan in made.items() if plan is not None}


def chance_routed(like: Candidate) -> Candidate | None:
    """The same plan with what tokens choose left to chance; None where chance has it already, or nothing is."""
    layers = tuple(
        layer.model_copy(update={"groups": tuple(group.at_random for group in layer.groups)}) for layer in like.layers
    )
    return None if layers == like.layers else Candidate(layers, note="the same, chosen at random")


def removing(problem: Problem, budget: Budget) -> Problem | None:
    """The same problem for plans from which heads are removed, whose parameters count; None where none can be."""
    dense = replace(problem.dense, removes=True)
    try:
        check_pruning(dense.model.config)
        task = replace(problem, dense=dense, rows=budget.rows(dense, problem.lengths))
    except UserError:  # a family whose heads cannot be removed
        return None
    return task.counting(problem.counted, problem.whole)


def pruned_alike(problem: Problem, like: Candidate) -> Candidate | None:
    """Static pruning to what tokens use: as many query heads as a token computes of each layer, the same for all.

    Whole head groups stay, or the same number of query heads of all that do; what does not divide is carried on to the
    next layer, so that all layers together have no more than the plan.

    Args:
        problem: whose search may remove heads.

    Returns:
        None where tokens choose nothing, or nothing was measured that ranks heads.
    """
    chosen = [number for number, layer in enumerate(like.layers) if any(group.by_layer for group in layer.groups)]
    asked = [option.ranked_by for option in problem.priced_layers if option.ranked_by is not None]
    for name in dict.fromkeys((*asked, *RANKS)):
        try:
            worth = worth_of(problem.profile.find, name, problem.lengths, "search.solver")
        except UserError:
            continue
        break
    else:
        return None
    shape, size, carried = problem.shape, problem.queries, 0
    forms = [(groups, heads) for groups in range(1, shape.kv_heads + 1) for heads in range(1, size + 1)]
    rows = list(like.layers)
    for number in chosen:
        unit = replace(problem.unit(number), query_heads=size)
        on = layer_cost(like.layers[number].groups, unit, 1).heads + carried
        groups, heads = max(
            (form for form in forms if form[0] * form[1] <= on or form == (1, 1)),
            key=lambda form: (form[0] * form[1], form[1] == size),
        )
        carried = on - groups * heads
        of_groups = worth[number].expand(-1, size)
        stay = top(worth[number].sum(-1), groups)
        kept = tuple(group * size + head for group in stay for head in top(of_groups[group], heads))
        rows[number] = like.layers[number].model_copy(
            update={
                "groups": tuple(FULL_GROUP if group in stay else PRUNED for group in range(shape.kv_heads)),
                "queries": None if heads == size else kept,
            }
        )
    if not chosen:
        return None
    return Candidate(tuple(rows), note=f"as many heads removed for all tokens, by {name}", importance=name)


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
