"""The budget: its forms, the bytes and keys it allows, and what it says when nothing fits."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from compress.errors import UserError
from compress.runtime.span import FULL, Span
from compress.search.budget.budget import Budget, check_feasible, dense_bytes, rule_bytes, rule_keys, smallest_bytes
from compress.targets.cost import decode_density, visible_keys
from compress.targets.window import SpanGrid
from tests.search.synthetic import ITEMSIZE, SMALL, budget_problem, make_shape, random_problem

SHAPE = make_shape()  # 3 layers x 2 groups of head size 16: a token costs 6 * 2 * 16 * 2 = 384 bytes


def test_limits_are_shares_of_the_dense_bytes() -> None:
    assert Budget(kv=0.5, lengths=(1024, 512)).limits(SHAPE, ITEMSIZE, (1,)) == {512: 98_304, 1024: 196_608}
    assert Budget(kv=0.25).limits(SHAPE, ITEMSIZE, (100,)) == {100: 9_600}
    assert Budget(kv={1024: 0.5, 2048: 500_000}).limits(SHAPE, ITEMSIZE, ()) == {1024: 196_608, 2048: 500_000}


def test_a_share_of_one_covers_whole_pages() -> None:
    limits = Budget(kv=1.0, lengths=(65,)).limits(SHAPE, ITEMSIZE, ())
    assert limits == {65: 128 * 384}
    assert limits[65] > dense_bytes(SHAPE, 65, ITEMSIZE) == 65 * 384


def test_layers_that_slide_cost_their_window() -> None:
    shape = make_shape(3, 2, (100, None, None))
    assert dense_bytes(shape, 1000, ITEMSIZE) == (100 + 2 * 1000) * 128
    assert rule_bytes(shape, FULL, 1024, ITEMSIZE) == (Span(0, 100, 0.0).page_count(1024) * 64 + 2 * 1024) * 128


def test_half_of_the_bytes_is_the_default_of_a_budget_without_any_kind() -> None:
    assert Budget().kv == 0.5 and Budget(lengths=(512,)).kv == 0.5 and Budget(kv=None).kv == 0.5
    assert Budget(density=0.5).kv is None and Budget(decode_time=0.5).kv is None
    for budget in (Budget(), Budget(density={512: 0.5}), Budget(decode_time=0.9, kv=0.25, batch_sizes=(1, 8))):
        assert Budget.model_validate_json(budget.model_dump_json(), strict=True) == budget


def test_density_counts_the_keys_that_the_last_query_sees() -> None:
    assert Budget(density=0.5).key_limits(SHAPE, (100, 512)) == {100: 300, 512: 1536}
    assert Budget(density={512: 0.25, 64: 1}).key_limits(SHAPE, ()) == {64: 384, 512: 768}
    sliding = make_shape(3, 2, (100, None, None))
    assert rule_keys(sliding, FULL, 1000) == 2 * (100 + 2 * 1000)
    assert Budget(density=0.5).key_limits(sliding, (1000,)) == {1000: 2100}
    for span in (Span(4, 100, 0.25), Span(64, 64, 0.0), FULL):
        for length in (1, 63, 130, 1000):
            t, j = torch.tensor(length - 1), torch.arange(length)
            assert visible_keys(span, length) == int(span.visible(t, j).sum())
            assert decode_density([[span] * 2] * 3, length) == rule_keys(SHAPE, span, length) / (6 * length)


def test_budget_reads_strict_json() -> None:
    assert Budget.model_validate_json('{"kv": 0.5, "lengths": [1024, 2048]}', strict=True).lengths == (1024, 2048)
    assert Budget.model_validate_json('{"kv": {"1024": 0.5, "2048": 4096}}', strict=True).kv == {1024: 0.5, 2048: 4096}


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"kv": 0}, "in \\(0, 1\\]"),
        ({"kv": 50}, "half of them is 0.5"),
        ({"kv": {}}, "at least one length"),
        ({"kv": {512: 1.5}}, "whole bytes"),
        ({"kv": {0: 0.5}}, "at least 1 token"),
        ({"lengths": []}, "one or more lengths"),
        ({"lengths": [512, 512]}, "each once"),
        ({"kv": {512: 0.5}, "lengths": [1024]}, "leave it out"),
        ({"weights": 1}, "Extra inputs"),
        ({"parameters": 0}, "greater than 0"),
        ({"parameters": 1.5}, "a share in \\(0, 1\\] or a whole number"),
        ({"parameters": 0.5, "kv": 0.5}, "it stands alone"),
        ({"density": 1.2}, "half of them is 0.5"),
        ({"density": {512: 2}}, "at length 512: expected a share"),
        ({"density": {512: 0.5}, "kv": 0.5, "lengths": [1024]}, "lengths of `density`"),
        ({"decode_time": 0}, "greater than 0"),
        ({"decode_time": 0.5, "batch_sizes": [2, 2]}, "batch sizes of at least 1, each once"),
        ({"decode_time": 0.5, "cost_table": "b.json", "bandwidth": 10}, "those of `cost_table`"),
        ({"cost_table": "b.json"}, "it is for `decode_time`"),
        ({"kv": 0.5, "batch_sizes": [4]}, "it is for `decode_time`"),
    ],
)
def test_budget_refuses(parameters: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Budget(**parameters)


def test_an_infeasible_budget_names_the_smallest_share_and_that_share_works() -> None:
    with pytest.raises(UserError) as error:
        random_problem(0.1, lengths=(512, 1000, 4096))
    assert len(error.value.problems) == 2
    text = str(error.value)
    assert "no plan meets the budget at length 512" in text
    assert "at least 0.25 of the dense KV bytes" in text
    assert "no plan meets the budget at length 1000" in text
    share = float(text.split("length 1000")[1].split("at least ")[1].split(" ")[0])
    random_problem(share, lengths=(1000,))
    with pytest.raises(UserError):
        random_problem(share - 0.0002, lengths=(1000,))


def test_every_kind_that_cannot_be_met_is_named_with_a_share_that_can() -> None:
    kinds = {"kv": 0.1, "density": 0.1, "decode_time": 0.2}
    with pytest.raises(UserError) as error:
        budget_problem(Budget(**kinds, lengths=(512,)))
    assert len(error.value.problems) == 3
    for name, problem in zip(kinds, error.value.problems, strict=True):
        share = float(str(problem.expected).split("at least ")[1].split(" ")[0])
        kinds[name] = share
        with pytest.raises(UserError) as tighter:
            budget_problem(Budget(**{name: share - 0.0002}, lengths=(512,)))
        assert len(tighter.value.problems) == 1
    # A sink of 64 and a window of 64 tokens are a quarter of 512 keys and pages.
    assert kinds["density"] == kinds["kv"] == 0.25
    budget_problem(Budget(**kinds, lengths=(512,)))


def test_the_smallest_rule_of_a_grid_without_windows_is_full() -> None:
    only_full = SpanGrid(betas=(1.0,))
    assert smallest_bytes(SHAPE, only_full, 512, ITEMSIZE) == dense_bytes(SHAPE, 512, ITEMSIZE)
    check_feasible(replace(random_problem(0.5), grid=only_full, limits={512: dense_bytes(SHAPE, 512, ITEMSIZE)}))


@pytest.mark.parametrize("length", [64, 100, 512, 1000])
def test_no_rule_of_the_grid_is_cheaper_than_the_smallest(length: int) -> None:
    grid = SpanGrid(sinks=(4, 128), betas=(0.125, 0.5), alpha_min=-64)
    cheapest = min(rule_bytes(SHAPE, rule.span, length, ITEMSIZE) for rule in grid.rules(2000))
    assert smallest_bytes(SHAPE, grid, length, ITEMSIZE) == cheapest
    assert smallest_bytes(SHAPE, SMALL, length, ITEMSIZE) <= dense_bytes(SHAPE, -(-length // 64) * 64, ITEMSIZE)
