"""Candidates: losses taken from the right place of the tables, and dominance that is exact."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import UserError
from compress.runtime.span import FULL, Span
from compress.search.budget.budget import Budget
from compress.search.choice.options import Objective, build_candidates, nondominated, rule_losses
from compress.search.problem import SearchProblem
from compress.targets.window import SpanGrid
from tests.search.synthetic import ITEMSIZE, budget_problem, influence_table, make_shape, random_problem


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


def test_candidates_keep_full_and_leave_sliding_layers() -> None:
    problem = random_problem(0.8, shape=make_shape(3, 2, (None, 100, None)))
    objectives = [Objective((("influence.absolute", 1.0),), length) for length in problem.lengths]
    candidates = build_candidates(problem, objectives)
    assert [(each.layer, each.group) for each in candidates] == [(layer, g) for layer in range(3) for g in range(2)]
    for each in candidates:
        assert each.losses.shape == (len(each.spans), 2)
        assert each.costs.shape == (len(each.spans), 2)
        assert each.spans[0] == FULL and not each.losses[0].any()
        if each.layer == 1:
            assert each.spans == (FULL,)
            assert each.costs[0].tolist() == [Span(0, 100, 0.0).page_count(length) for length in problem.limits]
        else:
            assert len(each.spans) > 3
            assert len(nondominated(np.concatenate([each.losses, each.costs], axis=1))) == len(each.spans)


def test_rows_of_keys_stand_beside_those_of_pages() -> None:
    problem = budget_problem(Budget(kv={500: 0.6}, density={400: 0.5, 512: 0.5}))
    assert [(row.kind, row.length) for row in problem.rows] == [("pages", 500), ("keys", 400), ("keys", 512)]
    spans = [rule.span for rule in problem.grid.rules(512)]
    objectives = [Objective((("influence.absolute", 1.0),), 512)]
    for each in build_candidates(problem, objectives):
        for any_span, costs in zip(each.spans, each.costs, strict=True):
            span = any_span.at_length(512)  # itself: these rules go by position
            keys = [int(span.visible(torch.tensor(n - 1), torch.arange(n)).sum()) for n in (400, 512)]
            assert costs.tolist() == [span.page_count(500), *keys]
        # A rule that was left out is beaten in loss and in every cost by one that was kept.
        table = rule_losses(problem.tensor("influence.absolute.512"), problem.grid.rules(512))[each.layer, each.group]
        kept = np.concatenate([each.losses, each.costs], axis=1)
        for span, loss in zip(spans, table, strict=True):
            own = np.array([loss, *(row.cost(span) for row in problem.rows)])
            assert span in each.spans or (kept <= own).all(1).any()


def test_full_stays_where_signed_influence_says_that_hiding_helps() -> None:
    problem = random_problem(0.8)
    objective = Objective((("influence.signed", 1.0),), 512)
    table = -problem.tensor(f"influence.{objective.name}").abs()
    better = SearchProblem(problem.shape, problem.grid, (512,), lambda _: table, problem.limits, ITEMSIZE)
    assert all(FULL in each.spans for each in build_candidates(better, [objective]))


def test_a_table_that_does_not_fit_is_an_error() -> None:
    problem = random_problem(0.8)
    for table, says in [
        (torch.zeros(3, 2, 1, 4, 2), "does not fit"),
        (torch.full_like(problem.tensor("influence.absolute.512"), torch.nan), "not finite"),
    ]:
        wrong = SearchProblem(
            problem.shape, problem.grid, (512,), {"influence.absolute.512": table}.__getitem__, problem.limits, ITEMSIZE
        )
        with pytest.raises(UserError, match=says):
            build_candidates(wrong, [Objective((("influence.absolute", 1.0),), 512)])
