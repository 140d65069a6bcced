"""What the plugin for vLLM decides without vLLM: which blocks a cache holds, which prefixes serve, what it refuses."""

import ast
import random
import re
import tomllib
from itertools import product
from pathlib import Path

import pytest
import torch

import compress_vllm
from compress import registry
from compress.models.planned import runtime_plan
from compress.plan import LayerPlan, Mlp, plan_of_layers
from compress.runtime.families import FAMILIES
from compress.runtime.span import Span
from compress.runtime.widths import Width
from compress.targets.full import FullGroup
from compress.targets.pruned import PrunedGroup
from compress.targets.window import WindowGroup
from compress_vllm.families import BY_CLASS, ROWS
from compress_vllm.plan import REFUSED, Layer, check_attention, check_ranks, of_rank, parts_of, read_layers, slot_of
from compress_vllm.routers import routers_kept
from compress_vllm.rule import BETA_UNIT, Rule
from tests.tiny import mixed_plan, random_ids, shape_of, tiny_model

PLUGIN = Path(__file__).parents[2] / "plugins" / "vllm"
SPANS = [
    Span(sink, alpha, beta, granule)
    for sink, alpha, beta, granule in product((0, 5, 64), (-70, 1, 37, 200), (0, 0.125, 0.5, 1), (1, 64))
]


def rule_of(span: Span) -> Rule:
    return Rule(span.sink, span.alpha, span.beta_units, span.granule)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama-gqa")


def test_the_rule_is_that_of_the_checkpoints_own_code():
    positions = torch.arange(700)
    for span in SPANS:
        rule = rule_of(span)
        assert rule.is_full == span.is_full
        expected = span.first(positions)
        assert torch.equal(rule.first(positions), expected)
        assert [rule.first(t) for t in range(700)] == expected.tolist()


def test_rules_that_the_mask_of_vllm_can_say():
    t, j = torch.arange(300)[:, None], torch.arange(300)[None]
    for span in SPANS:
        rule = rule_of(span)
        masked = (j <= t) & ((j < rule.sink) | (t - j < max(1, rule.alpha)))
        assert not rule.is_rswa or torch.equal(span.visible(t, j), masked)
    assert {rule_of(span).is_rswa for span in SPANS} == {True, False}


