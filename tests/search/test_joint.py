"""Units that stand for others, as a layer does for its head groups: equal to brute force, and the bounds hold."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.search.choice.knapsack import Knapsack
from compress.search.choice.options import HeadGroup, Options, WholeLayer, in_place_of


def layered(seed: int, sizes: list[int], whole: list[int], signed: bool) -> list[Options]:
    """Head groups of some layers, with options that cost more the less they lose, and options of whole layers."""
    rng = np.random.default_rng(seed)

    def options(unit: HeadGroup | WholeLayer, count: int, factor: int) -> Options:
        costs = factor * np.sort(rng.integers(1, 20, (count, 2)), axis=0)[::-1]
        losses = factor * np.sort(rng.random((count, 2)), axis=0) * 5
        losses += rng.random((count, 2)) - (0.8 if signed else 0)
        return Options(unit, (None,) * count, losses, costs)

    found = []
    for layer, (groups, count) in enumerate(zip(sizes, whole, strict=True)):
        found += [options(HeadGroup((layer, group)), int(rng.integers(1, 4)), 1) for group in range(groups)]
        if count:
            found.append(options(WholeLayer((layer, 0)), count, groups))
    order = rng.permutation(len(found))  # nothing depends on where units stand
    return [found[number] for number in order]


def every_choice(options: list[Options]) -> list[list[int]]:
    """All choices that decide every head group once."""
    joint = in_place_of(options)
    found = []
    ranges = [range(-1 if number in joint else 0, len(unit.choices)) for number, unit in enumerate(options)]
    for choice in itertools.product(*ranges):
        taken = list(choice)
        for number, members in joint.items():
            if choice[number] >= 0:
                for member in members:
                    taken[member] = -1
        if taken not in found:
            found.append(taken)
    return found


def value(options: list[Options], choice: list[int], name: str) -> np.ndarray:
    rows = [getattr(unit, name)[index] for unit, index in zip(options, choice, strict=True) if index >= 0]
    return np.sum(rows, axis=0)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    sizes=st.lists(st.integers(1, 2), min_size=1, max_size=3),
    whole=st.lists(st.integers(0, 3), min_size=3, max_size=3),
    share=st.floats(0.0, 1.0),
    bounded=st.booleans(),
    signed=st.booleans(),
)
def test_equals_brute_force(
    seed: int, sizes: list[int], whole: list[int], share: float, bounded: bool, signed: bool
) -> None:
    options = layered(seed, sizes, whole[: len(sizes)], signed)
    choices = every_choice(options)
    amounts = np.array([value(options, choice, "costs") for choice in choices])
    limits = (amounts.min(0) + share * (amounts.max(0) - amounts.min(0))).astype(np.int64)
    knapsack = Knapsack(options, limits.tolist(), in_place_of(options))
    weights, upper = np.array([1.0, 0.25]), {1: 0.5 * float(knapsack.scale[1])} if bounded else {}
    losses = np.array([value(options, choice, "losses") for choice in choices])
    allowed = (amounts <= limits).all(1) & np.all([losses[:, key] <= most for key, most in upper.items()], axis=0)
    solution = knapsack.solve(weights, gap=0.0, time_limit=20, upper=upper)
    if not allowed.any():
        assert solution is None
        return
    best = float((losses @ (weights / knapsack.scale))[allowed].min())
    assert solution is not None and solution.choice.tolist() in choices
    assert (value(options, solution.choice.tolist(), "costs") <= limits).all()
    assert solution.losses == pytest.approx(value(options, solution.choice.tolist(), "losses"))
    assert solution.bound <= best + 1e-8
    assert solution.objective == pytest.approx(best, abs=1e-8)


def test_without_time_a_repaired_choice_is_whole_and_within_the_limits() -> None:
    options = layered(1, [3] * 12, [4] * 12, False)
    joint = in_place_of(options)
    limits = [280, 240]
    rushed = Knapsack(options, limits, joint).solve(np.array([1.0, 1.0]), gap=0.0, time_limit=0.0)
    solved = Knapsack(options, limits, joint).solve(np.array([1.0, 1.0]), gap=0.0, time_limit=60.0)
    assert rushed is not None and solved is not None
    assert rushed.bound <= solved.objective <= rushed.objective
    for solution in (rushed, solved):
        assert (value(options, solution.choice.tolist(), "costs") <= limits).all()
        for number, members in joint.items():
            assert all((solution.choice[member] < 0) == (solution.choice[number] >= 0) for member in members)
    assert (solved.choice[list(joint)] >= 0).any() and (solved.choice[list(joint)] < 0).any()
