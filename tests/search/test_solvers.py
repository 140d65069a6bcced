"""What every registered solver of spans has to do; test_pruning.py has those that prune. A new one needs no line."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from compress.errors import UserError
from compress.plan import ModelShape
from compress.profile.key import Key
from compress.registry import solvers
from compress.runtime.span import BETA_UNIT, PAGE
from compress.search.budget.budget import Budget
from compress.search.problem import FULL_GROUP, Candidate, Problem
from compress.search.solvers.uniform import largest_windows
from compress.targets.window import WindowGroup
from tests.search.synthetic import (
    ITEMSIZE,
    budget_problem,
    dense_of,
    held_bytes,
    limits_of,
    make_shape,
    problem_of,
    random_problem,
)

# Those that need more than their name, or heads that were prepared, have tests of their own.
BY_NAME = [
    name
    for name in solvers
    if name != "shares" and not any(field.is_required() for field in solvers[name].model_fields.values())
]
every_solver = pytest.mark.parametrize("name", [name for name in BY_NAME if solvers.parse({"name": name}).spans])

# Built once, for it remembers what rules cost.
PROBLEMS: dict[str, Callable[[], Any]] = {
    "half": lambda: random_problem(0.5),
    "third at lengths that are not profiled": lambda: random_problem(0.34, lengths=(448, 700, 1024)),
    "odd lengths": lambda: random_problem(0.6, profiled=(333, 501)),
    "shares by length": lambda: random_problem({400: 0.9, 512: 0.45}),
    "bytes": lambda: random_problem({512: 3 * 2 * 4 * PAGE * 2 * 16 * ITEMSIZE + 5}),
    "one layer": lambda: random_problem(0.5, shape=make_shape(1, 1)),
    "density": lambda: budget_problem(Budget(density=0.4)),
    "density by length, beside bytes": lambda: budget_problem(Budget(density={512: 0.5, 1000: 0.4}, kv={700: 0.45})),
    "density where some layers slide": lambda: budget_problem(
        Budget(density=0.7), shape=make_shape(4, 2, (100, None, 100, None))
    ),
    "decode time": lambda: budget_problem(Budget(decode_time=0.75, batch_sizes=(1, 4))),
    "all kinds": lambda: budget_problem(Budget(density=0.5, decode_time=0.8, kv=0.6), profiled=(333, 501)),
    "some layers slide": lambda: random_problem(0.7, shape=make_shape(4, 2, (100, None, 100, None))),
}
PROBLEMS = {case: functools.cache(problem) for case, problem in PROBLEMS.items()}


def make(name: str, **fields: Any) -> Any:
    """A solver, with its defaults where no field is given."""
    return solvers.parse({"name": name, **fields})


def allocated(shape: ModelShape, plan: Candidate, length: int) -> int:
    """Bytes of the cache by the runtime's own rule."""
    groups = [(group, native) for row, native in zip(plan.targets, shape.native_windows, strict=True) for group in row]
    spans: Any = [group.span(native) for group, native in groups]  # type: ignore[attr-defined]
    return sum(span.at_length(length).page_count(length) for span in spans) * PAGE * 2 * shape.head_dim * ITEMSIZE


@every_solver
@pytest.mark.parametrize("case", PROBLEMS)
def test_plans_are_whole_and_within_the_budget(name: str, case: str) -> None:
    problem = PROBLEMS[case]()
    plans = make(name).solve(problem)
    assert plans
    for plan in plans:
        assert [len(row) for row in plan.targets] == [problem.shape.kv_heads] * problem.shape.layers
        for row, native in zip(plan.targets, problem.shape.native_windows, strict=True):
            assert all(group.target in ("full", "window") for group in row)
            if native is not None:
                assert all(group == FULL_GROUP for group in row)
        written = plan.to_plan(problem, {})
        assert written.predicted.of("kv").keys() == {*problem.budget_lengths, *problem.lengths}
        for limit, spent in zip(problem.rows, problem.total(plan.layers), strict=True):
            cost = written.cost(limit.length, ITEMSIZE)
            assert cost.held_bytes == allocated(problem.shape, plan, limit.length)
            assert limit.amount(int(spent)) == limit.amount(limit.cost(cost)) <= limit.limit
        times = written.provenance.get("decode_time", {"rows": []})["rows"]
        timed = [row for row in problem.rows if row.kind == "decode_time"]
        assert [(row["length"], row["batch"]) for row in times] == [
            (row.length, batch) for row in timed for batch in row.batches
        ]
        assert all(row["share"] <= timed[0].most_time + 1e-12 for row in times)
        assert all(loss == loss for loss in plan.losses.values())
        assert plan.gap is None or plan.gap >= 0


