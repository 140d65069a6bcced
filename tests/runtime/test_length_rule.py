"""Rules by length: one fixed window for an input, kept while tokens are generated, and refusals of all else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.models.planned import planned_model
from compress.plan import Plan, make_plan
from compress.runtime.span import FULL, AnySpan, LengthSpan, Span, has_length_rule, span_of, spans_at
from compress.targets.full import FullGroup
from compress.targets.unit import Unit
from compress.targets.window import WindowGroup
from tests.tiny import random_ids, shape_of, spans_of, tiny_model

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
DENSE = tiny_model("llama-gqa")
SHAPE = shape_of(DENSE)
RULES = (LengthSpan(4, -20, 0.5), LengthSpan(70, 30, 0.125))
INPUT, MORE = 150, 90


def plan_of(rows: Any) -> Plan:
    return make_plan(SHAPE, [[FullGroup() if span.is_full else WindowGroup.of(span) for span in row] for row in rows])


def fixed_plan(rows: Any, length: int) -> Plan:
    """The plan that says outright what windows an input of `length` tokens has."""
    return plan_of([[group if group.is_full else group.at_length(length) for group in row] for row in rows])


@pytest.fixture(scope="module")
def mixed() -> Any:
    """Rules by length beside full attention and rules by position, in layers of their own and together."""
    rows = [RULES, (FULL, RULES[0]), (Span(4, 30, 0.25), LengthSpan(0, -40, 1.0))]
    return planned_model(DENSE, plan_of(rows)), planned_model(DENSE, fixed_plan(rows, INPUT)), rows


def logits(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, **kwargs).logits


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 100), st.integers(-2000, 2000), st.integers(0, 1024), st.integers(1, 5000))
def test_the_last_row_is_that_of_the_rule_by_position(sink: int, alpha: int, units: int, length: int) -> None:
    beta = units / 1024
    fixed = LengthSpan(sink, alpha, beta).at_length(length)
    assert (fixed.sink, fixed.alpha, fixed.beta) == (sink, max(1, alpha + length * units // 1024), 0)
    by_position = Span(sink, alpha, beta)
    assert by_position.at_length(length) is by_position
    assert fixed.first(length - 1) == by_position.first(length - 1)
    group = WindowGroup.of(LengthSpan(sink, alpha, beta))
    assert group.cost(Unit(1, 1), length) == WindowGroup.of(fixed).cost(Unit(1, 1), length)


def test_parameters_have_the_limits_of_a_span() -> None:
    for wrong in ({"sink": -1}, {"beta": 0.1}, {"beta": 1.5}, {"alpha": 0.5}):
        with pytest.raises(ValueError, match="expected"):
            LengthSpan(**wrong)


@pytest.mark.parametrize("length", [1, 2, 65, 301])
def test_one_pass_is_a_masked_softmax_with_one_window(length: int) -> None:
    naive = tiny_model("llama-gqa")
    naive.set_attn_implementation("eager")
    ids = random_ids(1, length)
    t, j = torch.arange(length)[:, None], torch.arange(length)[None]
    windows = [(rule.sink, max(1, int(rule.alpha + rule.beta * length))) for rule in RULES]
    seen = [(j <= t) & ((j < sink) | (t - j < window)) for sink, window in windows]
    share = SHAPE.query_heads // SHAPE.kv_heads
    mask = torch.stack([each for each in seen for _ in range(share)])[None]
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected = logits(naive, ids, attention_mask=additive)
    model = planned_model(DENSE, plan_of([RULES] * SHAPE.layers))
    for cached in (False, True):
        torch.testing.assert_close(logits(model, ids, use_cache=cached), expected, **CLOSE)
    if length == 301:  # the rules matter, and are not those by position
        by_position = [[Span(rule.sink, rule.alpha, rule.beta) for rule in RULES]] * SHAPE.layers
        other = logits(planned_model(DENSE, plan_of(by_position)), ids)
        assert (other - expected).abs().max() > 0.1


@pytest.mark.parametrize("reserved", [None, INPUT + MORE])
def test_tokens_after_the_input_see_its_window(mixed: Any, reserved: int | None) -> None:
    model, fixed, rows = mixed
    ids = random_ids(2, INPUT + MORE)
    cache = model.new_cache(reserved)
    parts = [logits(model, ids[:, :INPUT], past_key_values=cache)]
    predicted = plan_of(rows).cost(INPUT, 4).held_bytes
    assert cache.held_bytes() == 2 * predicted
    if reserved is None:
        assert cache.allocated_bytes() == 2 * predicted
    parts += [logits(model, ids[:, t : t + 1], past_key_values=cache) for t in range(INPUT, INPUT + MORE)]
    torch.testing.assert_close(torch.cat(parts, dim=1), logits(fixed, ids), **CLOSE)
    assert cache.held_bytes() == 2 * fixed_plan(rows, INPUT).cost(INPUT + MORE, 4).held_bytes
    assert cache.held_bytes() < 2 * plan_of(rows).cost(INPUT + MORE, 4).held_bytes  # no room is made for more input


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_generation_is_that_of_the_windows_written_out(mixed: Any, how: dict[str, Any]) -> None:
    model, fixed, _ = mixed
    ids = random_ids(2, INPUT)
    arguments: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "attention_mask": torch.ones(2, INPUT)}
    found = model.generate(ids, **arguments, **how)
    assert torch.equal(found, fixed.generate(ids, **arguments, **how))
    assert len(set(found[0, INPUT:].tolist())) > 3


def test_a_cache_takes_another_input_after_reset(mixed: Any) -> None:
    model, _, _ = mixed
    cache = model.new_cache()
    logits(model, random_ids(1, 40), past_key_values=cache)
    cache.reset()
    ids = random_ids(1, 200)
    torch.testing.assert_close(logits(model, ids, past_key_values=cache), logits(model, ids, use_cache=False), **CLOSE)


def test_input_in_parts_is_refused_and_leaves_the_cache_as_it_was(mixed: Any) -> None:
    model, fixed, _ = mixed
    ids = random_ids(1, INPUT + 1)
    cache = model.new_cache()
    logits(model, ids[:, :INPUT], past_key_values=cache)
    with pytest.raises(ValueError, match=r"`rule: length`.* got 2 tokens behind 150 cached ones.*rule: position"):
        model(ids[:, :2], past_key_values=cache, attention_mask=torch.ones(1, INPUT + 2))
    last = logits(model, ids[:, INPUT:], past_key_values=cache)
    torch.testing.assert_close(last, logits(fixed, ids)[:, -1:], **CLOSE)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(ids, prefill_chunk_size=64, max_new_tokens=2)
    turn = model.new_cache()
    first = model.generate(ids[:, :30], past_key_values=turn, max_new_tokens=4, do_sample=False)
    with pytest.raises(ValueError, match="one pass into an empty cache"):
        model.generate(torch.cat([first, ids[:, :20]], dim=1), past_key_values=turn, max_new_tokens=4)


def test_sequences_of_different_lengths_are_refused_and_equal_ones_padded(mixed: Any) -> None:
    model, _, _ = mixed
    ids = random_ids(2, 100)
    mask = torch.ones(2, 100)
    mask[1, :30] = 0
    cache = model.new_cache()
    for past in ({"past_key_values": cache}, {"use_cache": False}):
        with pytest.raises(ValueError, match=r"sequences of this batch have \[70, 100\] tokens; give inputs of one"):
            model(ids, attention_mask=mask, **past)
    with pytest.raises(ValueError, match=r"have \[0\] tokens"):
        model(ids, attention_mask=torch.zeros(2, 100))
    mask[0, 70:] = 0  # padding on the right of one row and on the left of the other: 70 tokens each
    found = logits(model, ids, attention_mask=mask, past_key_values=cache)
    torch.testing.assert_close(found[:1, :70], logits(model, ids[:1, :70]), **CLOSE)
    torch.testing.assert_close(found[1:, 30:], logits(model, ids[1:, 30:]), **CLOSE)


def test_costs_are_those_of_the_window_at_the_length() -> None:
    rows: list[tuple[AnySpan, ...]] = [RULES, (FULL, Span(4, 30, 0.25)), RULES]
    assert has_length_rule(rows) and not has_length_rule(spans_at(rows, 10))
    for length in (1, 100, 1000):
        assert plan_of(rows).cost(length) == fixed_plan(rows, length).cost(length)
    # Half of a long input for every row is more than a window that grows to it.
    for span, density in ((LengthSpan(0, 0, 0.5), 0.75), (Span(0, 0, 0.5), 0.5)):
        pairs = WindowGroup.of(span).cost(Unit(1, 1), 1000).flops / FullGroup().cost(Unit(1, 1), 1000).flops
        assert pairs == pytest.approx(density, abs=0.01)


def test_a_plan_says_its_rule_only_where_it_is_by_length() -> None:
    plan = plan_of([RULES, (FULL, Span(4, 30, 0.25)), RULES])
    written = plan.model_dump(mode="json", by_alias=True)["layers"]
    assert written[0]["groups"][0] == {"target": "window", "sink": 4, "alpha": -20, "beta": 0.5, "rule": "length"}
    assert written[1]["groups"][1] == {"target": "window", "sink": 4, "alpha": 30, "beta": 0.25}
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    assert spans_of(plan) == [[*RULES], [FULL, Span(4, 30, 0.25)], [*RULES]]
    assert [[span_of(group, None) for group in layer["groups"]] for layer in written] == spans_of(plan)
