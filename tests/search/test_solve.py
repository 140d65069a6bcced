"""The knapsack: equal to brute force, bounds that hold, and a Pareto front without dominated points."""

import itertools
import unittest.mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import compress.search.choice.knapsack
from compress.search.choice.knapsack import Knapsack
from compress.search.choice.options import HeadGroup, Options
from compress.search.choice.pareto import pareto_front


def random_candidates(seed: int, groups: int, rules: int, objectives: int, signed: bool) -> list[Options]:
    """Rules that cost more the less they lose, with noise; the first is free of loss and the dearest."""
    rng = np.random.default_rng(seed)
    found = []
    for group in range(groups):
        pages = np.sort(rng.integers(1, 20, (rules, 2)), axis=0)[::-1]
        losses = np.sort(rng.random((rules, objectives)), axis=0) * rng.random(objectives) * 10
        losses += rng.random((rules, objectives)) - (0.8 if signed else 0)
        losses[0] = 0
        found.append(Options(HeadGroup((0, group)), (None,) * rules, losses, pages))
    return found


def brute_force(
    candidates: list[Options], limits: list[int], weights: np.ndarray, upper: dict[int, float]
) -> float | None:
    best = None
    for choice in itertools.product(*(range(len(each.choices)) for each in candidates)):
        pages = sum(each.costs[index] for each, index in zip(candidates, choice, strict=True))
        losses = sum(each.losses[index] for each, index in zip(candidates, choice, strict=True))
        if (pages <= limits).all() and all(losses[key] <= bound for key, bound in upper.items()):
            value = float(losses @ weights)
            best = value if best is None else min(best, value)
    return best


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    groups=st.integers(1, 5),
    rules=st.integers(1, 5),
    share=st.floats(0.1, 1.0),
    bounded=st.booleans(),
    signed=st.booleans(),
    gap=st.sampled_from([0.0, 0.05]),
)
def test_equals_brute_force(
    seed: int, groups: int, rules: int, share: float, bounded: bool, signed: bool, gap: float
) -> None:
    candidates = random_candidates(seed, groups, rules, 2, signed)
    most = sum(each.costs[0] for each in candidates)
    least = sum(each.costs[-1] for each in candidates)
    limits = [int(value) for value in least + share * (most - least)]
    knapsack = Knapsack(candidates, limits)
    upper = {1: 0.5 * float(knapsack.scale[1])} if bounded else {}
    weights = np.array([1.0, 0.25])
    solution = knapsack.solve(weights, gap=gap, time_limit=20, upper=upper)
    best = brute_force(candidates, limits, weights / knapsack.scale, upper)
    if best is None:
        assert solution is None
        return
    assert solution is not None
    chosen = [each.costs[index] for each, index in zip(candidates, solution.choice, strict=True)]
    assert (sum(chosen) <= limits).all()
    assert all(solution.losses[key] <= bound * (1 + 1e-6) for key, bound in upper.items())
    assert solution.objective == pytest.approx(float(solution.losses @ (weights / knapsack.scale)), abs=1e-9)
    assert solution.bound <= best + 1e-8
    assert solution.bound <= solution.objective
    assert best <= solution.objective + 1e-8
    assert solution.gap <= gap + 1e-6
    if gap == 0:
        assert solution.objective == pytest.approx(best, abs=1e-8)


def test_without_time_the_rounded_choice_is_used_with_its_gap() -> None:
    candidates = random_candidates(3, 40, 12, 1, False)
    limits = [240, 240]
    rushed = Knapsack(candidates, limits).solve(np.ones(1), gap=0.0, time_limit=0.0)
    solved = Knapsack(candidates, limits).solve(np.ones(1), gap=0.0, time_limit=60.0)
    assert rushed is not None and solved is not None
    assert rushed.bound <= solved.objective <= rushed.objective
    assert rushed.gap == pytest.approx((rushed.objective - rushed.bound) / rushed.objective)
    assert solved.gap < rushed.gap < 0.5


def test_a_choice_survives_a_linear_program_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failed:
        status = 4
        x = None

    monkeypatch.setattr(compress.search.choice.knapsack, "linprog", lambda *args, **kwargs: Failed())
    candidates = random_candidates(4, 4, 5, 1, False)
    solution = Knapsack(candidates, [40, 40]).solve(np.ones(1), gap=0.0, time_limit=20.0)
    monkeypatch.undo()
    expected = Knapsack(candidates, [40, 40]).solve(np.ones(1), gap=0.0, time_limit=20.0)
    assert solution is not None and expected is not None
    assert solution.objective == pytest.approx(expected.objective, abs=1e-8)


@pytest.mark.parametrize("objectives", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_front_is_not_dominated_and_has_the_extremes(objectives: int, seed: int) -> None:
    candidates = random_candidates(seed, 12, 8, objectives, False)
    knapsack = Knapsack(candidates, [110, 110])
    front = pareto_front(knapsack, names="abc"[:objectives], points=6, gap=0.0, time_limit=60)
    losses = np.stack([solution.losses for solution, _ in front])
    for index in range(len(losses)):
        beats = (losses <= losses[index]).all(1)
        assert beats.sum() == 1
    for objective in range(objectives):
        alone = knapsack.solve(np.eye(objectives)[objective], gap=0.0, time_limit=20)
        assert alone is not None
        # Other objectives have a small weight in a front, so the extreme is reached to that weight.
        assert losses[:, objective].min() <= alone.losses[objective] + 0.01 * knapsack.scale[objective]
    assert objectives == 1 or len(front) > 2


def test_objectives_that_agree_cost_no_extra_solves(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = [
        Options(each.unit, each.choices, np.repeat(each.losses, 2, axis=1), each.costs)
        for each in random_candidates(0, 10, 6, 1, False)
    ]
    knapsack = Knapsack(candidates, [90, 90])
    solve = unittest.mock.Mock(wraps=knapsack.solve)
    monkeypatch.setattr(knapsack, "solve", solve)
    front = pareto_front(knapsack, names="ab", points=5, gap=0.01, time_limit=60)
    assert len(front) == 1
    assert solve.call_count == 3
