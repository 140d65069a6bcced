"""The budget: its forms, the bytes and keys it allows, and what it says when nothing fits."""

import pytest
from pydantic import ValidationError

from compress.errors import UserError
from compress.models.pruning import block_parameters
from compress.plan import ModelShape
from compress.registry import budget_kinds
from compress.runtime.span import Span
from compress.search.budget.budget import Budget
from compress.search.dense import Dense
from compress.search.problem import FULL_GROUP, Problem, smallest_window
from compress.targets.cost import Cost
from compress.targets.window import SpanGrid, WindowGroup
from tests.search.synthetic import ITEMSIZE, SMALL, FakeProfile, budget_problem, dense_of, make_shape, random_problem
from tests.tiny import shape_of, tiny_model

SHAPE = make_shape()  # 3 layers x 2 groups of head size 16: a token costs 6 * 2 * 16 * 2 = 384 bytes


def limits(budget: Budget, profiled: tuple[int, ...] = (), shape: ModelShape = SHAPE) -> dict[int | None, int]:
    """What a budget of one kind allows, by length."""
    return {row.length: row.limit for row in budget.rows(dense_of(shape), profiled)}


def test_limits_are_shares_of_the_dense_bytes() -> None:
    assert limits(Budget(kv=0.5, lengths=(1024, 512))) == {512: 98_304, 1024: 196_608}
    assert limits(Budget(kv=0.25), (100,)) == {100: 9_600}
    assert limits(Budget(kv={1024: 0.5, 2048: 500_000})) == {1024: 196_608, 2048: 500_000}
    assert limits(Budget(bytes_read=0.5, lengths=(512,))) == {512: 98_304}
    (row,) = Budget(kv={64: 10_000}).rows(dense_of(SHAPE), ())
    assert (row.step, row.most) == (64 * 64, 2) and row.cost(Cost(held_bytes=8192)) == 2


def test_a_budget_that_no_plan_meets_is_not_to_be_raised_above_the_dense_model() -> None:
    (row,) = Budget(kv=0.5, lengths=(64,)).rows(dense_of(SHAPE), ())
    assert row.too_tight(row.most + 1, "windows", "price less").fix == (
        "raise the budget to 0.6667 or more, budget at longer inputs, or price less"
    )
    assert (
        row.too_tight(2 * row.dense // row.step, "states", "price less").fix == "budget at longer inputs, or price less"
    )


def test_a_share_of_one_covers_whole_pages() -> None:
    assert limits(Budget(kv=1.0, lengths=(65,))) == {65: 128 * 384}
    assert dense_of(SHAPE).cost(65).held_bytes == 65 * 384


def test_layers_that_slide_cost_their_window() -> None:
    dense = dense_of(make_shape(3, 2, (100, None, None)))
    assert dense.cost(1000).held_bytes == (100 + 2 * 1000) * 128
    assert dense.cost(1024, paged=True).held_bytes == (Span(0, 100, 0.0).page_count(1024) * 64 + 2 * 1024) * 128


def test_half_of_the_bytes_is_the_default_of_a_budget_without_any_kind() -> None:
    assert Budget().kv == 0.5 and Budget(lengths=(512,)).kv == 0.5 and Budget(kv=None).kv == 0.5
    assert Budget(density=0.5).kv is None and Budget(decode_time=0.5).kv is None
    for budget in (Budget(), Budget(density={512: 0.5}), Budget(decode_time=0.9, kv=0.25, batch_sizes=(1, 8))):
        assert Budget.model_validate_json(budget.model_dump_json(), strict=True) == budget


def test_density_counts_the_keys_that_the_last_query_sees() -> None:
    assert limits(Budget(density=0.5), (100, 512)) == {100: 300, 512: 1536}
    assert limits(Budget(density={512: 0.25, 64: 1})) == {64: 384, 512: 768}
    sliding = make_shape(3, 2, (100, None, None))
    assert dense_of(sliding).cost(1000).keys == 2 * (100 + 2 * 1000)
    assert limits(Budget(density=0.5), (1000,), sliding) == {1000: 2100}


@pytest.mark.parametrize("removes", [False, True])
def test_flops_are_those_of_visible_pairs_and_of_parameters(removes: bool) -> None:
    model = tiny_model("llama-gqa")
    dense = Dense(shape_of(model), 4, model, removes)
    (row,) = Budget(flops={100: 0.8}).rows(dense, ())
    pairs = 4 * dense.shape.head_dim * dense.shape.query_heads * dense.shape.layers * 100 * 101 // 2
    whole = pairs + 2 * 100 * block_parameters(model)
    assert row.dense == whole and row.limit == int(0.8 * whole)
    problem = Problem(dense, FakeProfile((100,), SMALL, {}), (row,))
    assert row.amount(int(problem.total(problem.start)[0])) == whole
    narrow = problem.uniform(WindowGroup(sink=0, alpha=1, beta=0.0))
    assert whole - row.amount(int(problem.total(narrow)[0])) == pairs - pairs * 2 // 101


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
        ({"flops": 1.5}, "half of them is 0.5"),
        ({"bytes_read": {512: 1.5}}, "whole bytes"),
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
    for problem in error.value.problems:
        name = str(problem.where).rpartition(".")[2]
        share = float(str(problem.expected).split("at least ")[1].split(" ")[0])
        kinds[name] = share
        with pytest.raises(UserError) as tighter:
            budget_problem(Budget(**{name: share - 0.0002}, lengths=(512,)))
        assert len(tighter.value.problems) == 1
    # A sink of 64 and a window of 64 tokens are a quarter of 512 keys and pages.
    assert kinds["density"] == kinds["kv"] == 0.25
    budget_problem(Budget(**kinds, lengths=(512,)))


def test_kinds_hold_together_and_every_kind_is_a_field_with_words() -> None:
    budget = Budget(kv=0.5, parameters=0.9, flops=0.8)
    assert budget.given() == {"flops": 0.8, "kv": 0.5, "parameters": 0.9}
    assert budget.words() == "flops 0.8, kv 0.5, parameters 0.9"
    for name, kind in budget_kinds.items():
        assert Budget.model_fields[name].description and kind.registered == name and kind.reads


def test_the_smallest_rule_of_a_grid_without_windows_is_full() -> None:
    only_full = SpanGrid(betas=(1.0,))
    assert smallest_window(only_full) == FULL_GROUP
    budget_problem(Budget(kv=1.0, lengths=(512,)), grid=only_full)


@pytest.mark.parametrize("length", [64, 100, 512, 1000])
def test_no_rule_of_the_grid_is_cheaper_than_the_smallest(length: int) -> None:
    grid = SpanGrid(sinks=(4, 128), betas=(0.125, 0.5), alpha_min=-64)
    unit = SHAPE.unit(0, ITEMSIZE)
    costs = [target.cost(unit, length).held_bytes for target in WindowGroup.options(unit, [2000], grid)]
    assert smallest_window(grid).cost(unit, length).held_bytes == min(costs)
