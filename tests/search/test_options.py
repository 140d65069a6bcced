"""Options: losses taken from the right place of the tables, and dominance that is exact."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import UserError
from compress.profile.key import Key
from compress.runtime.span import Span
from compress.search.budget.budget import Budget
from compress.search.choice.options import Objective, layers_of, nondominated, room, rule_losses, window_options
from compress.search.problem import FULL_GROUP
from compress.targets.window import SpanGrid, WindowGroup
from tests.search.synthetic import budget_problem, influence_table, make_shape, problem_of, random_problem


@pytest.mark.parametrize("length", [130, 192])
def test_rule_losses_are_the_influence_that_a_rule_hides(length: int) -> None:
    grid = SpanGrid(sinks=(0, 70), betas=(0.0, 0.25, 1.0), alpha_min=-64)
    influence = np.tril(np.random.default_rng(0).random((2, 1, length, length)))
    rules = grid.rules(400)
    losses = rule_losses(influence_table(influence, grid, length), rules)
    t, j = torch.arange(length)[:, None], torch.arange(length)[None]
    for number, rule in enumerate(rules):
        hidden = ~rule.span.visible(t, j).numpy()
        expected = (influence * hidden).sum((-1, -2))
        assert losses[:, :, number] == pytest.approx(expected, rel=1e-5, abs=1e-9)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(1, 300), st.integers(1, 4), st.integers(1, 12), st.integers(0, 10_000))
def test_nondominated_equals_the_definition(count: int, columns: int, values: int, seed: int) -> None:
    rows = np.random.default_rng(seed).integers(0, values, (count, columns)).astype(float)
    kept = set(nondominated(rows).tolist())
    for index in range(count):
        beats = (rows <= rows[index]).all(1) & ((rows < rows[index]).any(1) | (np.arange(count) < index))
        assert (index in kept) != beats.any()


def test_options_keep_full_and_leave_sliding_layers() -> None:
    problem = random_problem(0.8, shape=make_shape(3, 2, (None, 100, None)))
    objectives = [Objective((("influence.absolute", 1.0),), length) for length in problem.lengths]
    options = [each.kept() for each in window_options(problem, objectives)]
    assert [each.unit.place for each in options] == [(layer, g) for layer in range(3) for g in range(2)]
    for each in options:
        assert each.losses.shape == (len(each.choices), 2)
        assert each.costs.shape == (len(each.choices), 2)
        assert each.choices[0] == FULL_GROUP and not each.losses[0].any()
        if each.unit.place[0] == 1:
            assert each.choices == (FULL_GROUP,)
            assert each.costs[0].tolist() == [Span(0, 100, 0.0).page_count(row.length) for row in problem.rows]
        else:
            assert len(each.choices) > 3
            assert len(nondominated(np.concatenate([each.losses, each.costs], axis=1))) == len(each.choices)
    assert room(problem, options).tolist() == problem.limits.tolist()
    layers = layers_of(problem, options, [len(each.choices) - 1 for each in options])
    assert [[each.unit.read(layers[each.unit.place[0]])] for each in options] == [
        [each.choices[-1]] for each in options
    ]
    spent = problem.total(layers) - problem.total(problem.start)
    assert spent.tolist() == sum(each.costs[-1] - each.costs[0] for each in options).tolist()


def test_rows_of_keys_stand_beside_those_of_pages() -> None:
    problem = budget_problem(Budget(kv={500: 0.6}, density={400: 0.5, 512: 0.5}))
    assert [(row.kind, row.length) for row in problem.rows] == [("density", 400), ("density", 512), ("kv", 500)]
    spans = [rule.span for rule in problem.grid.rules(512)]
    objectives = [Objective((("influence.absolute", 1.0),), 512)]
    for each in [every.kept() for every in window_options(problem, objectives)]:
        for target, costs in zip(each.choices, each.costs, strict=True):
            span = target.span()
            keys = [int(span.visible(torch.tensor(n - 1), torch.arange(n)).sum()) for n in (400, 512)]
            assert costs.tolist() == [*keys, span.page_count(500)]
        # A rule that was left out is beaten in loss and in every cost by one that was kept.
        tensor = problem.profile.tensor(Key.parse("influence.absolute.512"))
        table = rule_losses(tensor, problem.grid.rules(512))[each.unit.place]
        kept = np.concatenate([each.losses, each.costs], axis=1)
        targets = [FULL_GROUP if span.is_full else WindowGroup.of(span) for span in spans]
        for target, loss, costs in zip(targets, table, problem.costs(0, targets), strict=True):
            assert target in each.choices or (kept <= [loss, *costs]).all(1).any()


def test_full_stays_where_signed_influence_says_that_hiding_helps() -> None:
    problem = random_problem(0.8)
    objective = Objective((("influence.signed", 1.0),), 512)
    table = {"influence.signed.512": -problem.profile.tensor(Key.parse("influence.signed.512")).abs()}
    better = problem_of(problem.shape, problem.grid, (512,), table, {512: 10**9})
    assert all(FULL_GROUP in each.kept().choices for each in window_options(better, [objective]))


def test_a_table_that_does_not_fit_is_an_error() -> None:
    problem = random_problem(0.8)
    own = problem.profile.tensor(Key.parse("influence.absolute.512"))
    for table, says in [(torch.zeros(3, 2, 1, 4, 2), "does not fit"), (torch.full_like(own, torch.nan), "not finite")]:
        wrong = problem_of(problem.shape, problem.grid, (512,), {"influence.absolute.512": table}, {512: 10**9})
        with pytest.raises(UserError, match=says):
            window_options(wrong, [Objective((("influence.absolute", 1.0),), 512)])