@every_solver
def test_the_same_problem_gives_the_same_plans(name: str) -> None:
    assert make(name).solve(random_problem(0.4)) == make(name).solve(random_problem(0.4))


@every_solver
@pytest.mark.parametrize("lengths", [(512,), (333, 512), (450,)])
def test_the_dense_budget_loses_nothing(name: str, lengths: tuple[int, ...]) -> None:
    problem = random_problem(1.0, profiled=(320, 448), lengths=lengths)
    best = min(make(name).solve(problem), key=lambda plan: sum(plan.losses.values()))
    assert all(loss == pytest.approx(0, abs=1e-9) for loss in best.losses.values())
    if not best.losses:
        assert best.layers == problem.start


@every_solver
@pytest.mark.parametrize("kind", ["density", "decode_time"])
def test_a_share_of_one_of_another_kind_loses_nothing(name: str, kind: str) -> None:
    problem = budget_problem(Budget(**{kind: 1.0}), profiled=(320, 450))
    plans = make(name).solve(problem)
    assert any(plan.layers == problem.start for plan in plans) or any(
        plan.losses and max(plan.losses.values()) == pytest.approx(0, abs=1e-9) for plan in plans
    )


@every_solver
def test_a_model_that_slides_everywhere_is_left_alone(name: str) -> None:
    problem = random_problem(1.0, shape=make_shape(2, 2, (100, 100)))
    assert [plan.layers for plan in make(name).solve(problem)] == [problem.start]


@every_solver
def test_no_plan_is_dominated(name: str) -> None:
    plans = make(name).solve(random_problem(0.4))
    for plan in plans:
        for other in plans:
            worse = all(other.losses[key] <= loss for key, loss in plan.losses.items())
            assert other is plan or not plan.losses or not worse


@every_solver
def test_an_impossible_budget_is_an_error(name: str) -> None:
    problem = random_problem(0.5)
    grid, profile = problem.grid, problem.profile
    with pytest.raises(UserError, match=r"budget"):
        make(name).solve(problem_of(problem.shape, grid, problem.lengths, profile.tensors, {512: 100}))
    dense = dense_of(problem.shape)
    with pytest.raises(UserError, match=r"budget"):
        make(name).solve(Problem(dense, profile, Budget(density={512: 0.03}).rows(dense, ())))


@every_solver
def test_parameters_are_described(name: str) -> None:
    for field in solvers[name].model_fields.values():
        assert field.description
    assert solvers[name].__doc__
    assert make(name).registered == name


@pytest.mark.parametrize("name", ["uniform", "streaming"])
@pytest.mark.parametrize("case", [case for case in PROBLEMS if case != "bytes"])
def test_a_uniform_window_is_as_large_as_the_budget_allows(name: str, case: str) -> None:
    problem = PROBLEMS[case]()
    (plan,) = make(name).solve(problem)
    layer, group = problem.free[0]
    window = plan.layers[layer].groups[group]
    assert window.sink == {"uniform": 64, "streaming": 4}[name]
    larger = window.model_copy(update={"alpha": window.alpha + PAGE})
    assert plan.layers == problem.uniform(window) and not problem.fits(problem.uniform(larger))