@pytest.mark.parametrize("block", [16, 48])
def test_a_block_is_held_exactly_while_a_later_query_sees_it(block):
    for span in SPANS:
        rule = rule_of(span)
        for tokens in (1, 16, *range(144, 160), 329):  # windows leave a block at one of these
            queries = torch.arange(tokens, tokens + 150)[:, None]
            seen = span.visible(queries, torch.arange(tokens)[None]).any(dim=0)
            expected = {int(key) // block for key in seen.nonzero()}
            if tokens % block:
                expected.add(tokens // block)  # the next token goes there
            assert rule.held(tokens, block) == sorted(expected)


def test_no_request_holds_more_blocks_than_was_promised():
    for span, in_flight in product(SPANS, (1, 40)):
        rule = rule_of(span)
        for done in range(0, 500, 7):
            there = min(done + in_flight, 500)
            start, end = rule.gap(done, 16)
            assert -(-there // 16) - (end - start) <= rule.most_blocks(in_flight, 500, 16)


@pytest.mark.parametrize("beyond", [0, 1])
@pytest.mark.parametrize("step", [1, 32])
def test_a_cached_prefix_serves_where_sink_and_window_are_there(step, beyond):
    chance = random.Random(0)
    for span in SPANS:
        rule = rule_of(span)
        for _ in range(6):
            there = [chance.random() < 0.85 for _ in range(20)]
            fits = [
                end
                for end in range(1, 21 - beyond)
                if end * 16 % step == 0
                and all(there[number] for number in rule.held(end * 16, 16))
                and all(there[end : end + beyond])
            ]
            assert rule.hit(there.__getitem__, 20, 16, step, beyond) == max(fits, default=0)


def test_a_hit_needs_the_sink_and_does_not_need_what_was_freed():
    rule = Rule(sink=20, alpha=30, beta_units=0)
    freed = [number in rule.held(160, 16) for number in range(10)]
    assert freed == [True, True, *[False] * 6, True, True]
    assert rule.hit(freed.__getitem__, 10, 16) == 10
    assert rule.hit([False, *freed[1:]].__getitem__, 10, 16) == 0
    assert rule.hit([*freed[:9], False].__getitem__, 10, 16) == 2  # up to the end of the sink


def test_a_plan_is_read_as_the_checkpoints_own_code_reads_it(model):
    shape, config = shape_of(model), model.config
    window = WindowGroup(sink=64, alpha=70, beta=0.25)
    narrow = LayerPlan(groups=(window, PrunedGroup()), queries=(0,), mlp=Mlp.of(range(40)))
    whole = LayerPlan(groups=(FullGroup(), WindowGroup(sink=0, alpha=0, beta=1.0)))
    plan = runtime_plan(plan_of_layers(shape, [narrow, whole, whole]))
    layers = read_layers(plan, BY_CLASS["CompressLlamaForCausalLM"], config)
    assert layers[0].rules == (Rule(64, 70, 256),) and layers[1].rules == (None, None)
    for layer, entry in zip(layers, plan["layers"], strict=True):
        assert Width(layer.query_heads, len(layer.rules), layer.neurons) == Width.of_plan(entry, config)


def test_every_target_is_served_or_refused_with_what_it_would_need(model):
    own = {name: target for name, target in registry.targets.items() if target.__module__.startswith("compress.")}
    assert {"full", "window", "pruned"} == {name for name, target in own.items() if target.in_vllm}
    refused = {name: "an implementation in this plugin" for name, target in own.items() if not target.in_vllm} | REFUSED
    for name, needs in refused.items():
        plan = {"layers": [{"groups": [{"target": "full"}, {"target": name}]}]}
        with pytest.raises(
            ValueError, match=re.escape(f"layer 0 group 1: vLLM cannot serve the target `{name}`")
        ) as told:
            read_layers(plan, BY_CLASS["CompressLlamaForCausalLM"], model.config)
        assert needs in str(told.value)
    by_length = WindowGroup(sink=4, alpha=8, beta=0.5, rule="length").model_dump(mode="json")
    with pytest.raises(ValueError, match="by the length of the input"):
        read_layers({"layers": [{"groups": [by_length]}]}, BY_CLASS["CompressLlamaForCausalLM"], model.config)
    with pytest.raises(ValueError, match="cannot serve several models as one"):
        read_layers({"layers": [{"groups": [], "mlp": {"experts": 2}}]}, ROWS[0], model.config)


def test_modules_have_equal_numbers_of_heads_and_cover_each_group_once(model):
    row = BY_CLASS["CompressLlamaForCausalLM"]
    layers = read_layers(runtime_plan(mixed_plan(shape_of(model))), row, model.config)
    small, large = Rule(4, 30, 0), Rule(4, 90, 0)
    layers += [Layer((small, None, None, small, large, None, None, large), 8, 64)]
    assert slot_of(layers, 1) == 1 and slot_of(layers[-1:], 1) == 2
    for layer in layers:
        for slot in (1, slot_of([layer], 1)):
            parts = parts_of(layer.rules, slot)
            assert sorted(group for part in parts for group in part.groups) == list(range(len(layer.rules)))
            assert all(layer.rules[group] == part.rule for part in parts for group in part.groups)
            assert {len(part.groups) for part in parts} == {slot}


def test_ranks_need_the_same_spans_in_any_order():
    small, large = Rule(4, 30, 0), Rule(4, 90, 0)
    even = Layer((small, None, None, small), 8, 64)
    check_ranks([even], 2)
    parts = [parts_of(of_rank(even.rules, rank, 2), slot_of([even], 2)) for rank in (0, 1)]
    assert [part.rule for part in parts[0]] == [part.rule for part in parts[1]] and parts[0] != parts[1]
    check_ranks([Layer((small, small), 8, 64)], 4)  # each group on two ranks
    assert of_rank((small, large), 2, 4) == (large,)
    for rules in ((small, small, None, None), (small, large)):
        with pytest.raises(ValueError, match=r"layer 1: the head groups of the ranks .* have different spans"):
            check_ranks([even, Layer(rules, 8, 64)], 2)
    with pytest.raises(ValueError, match="3 head groups do not divide among 2 ranks"):
        check_ranks([Layer((None,) * 3, 6, 64)], 2)


def test_attention_that_vllm_makes_otherwise_than_the_model_is_refused():
    qwen, sliding = tiny_model("qwen2").config, tiny_model("qwen2-part-sliding").config
    check_attention("layers.1.attn", 1, 12, None, qwen)
    check_attention("layers.0.attn", 0, 12, None, sliding)
    check_attention("layers.2.attn", 2, 12, 50, sliding)
    with pytest.raises(ValueError, match=r"layers.1.attn: heads have 12 numbers, and .* takes 16"):
        check_attention("layers.1.attn", 1, 16, None, qwen)
    with pytest.raises(ValueError, match=r"layers.2.attn: the layer slides over 50 tokens by itself"):
        check_attention("layers.2.attn", 2, 12, None, sliding)
    with pytest.raises(ValueError, match=r"layers.0.attn: the layer sees everything, and .* over 50 tokens"):
        check_attention("layers.0.attn", 0, 12, 50, sliding)


def test_the_families_are_those_of_the_checkpoints():
    assert [row.model_type for row in ROWS] == sorted(FAMILIES)
    for row in ROWS:
        family = FAMILIES[row.model_type]
        assert row.architecture == family.architecture and row.planned == f"{family.planned}ForCausalLM"
        assert (row.groups, row.neurons, row.experts) == (family.groups, family.neurons, family.has_experts)


def test_a_router_that_is_no_linear_layer_computes_the_same():
    model = tiny_model("phimoe")
    with routers_kept():
        kept = type(model)(model.config).eval()
    kept.load_state_dict(model.state_dict())
    ids = random_ids(2, 40)
    assert not any(type(module).__name__ == "PhimoeTopKRouter" for module in kept.modules())
    with torch.no_grad():
        assert torch.equal(kept(ids).logits, model(ids).logits)
    assert any(type(module).__name__ == "PhimoeTopKRouter" for module in type(model)(model.config).modules())


def test_the_plugin_stands_alone():
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    found = re.search(r"vllm>=(\d+\.\d+),<(\d+\.\d+)", project["dependencies"][0])
    assert found is not None
    low, high = found.groups()
    tested = compress_vllm.TESTED
    assert tested[0] == low and f"0.{int(tested[-1].split('.')[1]) + 1}" == high
    assert project["entry-points"]["vllm.general_plugins"] == {"compress": "compress_vllm:register"}
    for path in (PLUGIN / "compress_vllm").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.partition(".")[0] == "compress"], path
    assert BETA_UNIT == 1024
