"""What every registered solver of spans has to do; test_pruning.py has those that prune. A new one needs no line."""

import itertools
from dataclasses import replace

import pytest

import compress.search.checks
from compress.errors import UserError
from compress.plan import ModelShape
from compress.registry import solvers
from compress.runtime.span import FULL, PAGE, Span, spans_of_plan
from compress.search.budget.budget import Budget
from compress.search.checks import parse_solver
from compress.search.problem import CandidatePlan, Solver, solver_name
from compress.targets.full import FullGroup
from compress.targets.window import WindowGroup
from tests.search.synthetic import ITEMSIZE, budget_problem, make_shape, random_problem

assert compress.search.checks
every_solver = pytest.mark.parametrize("name", [name for name, kind in solvers.items() if issubclass(kind, Solver)])

PROBLEMS = {
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


def make(name: str) -> Solver:
    """A solver with its defaults."""
    return parse_solver({"name": name})


def allocated(shape: ModelShape, plan: CandidatePlan, length: int) -> int:
    """Bytes of the cache by the runtime's own rule, from the plan as it would be written."""
    layers = [{"groups": [group.model_dump() for group in row]} for row in plan.groups()]
    spans = spans_of_plan({"layers": layers}, list(shape.native_windows))
    pages = sum(span.at_length(length).page_count(length) for row in spans for span in row)
    return pages * PAGE * 2 * shape.head_dim * ITEMSIZE


@every_solver
@pytest.mark.parametrize("case", PROBLEMS)
def test_plans_are_whole_and_within_the_budget(name: str, case: str) -> None:
    problem = PROBLEMS[case]()
    plans = make(name).solve(problem)
    assert plans
    for plan in plans:
        groups = plan.groups()
        assert [len(row) for row in groups] == [problem.shape.kv_heads] * problem.shape.layers
        for row, native in zip(groups, problem.shape.native_windows, strict=True):
            assert all(isinstance(group, FullGroup | WindowGroup) for group in row)
            if native is not None:
                assert all(group.target == "full" for group in row)
        for length, limit in problem.byte_limits.items():
            assert allocated(problem.shape, plan, length) <= limit
            assert problem.kv_bytes(plan.decision)[length] == allocated(problem.shape, plan, length)
        written = plan.to_plan(problem, {})
        assert written.predicted.kv_bytes.keys() == {*problem.budget_lengths, *problem.lengths}
        for length, limit in problem.key_limits.items():
            seen = written.cost(length).keys
            assert round(seen) <= limit
        times = written.provenance.get("decode_time", {"rows": []})["rows"]
        assert [(row["length"], row["batch"]) for row in times] == [
            (length, batch)
            for length in (problem.times.limits if problem.times else ())
            for batch in (problem.times.batch_sizes if problem.times else ())
        ]
        assert all(row["share"] <= problem.times.share + 1e-12 for row in times if problem.times)
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
        assert all(span == FULL for row in best.decision for span in row)


@every_solver
@pytest.mark.parametrize("kind", ["density", "decode_time"])
def test_a_share_of_one_of_another_kind_loses_nothing(name: str, kind: str) -> None:
    problem = budget_problem(Budget(**{kind: 1.0}), profiled=(320, 450))
    plans = make(name).solve(problem)
    assert any(all(span == FULL for row in plan.decision for span in row) for plan in plans) or any(
        plan.losses and max(plan.losses.values()) == pytest.approx(0, abs=1e-9) for plan in plans
    )


@every_solver
def test_a_model_that_slides_everywhere_is_left_alone(name: str) -> None:
    problem = random_problem(1.0, shape=make_shape(2, 2, (100, 100)))
    assert [plan.decision for plan in make(name).solve(problem)] == [((FULL, FULL), (FULL, FULL))]


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
    tight = replace(problem, limits={512: 100})
    with pytest.raises(UserError, match=r"budget"):
        make(name).solve(tight)
    with pytest.raises(UserError, match=r"budget"):
        make(name).solve(replace(problem, key_limits={512: 100}))


@every_solver
def test_parameters_are_described(name: str) -> None:
    for field in solvers[name].model_fields.values():
        assert field.description
    assert solvers[name].__doc__
    assert solver_name(make(name)) == name


@pytest.mark.parametrize("name", ["uniform", "streaming"])
@pytest.mark.parametrize("case", [case for case in PROBLEMS if case != "bytes"])
def test_a_uniform_window_is_as_large_as_the_budget_allows(name: str, case: str) -> None:
    problem = PROBLEMS[case]()
    (plan,) = make(name).solve(problem)
    span = next(
        row[0] for row, native in zip(plan.decision, problem.shape.native_windows, strict=True) if native is None
    )
    assert span.sink == {"uniform": 64, "streaming": 4}[name]
    larger = Span(span.sink, span.alpha + PAGE, span.beta)
    decision = tuple(
        (larger if native is None else FULL,) * problem.shape.kv_heads for native in problem.shape.native_windows
    )
    assert not problem.fits(decision)


def test_uniform_uses_the_budget_at_every_length() -> None:
    problem = random_problem(0.5, lengths=(1024, 2048))
    (plan,) = make("uniform").solve(problem)
    for length, size in problem.kv_bytes(plan.decision).items():
        # A larger window at 2048 would need a negative alpha to stay within the budget at 1024.
        assert problem.limits[length] * 15 // 16 <= size <= problem.limits[length]
    (fixed,) = parse_solver({"name": "uniform", "elastic": False}).solve(problem)
    assert fixed.decision[0][0] == Span(64, 448, 0.0)
    (longest,) = make("uniform").solve(problem.only([2048]))
    assert longest.decision[0][0] == Span(64, 960, 0.0)
    (streaming,) = make("streaming").solve(problem.only([2048]))
    assert streaming.decision[0][0] == Span(4, 960, 0.0)


def test_parse_solver_says_what_is_wrong() -> None:
    with pytest.raises(UserError, match="did you mean `uniform`"):
        parse_solver({"name": "unifrm"})
    with pytest.raises(UserError, match="no name"):
        parse_solver({"points": 3})
    solver = make("moa")
    assert parse_solver(solver) is solver


def test_heads_of_the_highest_score_are_full() -> None:
    problem = random_problem(0.75, shape=make_shape(6, 3), profiled=(512, 1024), lengths=(1024,))
    (plan,) = parse_solver({"name": "heads", "window": 128}).solve(problem)
    full = {(i, j) for i, row in enumerate(plan.decision) for j, span in enumerate(row) if span == FULL}
    score = (problem.tensor("retrieval.512") + problem.tensor("retrieval.1024")).double()
    ranked = sorted(((i, j) for i in range(6) for j in range(3)), key=lambda place: -float(score[place]))
    assert 0 < len(full) < 18 and full == set(ranked[: len(full)])
    assert f"{len(full)} of 18 groups full by retrieval" in plan.note
    windows = {span for row in plan.decision for span in row if span != FULL}
    (window,) = windows
    wider = Span(window.sink, window.alpha + PAGE, 0.0)
    assert not problem.fits(tuple(tuple(wider if span == window else span for span in row) for row in plan.decision))
    (capped,) = parse_solver({"name": "heads", "window": 128, "most_per_layer": 1}).solve(problem)
    assert max(sum(span == FULL for span in row) for row in capped.decision) == 1
    with pytest.raises(UserError, match="no `peak`"):
        parse_solver({"name": "heads", "score": "peak"}).solve(problem)


@pytest.mark.parametrize("order", ["score", "first", "last", "spread"])
def test_layers_are_wholly_full_or_one_window(order: str) -> None:
    problem = random_problem(0.6, shape=make_shape(8, 2), profiled=(512, 1024), lengths=(1024,))
    (plan,) = parse_solver({"name": "layers", "order": order, "window": 128}).solve(problem)
    assert all(len(set(row)) == 1 for row in plan.decision)
    full = [layer for layer, row in enumerate(plan.decision) if row[0] == FULL]
    assert 0 < len(full) < 8 and len({row[0] for row in plan.decision}) == 2
    if order == "first":
        assert full == list(range(len(full)))
    if order == "last":
        assert full == list(range(8 - len(full), 8))
    if order == "spread":
        assert max(later - earlier for earlier, later in itertools.pairwise(full)) <= -(-8 // len(full)) + 1
    if order == "score":
        score = (problem.tensor("retrieval.512") + problem.tensor("retrieval.1024")).double().mean(1)
        assert full == sorted(score.argsort(descending=True)[: len(full)].tolist())