def test_uniform_uses_the_budget_at_every_length() -> None:
    problem = random_problem(0.5, lengths=(1024, 2048))
    (plan,) = make("uniform").solve(problem)
    for length in (1024, 2048):
        size = held_bytes(problem, plan.layers, length)
        # A larger window at 2048 would need a negative alpha to stay within the budget at 1024.
        assert limits_of(problem)[length] * 15 // 16 <= size <= limits_of(problem)[length]
    (fixed,) = make("uniform", elastic=False).solve(problem)
    assert fixed.targets[0][0] == WindowGroup(sink=64, alpha=448, beta=0.0)
    (longest,) = make("uniform").solve(problem.only([2048]))
    assert longest.targets[0][0] == WindowGroup(sink=64, alpha=960, beta=0.0)
    (streaming,) = make("streaming").solve(problem.only([2048]))
    assert streaming.targets[0][0] == WindowGroup(sink=4, alpha=960, beta=0.0)


def test_every_beta_has_the_largest_window_that_the_budget_allows() -> None:
    problem, betas = random_problem(0.5, shape=make_shape(2, 2), lengths=(512, 1024, 2048)), range(0, BETA_UNIT, 31)
    expected = []
    for units in betas:
        windows = [WindowGroup(sink=4, alpha=pages * PAGE, beta=units / BETA_UNIT) for pages in range(2048 // PAGE + 1)]
        fitting = [window for window in windows if problem.fits(problem.uniform(window))]
        # At its end the shortest input has to see a page.
        if fitting and fitting[-1].alpha + 512 * units // BETA_UNIT >= PAGE:
            expected.append(fitting[-1])
    assert list(largest_windows(problem, 4, betas)) == expected
    assert len({window.alpha for window in expected}) > 2 and 1 < len(expected) < len(betas)


def test_heads_of_the_highest_score_are_full() -> None:
    problem = random_problem(0.75, shape=make_shape(6, 3), profiled=(320, 512), lengths=(512,))
    (plan,) = make("heads", window=128).solve(problem)
    full = {(i, j) for i, row in enumerate(plan.targets) for j, span in enumerate(row) if span == FULL_GROUP}
    score = (
        problem.profile.tensor(Key("retrieval", length=320)) + problem.profile.tensor(Key("retrieval", length=512))
    ).double()
    ranked = sorted(((i, j) for i in range(6) for j in range(3)), key=lambda place: -float(score[place]))
    assert 0 < len(full) < 18 and full == set(ranked[: len(full)])
    assert f"{len(full)} of 18 groups full by retrieval" in plan.note
    windows = {span for row in plan.targets for span in row if span != FULL_GROUP}
    (window,) = windows
    wider = window.model_copy(update={"alpha": window.alpha + PAGE})
    assert not problem.fits(problem.with_targets(lambda place: FULL_GROUP if place in full else wider))
    (capped,) = make("heads", window=128, most_per_layer=1).solve(problem)
    assert max(sum(span == FULL_GROUP for span in row) for row in capped.targets) == 1
    with pytest.raises(UserError, match="no `peak`"):
        make("heads", score="peak").solve(problem)


@pytest.mark.parametrize("order", ["score", "first", "last", "spread"])
def test_layers_are_wholly_full_or_one_window(order: str) -> None:
    problem = random_problem(0.6, shape=make_shape(8, 2), profiled=(320, 512), lengths=(512,))
    (plan,) = make("layers", order=order, window=128).solve(problem)
    assert all(len(set(row)) == 1 for row in plan.targets)
    full = [layer for layer, row in enumerate(plan.targets) if row[0] == FULL_GROUP]
    assert 0 < len(full) < 8 and len({row[0] for row in plan.targets}) == 2
    if order == "first":
        assert full == list(range(len(full)))
    if order == "last":
        assert full == list(range(8 - len(full), 8))
    if order == "spread":
        assert max(later - earlier for earlier, later in itertools.pairwise(full)) <= -(-8 // len(full)) + 1
    if order == "score":
        score = sum(problem.profile.tensor(Key("retrieval", length=length)) for length in (320, 512)).double().mean(1)
        assert full == sorted(score.argsort(descending=True)[: len(full)].tolist())
