"""What targets and plans cost is what the rules say pair by pair, and what the runtime allocates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from compress.models.planned import planned_model
from compress.models.pruning import block_parameters, parameters_per_unit
from compress.plan import LayerPlan, Mlp, Plan, plan_of_layers
from compress.registry import targets
from compress.runtime.span import PAGE, Span
from compress.targets.cost import Cost
from compress.targets.full import FullGroup
from compress.targets.pruned import PrunedGroup
from compress.targets.span import SpanTarget, visible_keys, visible_pairs
from compress.targets.target import StockForm
from compress.targets.unit import Unit
from compress.targets.window import SpanGrid, WindowGroup
from tests.pruned import uneven_plan
from tests.tiny import mixed_plan, random_ids, shape_of, spans_of, tiny_model

UNIT = Unit(query_heads=3, head_dim=16, itemsize=2)


@pytest.mark.parametrize("group", [FullGroup(), WindowGroup(sink=4, alpha=30, beta=0.25)])
@pytest.mark.parametrize("length", [1, 65, 300])
def test_a_group_costs_what_its_rule_says(group: SpanTarget, length: int) -> None:
    t = torch.arange(length)
    span = group.span().at_length(length)
    seen, pages = span.visible(t[:, None], t[None]), len(span.pages(length))
    cost = group.cost(UNIT, length)
    assert cost.held_bytes == cost.read_bytes == pages * PAGE * 2 * 16 * 2
    assert cost.keys == int(seen[-1].sum())
    assert cost.flops == 4 * 16 * 3 * int(seen.sum())


@pytest.mark.parametrize("span", [Span(4, 30, 0.25, PAGE), Span(0, -10, 1.0, PAGE), Span(0, -900, 0.75, PAGE)])
def test_a_rule_by_pages_is_counted_pair_by_pair(span: Span) -> None:
    for length in (1, 64, 65, 300):
        t = torch.arange(length)
        seen = span.visible(t[:, None], t)
        assert visible_pairs(span, length) == int(seen.sum()) and visible_keys(span, length) == int(seen[-1].sum())


def test_costs_add_up() -> None:
    one = Cost(1, 2, 3, 4, 5)
    assert one + one == one * 2 == Cost.total([one, one]) == Cost(2, 4, 6, 8, 10)
    assert Cost.total([]) == Cost() == PrunedGroup().cost(UNIT, 100)


def test_every_option_is_a_target_of_its_own_kind_and_has_words() -> None:
    for name, target in targets.items():
        options = target.options(UNIT, [200])
        assert bool(options) != target.by_layer and all(
            option.target == name and option.words() and option.short() for option in options
        )
        assert len(set(options)) == len(options)
    grid = SpanGrid(sinks=(4,), betas=(0.0,), alpha_max=128)
    assert WindowGroup.options(UNIT, [200], grid) == [
        WindowGroup(sink=4, alpha=64, beta=0.0),
        WindowGroup(sink=4, alpha=128, beta=0.0),
    ]
    assert not WindowGroup.options(Unit(3, 16, native=50), [200])


def test_stock_forms() -> None:
    assert FullGroup().stock(None) == StockForm() and FullGroup().stock(50) == StockForm(50)
    assert WindowGroup(sink=0, alpha=64, beta=0.0).stock(None) == StockForm(64)
    assert WindowGroup(sink=0, alpha=0, beta=1.0).stock(None) == StockForm()
    for group in (
        WindowGroup(sink=4, alpha=64, beta=0.0),
        WindowGroup(sink=0, alpha=64, beta=0.5),
        WindowGroup(sink=0, alpha=64, beta=0.0, rule="length"),
        WindowGroup(sink=0, alpha=1, beta=0.0),
    ):
        assert group.stock(None) is None


def halved(model: Any) -> Plan:
    """Without the last head group and half of the neurons of every layer."""
    groups, neurons = model.config.num_key_value_heads, model.config.intermediate_size
    row = LayerPlan(groups=(FullGroup(),) * (groups - 1) + (PrunedGroup(),), mlp=Mlp.of(range(neurons // 2)))
    return plan_of_layers(shape_of(model), [row] * 3)


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3", "phi3"])
@pytest.mark.parametrize("plan_of", [halved, uneven_plan])
def test_a_pruned_plan_counts_what_is_left(family: str, plan_of: Callable[[Any], Plan]) -> None:
    model = tiny_model(family)
    plan, sizes = plan_of(model), parameters_per_unit(model)
    made = planned_model(model, plan)
    cost = plan.cost(200, 4, sizes=sizes)
    assert cost.parameters == block_parameters(made)
    assert plan.form == ("native" if plan_of is halved else "patched")
    token = 2 * plan.model.head_dim * 4
    pages = sum(span.page_count(200) for row in spans_of(plan) for span in row if isinstance(span, Span)) * PAGE * token
    windows = [200 if window is None else window for window in plan.model.native_windows]
    tokens = sum(heads * window for heads, window in zip(plan.kept_heads, windows, strict=True)) * token
    assert cost.held_bytes == (tokens if plan_of is halved else pages)
    assert plan.cost(200, 4, form="patched").held_bytes == pages
    if plan_of is uneven_plan:
        cache = made.new_cache()
        made(random_ids(1, 200), past_key_values=cache)
        assert cache.allocated_bytes() == pages


def test_a_plan_of_windows_costs_what_the_runtime_allocates() -> None:
    plan = mixed_plan(shape_of(tiny_model("gemma3")))
    assert plan.form == "patched" and plan.stock() is None
    assert plan.cost(200, 4).held_bytes == plan.cost(200, 4, form="patched").held_bytes
    assert plan.dense_cost(200, 4).held_bytes == (50 + 200 + 50) * 2 * (2 * 16 * 4)
    with pytest.raises(ValueError, match="no stock architecture"):
        plan.cost(200, form="native")
