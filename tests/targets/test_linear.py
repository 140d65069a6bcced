"""The linear target: what a plan may say of it, what it costs, and which of it a search may choose."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from compress.errors import UserError
from compress.models.planned import mixers_of, planned_model
from compress.models.pruning import parameters_per_unit
from compress.plan import uniform_plan
from compress.registry import targets
from compress.targets.linear import LinearGrid, LinearGroup, lightning_slopes
from compress.targets.unit import Unit
from tests.tiny import shape_of, tiny_model

UNIT = Unit(query_heads=3, head_dim=16)
FORMS: list[dict[str, Any]] = [
    {},
    {"map": "relu", "features": 8, "decay": "token", "sink": 70},
    {"map": "taylor", "alone": True},
    {"rule": "delta", "decay": "token", "beta": 0.25},
    {"map": "silu", "out": "added", "decay": "fixed", "slope": 0.1},
]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"map": "hedgehogs"}, "expected one of cosine, elu, hedgehog"),
        ({"features": 7}, "even number of features"),
        ({"map": "taylor", "features": 100}, "1 \\+ d \\+ d\\^2"),
        ({"map": "silu"}, "may make negative"),
        ({"rule": "delta", "map": "elu"}, "goes with map unit"),
        ({"decay": "fixed"}, "slope goes with decay fixed"),
        ({"slope": 0.5}, "slope goes with decay fixed"),
        ({"alone": True, "sink": 4}, "has no window"),
        ({"beta": 0.0001}, "multiple of 1/1024"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        targets.parse({"target": "linear", **fields})


@pytest.mark.parametrize("fields", FORMS)
def test_a_plan_says_all_of_it_and_is_read_again(fields: dict[str, Any]) -> None:
    group = targets.parse({"target": "linear", **fields})
    assert targets.parse(targets.written(group)) == group
    assert group.stock(None) is None and not group.by_length and group.rule_text()
    assert ("no window" in group.words()) == bool(fields.get("alone"))


@pytest.mark.parametrize(
    ("fields", "words", "short"),
    [
        ({}, "sink 0, window 64, before it linear (hedgehog map)", "L 0|64"),
        (FORMS[1], "sink 70, window 64, before it linear (relu map, 8 features, decay by token)", "L 70|64"),
        (FORMS[2], "linear (taylor map), no window", "L"),
        (
            FORMS[3],
            "sink 0, window 64 + 0.25 of the position, before it linear (delta rule, decay by token)",
            "L 0|64+0.25t",
        ),
        (
            {"map": "elu", "rope": "undo", "decay": "fixed", "slope": 0.1},
            "sink 0, window 64, before it linear (elu map, without RoPE, decay exp(-0.1))",
            "L 0|64",
        ),
    ],
)
def test_it_is_said_in_words(fields: dict[str, Any], words: str, short: str) -> None:
    group = LinearGroup.model_validate(fields)
    assert (group.words(), group.short()) == (words, short)


@pytest.mark.parametrize("fields", FORMS)
def test_parameters_are_counted_as_the_mixer_has_them(fields: dict[str, Any]) -> None:
    model = tiny_model("llama-gqa")
    group, shape = LinearGroup.model_validate(fields), shape_of(model)
    plan = uniform_plan(shape, group)
    mixers = mixers_of(planned_model(model, plan, untrained=True))
    own = sum(weight.numel() for mixer in mixers for weight in mixer.parameters())
    sizes = parameters_per_unit(model)
    dense = sum(weight.numel() for layer in model.model.layers for weight in layer.parameters())
    assert plan.cost(100, sizes=sizes).parameters == dense + own


def test_a_long_input_costs_what_a_window_costs_and_a_state() -> None:
    group = LinearGroup(sink=4, alpha=64)
    state = 4 * 32 * 17
    assert group.state_bytes(16) == state
    pages = {1: 1, 128: 2, 129: 3, 65536: 3}  # that of the sink, and two that a window of 64 can lie on
    for length, count in pages.items():
        assert group.cost(UNIT, length).held_bytes == state + count * 64 * UNIT.token_bytes
    twice, once = group.cost(UNIT, 65536), group.cost(UNIT, 32768)
    assert twice.read_bytes == once.read_bytes and twice.keys == once.keys
    assert twice.flops < 2.01 * once.flops


@pytest.mark.parametrize("fields", FORMS)
def test_operations_are_those_of_every_query_and_page(fields: dict[str, Any]) -> None:
    """Counted token by token: products with the keys in sight, with the state where it has anything, of the maps with
    all queries and the keys that are written, and of the writes, which the delta rule reads the state for first."""
    group, heads, dim = LinearGroup.model_validate(fields), UNIT.query_heads, UNIT.head_dim
    features, columns = group.feature_count(dim), dim + (group.rule == "add")
    width = {"hedgehog": features // 2, "taylor": 16}.get(group.map, features)  # 273 features of 16 numbers
    sink = -(-group.sink // 64) * 64
    for length in (1, 64, 130, 191, 700):
        flops = written = 0
        for t in range(length):
            page = t // 64 * 64
            first = max(0, page + 1 - max(1, int(group.alpha + group.beta * (page + 1)))) // 64 * 64
            first = page if group.alone else max(first, sink)
            seen = t + 1 - first + (min(sink, first) if not group.alone else 0)
            flops += heads * seen * (2 * (features + columns) if group.alone else 4 * dim)
            written = max(written, first - (0 if group.alone else sink))
            flops += heads * (2 * features * columns * (first > sink) + 2 * dim * width)
        flops += written * (2 * features * columns * (2 if group.rule == "delta" else 1) + 2 * dim * width)
        assert group.cost(UNIT, length).flops == flops, length


def test_options_are_those_of_the_grid() -> None:
    assert LinearGroup.options(UNIT, [512]) == [LinearGroup(sink=4)]
    assert not LinearGroup.options(Unit(3, 16, native=50), [512])
    decays: Any = {"decays": ("none", "fixed"), "slopes": (0.1, 1.0)}
    grid = LinearGrid(
        rules=("add", "delta"), maps=("hedgehog", "silu"), alphas=(64, 128), alone=(False, True), **decays
    )
    options = LinearGroup.options(UNIT, [512], grid)
    assert len(options) == len(set(options)) == 3 * 3 * 3  # maps and rules, decays, places
    halves = [round(math.log(2) / slope) for slope in LinearGrid().slopes]
    assert halves == [22, 177, 1420]  # tokens, as the field says
    slopes = lightning_slopes(8, 0, 4)
    assert slopes == sorted(slopes, reverse=True) and max(lightning_slopes(8, 3, 4)) < 1e-4


def test_heads_alone_are_refused_where_layers_cap_their_scores() -> None:
    model = tiny_model("gemma2")
    shape = shape_of(model)
    planned_model(model, uniform_plan(shape, LinearGroup()), untrained=True)
    with pytest.raises(UserError, match="cap their scores"):
        planned_model(model, uniform_plan(shape, LinearGroup(alone=True)), untrained=True)
