"""A search over rules by length: losses and pages are those of the window at each length, and budgets hold."""

import itertools

import numpy as np
import pytest

from compress.errors import UserError
from compress.profile.key import Key
from compress.registry import solvers
from compress.runtime.span import FULL, LengthSpan, Span
from compress.search.choice.options import Objective, window_options
from compress.search.problem import Problem
from compress.targets.window import SpanGrid
from tests.search.synthetic import held_bytes, influence_table, limits_of, make_shape, problem_of, random_problem
from tests.search.test_solvers import PROBLEMS, allocated

SIGNED = SpanGrid(sinks=(0, 70), betas=(0.0, 0.25, 0.5, 1.0), alpha_min=-192)


def only_fixed(problem: Problem) -> Problem:
    """The same problem where the grid has nothing but fixed windows above 0, and the tables no other column."""
    grid = problem.grid.fixed()
    first = (grid.alpha_min - problem.grid.alpha_min) // 64
    tables = {
        f"influence.absolute.{length}": problem.profile.tensor(Key("influence", "absolute", length))[
            :, :, :, :1, first:
        ]
        for length in problem.lengths
    }
    return problem_of(problem.shape, grid, problem.lengths, tables, limits_of(problem))


@pytest.mark.parametrize("lengths", [(512,), (320, 448), (333, 501)])
def test_losses_are_the_influence_that_the_window_hides(lengths: tuple[int, ...]) -> None:
    shape = make_shape(2, 1)
    rng = np.random.default_rng(0)
    influence = {length: np.tril(rng.random((2, 1, length, length))) for length in lengths}
    tables = {f"influence.absolute.{each}": influence_table(found, SIGNED, each) for each, found in influence.items()}
    limits = dict.fromkeys((300, 700), 10**9)
    problem = problem_of(shape, SIGNED, lengths, tables, limits)
    objectives = [Objective((("influence.absolute", 1.0),), length) for length in lengths]
    options = [each.kept() for each in window_options(problem, objectives, "length")]
    spans = [[target.span() for target in each.choices] for each in options]
    assert {type(span) for row in spans for span in row} == {Span, LengthSpan}
    for each, row in zip(options, spans, strict=True):
        for number, span in enumerate(row):
            assert each.costs[number].tolist() == [span.at_length(length).page_count(length) for length in (300, 700)]
            for column, length in enumerate(lengths):
                if span.is_full:
                    assert each.losses[number, column] == 0
                    continue
                # On this grid, whose alphas are whole pages, a window is priced as the next smaller one.
                window = span.at_length(length).alpha
                window = length if window >= length else window // 64 * 64
                t, j = np.arange(length)[:, None], np.arange(length)[None]
                hidden = (j <= t) & (j >= span.sink) & (t - j >= window)
                expected = influence[length][each.unit.place][hidden].sum()
                assert each.losses[number, column] == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_the_grid_has_what_the_paper_has() -> None:
    """Its 11 alphas and 9 betas at 2k to 16k leave the 48 pairs of the released code, beside full attention."""
    grid = SpanGrid(sinks=(64,), alpha_min=-2048, alpha_step=1024)
    full, *rules = grid.length_spans(8192, (2048, 4096, 8192, 16384))
    found = {(rule.alpha, rule.beta) for rule in rules}
    assert full == FULL and len(found) == len(rules)
    pairs = itertools.product(range(-2048, 8193, 1024), (eighth / 8 for eighth in range(9)))
    paper = {(a, b) for a, b in pairs if a + b * 2048 > 0 and a + b * 8192 <= 8192 and a + b * 16384 <= 16384}
    assert len(paper) == 48
    # Left out of the paper's: alpha 0 with beta 1, which is full attention, and windows below the smallest fixed one.
    missing = {(a, b) for a, b in paper if a + b * 2048 < 1024} | {(0, 1.0)}
    assert paper - found == missing
    assert (-1024, 1.0) in found and LengthSpan(64, -1024, 1.0) in rules and Span(64, 1024, 0.0) in rules
    # What it adds to the paper's sees everything at short inputs, and less at the longest.
    assert all(a + b * 8192 > 8192 for a, b in found - paper)


@pytest.mark.parametrize("grid", [SpanGrid(), SIGNED])
@pytest.mark.parametrize("kv", [0.4, 0.7])
def test_at_one_length_growing_rules_are_fixed_windows(grid: SpanGrid, kv: float) -> None:
    problem = random_problem(kv, profiled=(512,), grid=grid)
    objective = Objective((("influence.absolute", 1.0),), 512)
    both = [window_options(problem, [objective], "length")]
    both.append(window_options(only_fixed(problem), [objective]))
    for mine, fixed in zip(*both, strict=True):
        rows = [
            {target.span().at_length(512): loss[0] for target, loss in zip(group.choices, group.losses, strict=True)}
            for group in (mine.kept(), fixed.kept())
        ]
        assert rows[0] == rows[1]
        assert len(rows[0]) > 3
    (found,) = solvers.parse({"name": "moa", "rule": "length", "gap": 0}).solve(problem)
    (same,) = solvers.parse({"name": "moa", "gap": 0}).solve(only_fixed(problem))
    assert found.losses == pytest.approx(same.losses, rel=1e-6)
    assert found.losses["absolute.512"] > 0
    assert any(group.by_length for row in found.targets for group in row)


@pytest.mark.parametrize("case", PROBLEMS)
def test_plans_meet_the_budget_at_every_length(case: str) -> None:
    problem = PROBLEMS[case]()
    for plan in solvers.parse({"name": "moa", "rule": "length"}).solve(problem):
        for length, limit in limits_of(problem).items():
            assert held_bytes(problem, plan.layers, length) == allocated(problem.shape, plan, length) <= limit


def test_grids_that_price_no_fixed_window_are_refused() -> None:
    for grid in (SpanGrid(betas=(0.25, 0.5)), SpanGrid(alpha_min=-128, alpha_max=0)):
        problem = random_problem(0.9, grid=grid)
        with pytest.raises(UserError, match="no fixed windows, and rules by length are priced by them"):
            solvers.parse({"name": "moa", "rule": "length"}).solve(problem)
    tight = random_problem(0.5, grid=SIGNED)
    tight = problem_of(tight.shape, SIGNED, tight.lengths, tight.profile.tensors, {512: 100})
    with pytest.raises(UserError, match="no plan meets the budget at length 512"):
        solvers.parse({"name": "moa", "rule": "length"}).solve(tight)


def test_the_default_is_the_rule_by_position() -> None:
    problem = random_problem(0.4)
    default = solvers.parse({"name": "moa"}).solve(problem)
    assert default == solvers.parse({"name": "moa", "rule": "position"}).solve(problem)
    assert not any(group.by_length for plan in default for row in plan.targets for group in row)
