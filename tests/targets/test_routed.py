"""What routed groups cost: the mean over all choices, rounded up, and the parameters that a router really has."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from typing import Any

import pytest

from compress.models.planned import mixers_of, planned_model
from compress.models.pruning import block_parameters, parameters_per_unit
from compress.plan import make_plan
from compress.registry import targets
from compress.targets.full import FullGroup
from compress.targets.routed import RoutedGroup
from compress.targets.unit import Unit
from compress.targets.window import WindowGroup
from tests.tiny import shape_of, tiny_model

UNIT = Unit(query_heads=3, head_dim=16, itemsize=2)


@pytest.mark.parametrize("unit", ["group", "head"])
@pytest.mark.parametrize("shared", [(), (1,), (0, 4, 5)])
@pytest.mark.parametrize("active", [1, 2])
def test_a_group_costs_the_mean_over_all_choices(unit: Any, shared: tuple[int, ...], active: int) -> None:
    groups = 6 if unit == "group" else 3
    entries = RoutedGroup.layer(groups, active, shared=shared, group_size=3, unit=unit, sink=4, alpha=30, beta=0.25)
    per_unit = 3 if unit == "group" else 1
    units = groups * 3 // per_unit
    free = [number for number in range(units) if number not in shared]
    choices = [{*shared, *chosen} for chosen in combinations(free, active)]
    for group, entry in enumerate(entries):
        heads = [head // per_unit for head in range(group * 3, group * 3 + 3)]  # the units of its heads
        on = [sum(head in choice for head in heads) for choice in choices]
        read, computed = Fraction(sum(map(bool, on)), len(on)), Fraction(sum(on), 3 * len(on))
        for length in (1, 65, 300):
            dense = WindowGroup(sink=4, alpha=30, beta=0.25).cost(UNIT, length)
            cost = entry.cost(UNIT, length)
            assert cost.held_bytes == dense.held_bytes and cost.parameters == 0
            for name, share in (("read_bytes", read), ("keys", read), ("flops", computed)):
                assert 0 <= getattr(cost, name) - share * getattr(dense, name) < 1


@pytest.mark.parametrize("router", ["two_stage", "norm", "random"])
@pytest.mark.parametrize("unit", ["group", "head"])
def test_a_router_has_the_parameters_that_it_costs(unit: Any, router: Any) -> None:
    model = tiny_model("llama-gqa")
    routed = RoutedGroup.layer(2, 1, shared=(1,), group_size=2, unit=unit, router=router)
    plan = make_plan(shape_of(model), [routed, [FullGroup()] * 2, routed])
    counted = plan.cost(100, sizes=parameters_per_unit(model)).parameters
    planned = planned_model(model, plan)
    own = sum(weight.numel() for mixer in mixers_of(planned) for weight in mixer.parameters())
    assert counted == block_parameters(planned) == block_parameters(model) + own


@pytest.mark.parametrize("router", ["two_stage", "norm", "random"])
def test_chance_in_the_place_of_a_router_is_a_plan_as_well(router: Any) -> None:
    """Weights by which nothing is chosen say nothing of the chosen, so a random router's gates are 1."""
    for entry in RoutedGroup.layer(4, 2, shared=(1,), router=router, sink=4, alpha=30):
        drawn = entry.at_random
        assert targets.parse(targets.written(drawn)) == drawn
        assert drawn == RoutedGroup(**targets.written(entry) | {"router": "random", "gates": "one"})


def test_words() -> None:
    routed, shared = RoutedGroup.layer(3, 1, shared=(1,), sink=4, alpha=30, beta=0.0)[:2]
    assert routed.words() == "tokens choose 1 of 2 head groups, beside 1 always on, sink 4, window 30"
    assert shared.words() == "always on, beside 1 of 2 head groups that tokens choose, sink 4, window 30"
    assert (routed.short(), shared.short()) == ("R 1/2+1 4|30", "on 1/2+1 4|30")
    heads = RoutedGroup.layer(2, 2, shared=(2, 3), group_size=3, unit="head", router="norm")
    assert heads[0].words() == "tokens choose 2 of 4 query heads by the norms of queries, beside 2 always on (here 2)"
    assert heads[0].short() == "R(2) 2/4+2h"
    assert RoutedGroup(active=0, of=0, always=2, shared="all").words() == "always on, weighed by a router"


def test_the_rule_in_words_is_that_of_the_fields() -> None:
    plain, window = RoutedGroup(active=2, of=3), RoutedGroup(active=2, of=3, alpha=9, beta=0.0, router="norm")
    assert plain.rule_text().startswith("every token uses") and "weighed by a softmax" in plain.rule_text()
    assert window.rule_text().startswith("the query at position t sees") and "taken as they are" in window.rule_text()
