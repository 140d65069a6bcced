"""What is told of heads that tokens choose: the load of each, and what choosing skips by the plan and in time."""

from __future__ import annotations

import json
import math
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from compress.bench.kernel import Row, with_mix
from compress.bench.measure import Time
from compress.bench.model import model_row
from compress.bench.report import choosing_lines, gain_words, model_lines, routed_line
from compress.cli.app import app
from compress.data.reader import Reader
from compress.data.text import FileText
from compress.evaluate.compare import compare
from compress.evaluate.comparison import Comparison
from compress.evaluate.measure import Variant
from compress.evaluate.measures.load import LayerLoad, LoadResult, UnitLoad
from compress.evaluate.tables import markdown, tables
from compress.models.planned import all_on_model, planned_model
from compress.models.upcycle import upcycle
from compress.plan import MlpRouting, Plan, make_plan, uniform_plan
from compress.plan.skipped import STORED, Skipped, chooses, skipped
from compress.registry import measures
from compress.report.facts import read_facts
from compress.report.page import render
from compress.report.plots import evaluation_plots
from compress.report.sections import maps_of_heads
from compress.runtime.step import Record
from compress.targets.full import FullGroup
from compress.targets.routed import RoutedGroup
from tests.data.language import byte_loaded, byte_tokenizer, story
from tests.search.synthetic import make_shape

LENGTH = 96


@pytest.fixture(scope="module")
def plan() -> Plan:
    """One of two groups; and 2 of 3 query heads beside one that is always on, by the norms of their queries."""
    shape = byte_loaded().shape
    heads = RoutedGroup.layer(2, 2, shared=[0], group_size=shape.group_size, unit="head", router="norm")
    return make_plan(shape, [RoutedGroup.layer(2, 1), heads])


@pytest.fixture(scope="module")
def model(plan: Plan) -> Any:
    """Every token of its first layer chooses group 1."""
    made = planned_model(byte_loaded().model, plan)
    router = made.base_model.compress_kinds[0].mixers[0].router
    bias = torch.zeros_like(router.route)
    hidden: list[torch.Tensor] = []
    hook = made.base_model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: hidden.append(kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        made(input_ids=torch.tensor([byte_tokenizer()(story())["input_ids"][: 4 * LENGTH]]))
        hook.remove()
        # A direction in which all tokens lie on one side.
        states = hidden[0][0]
        direction = torch.linalg.lstsq(states, torch.ones(len(states), 1)).solution[:, 0]
        bias[1] = direction
        router.route.copy_(bias)
    return made


@pytest.fixture(scope="module")
def comparison(model: Any, plan: Plan, text: FileText, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    loaded = byte_loaded()
    rows = [
        Variant("dense", lambda: loaded.model, "dense", lambda length: plan.dense_cost(length, 4)),
        Variant("plan", lambda: model, "a", lambda length: plan.cost(length, 4)),
    ]
    asked = [measures["load"](text=text, length=LENGTH, windows=2)]
    return compare(loaded, rows, asked, seed=0, cache_dir=tmp_path_factory.mktemp("kept"))


def test_the_load_is_what_tokens_choose(comparison: Comparison, model: Any, text: FileText, tmp_path: Path) -> None:
    ids = Reader(byte_loaded(), 0, tmp_path, None).ids(text, "evaluation", 2 * LENGTH)
    ((found,), (none,)) = (comparison.variants[number].of("load") for number in (1, 0))
    assert none.layers == [] and none.cells() == [] and none.notes() == ""
    assert found.tokens == 2 * LENGTH
    chosen = [torch.zeros(2), torch.zeros(3)]
    probs = [torch.zeros(2), torch.zeros(3)]
    for start in (0, LENGTH):
        record = Record()
        with torch.inference_mode():
            model(input_ids=torch.tensor([list(ids[start : start + LENGTH])]), compress_record=record)
        for layer in (0, 1):
            chosen[layer] += record.routing[layer].chosen.sum(0)
            probs[layer] += record.routing[layer].probs.sum(0)
    for layer in (0, 1):
        of_layer = found.layers[layer]
        assert [unit.chosen for unit in of_layer.units] == chosen[layer].tolist()
        assert [unit.probability for unit in of_layer.units] == pytest.approx((probs[layer] / (2 * LENGTH)).tolist())
        assert of_layer.active == layer + 1
    size = byte_loaded().shape.group_size
    assert found.layers[0].shared == [] and found.layers[1].shared == [(0,)]
    assert [unit.heads for unit in found.layers[0].units] == [tuple(range(size)), tuple(range(size, 2 * size))]
    assert [unit.heads for unit in found.layers[1].units] == [(1,), (2,), (3,)]


def test_variation_and_collapse_follow_from_the_load(comparison: Comparison) -> None:
    (found,) = comparison.variants[1].of("load")
    cells = {cell.key: cell for cell in found.cells()}
    assert len(cells) == len(found.cells())
    value = {(cell.label, cell.place, cell.heads): cell.value for cell in cells.values()}
    counts = [unit.chosen for unit in found.layers[1].units]
    loads = [count / (2 * LENGTH * 2 / 3) for count in counts]
    second = math.sqrt(sum((load - 1) ** 2 for load in loads) / 3)
    assert value["variation of load", (0, None), None] == pytest.approx(1.0)  # loads of 0 and 2
    assert value["variation of load", (1, None), None] == pytest.approx(second)
    assert value["variation of load", None, None] == pytest.approx(math.sqrt((2 + 3 * second**2) / 5))
    assert value["variation of load, worst layer", None, None] == pytest.approx(max(1.0, second))
    assert value["load", (1, None), (0,)] == 1.0
    assert ("mean probability", (1, None), (0,)) not in value
    assert "collapsed: layer 0 heads 0 to 1 (0.00% of the tokens)" in found.notes()
    even = LoadResult(
        length=4,
        windows=1,
        tokens=4,
        layers=[
            LayerLoad(layer=0, active=1, units=[UnitLoad(heads=(n,), chosen=2, probability=0.5) for n in (0, 1)]),
            LayerLoad(layer=1, active=0, units=[], shared=[(0,), (1,)]),
        ],
    )
    assert even.notes() == "no unit has collapsed"
    assert [cell.value for cell in even.cells()[:3]] == [0.0, 0.0, 0.0]
    mlps = [UnitLoad(heads=(), chosen=chosen, probability=0.5) for chosen in (4, 0)]
    several = even.model_copy(update={"layers": [], "mlps": [LayerLoad(layer=3, active=1, units=mlps)]})
    assert several.notes() == "collapsed: layer 3 MLP 1 (0.00% of the tokens)"
    shares = {cell.label: cell.value for cell in several.cells()}
    assert shares["load of MLP 0"] == 1.0 and shares["variation of load of MLPs"] == 1.0


def test_of_several_models_in_one_it_tells_of_their_mlps_and_gates(text: FileText, tmp_path: Path) -> None:
    loaded = byte_loaded()
    experts = {"a": loaded.model, "b": loaded.model}
    several, _, _ = upcycle(loaded.model, experts, mlp=MlpRouting(top=1))  # routers of zeros
    mixed, _, _ = upcycle(loaded.model, experts)
    rows = [
        Variant("dense", lambda: loaded.model),
        Variant("b", lambda: several, "b"),
        Variant("c", lambda: mixed, "c"),
    ]
    asked = [measures["load"](text=text, length=LENGTH, windows=1)]
    comparison = compare(loaded, rows, asked, seed=0, cache_dir=tmp_path)
    (found,), (of_mixed,) = (variant.of("load") for variant in comparison.variants[1:])
    assert found.layers == [] and found.gates == {0: [0.5, 0.5], 1: [0.5, 0.5]}
    assert [[unit.chosen for unit in layer.units] for layer in found.mlps] == [[LENGTH, 0]] * 2  # ties go to the first
    assert "layer 1 MLP 1 (0.00% of the tokens)" in found.notes()
    values = {(cell.label, cell.place): cell.value for cell in found.cells()}
    assert values["gate of expert 1", (1, None)] == 0.5 and values["load of MLP 0", (0, None)] == 1.0
    assert of_mixed.mlp_gates == found.gates == of_mixed.gates and of_mixed.mlps == [] and of_mixed.notes() == ""
    assert {cell.label for cell in of_mixed.cells()} >= {"gate of expert 0", "gate of MLP 1"}
    assert maps_of_heads(comparison) == []


def test_tables_maps_and_plots_have_every_head(comparison: Comparison, plan: Plan, tmp_path: Path) -> None:
    grids = {grid.title: grid for grid in tables(comparison)}
    grid = grids["plan: variation of load, least load, largest load"]
    assert "collapsed: layer 0" in grid.caption and grid.rows[0] == ["0", "1.000 / 0.000 / 1.000"]
    assert len(grids) == len(tables(comparison)) and not any("mean probability" in title for title in grids)
    assert "variation of load" in markdown(comparison)
    assert any(record["part"] == "layer 1 head 2" for record in comparison.records())
    shares, probabilities = maps_of_heads(comparison)
    assert (shares.name, shares.what) == ("plan", "load") and probabilities.heads == 4
    assert shares.values[0] == {0: 0.0, 1: 0.0, 2: 1.0, 3: 1.0} and shares.values[1][0] == 1.0
    comparison.write(tmp_path / "evaluation.json")
    (tmp_path / "plan.json").write_text(plan.to_json())
    chosen, whole, dense = (Time(each, each, each, 5) for each in (2.0, 3.0, 4.0))
    kernel = Row("prefill", "s", "R75", 1, 4096, "triton", chosen, {"flash": dense}, 0.75, all_on=whole)
    bench = {"dtype": "bfloat16", "environment": {"gpus": []}, "model_rows": [], "kernel": [kernel.values()]}
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    facts = read_facts(tmp_path)
    page = render([facts], "2026-01-02", "0")
    assert "plan: load, by head" in page and 'aria-label="layer 1, head 0: 1.000"' in page
    assert f"<li>{routed_line(kernel)}</li>" in page and "1.50 times as fast" in routed_line(kernel)
    assert "collapsed: layer 0 heads 0 to 1" in page and "know no routers" in page
    total = Skipped.total(skipped(plan, 1024), comparison.variants[1].of("size")[0].block_parameters)
    words = total.words()
    assert STORED in page and words[1:] in unescape(page) and "What routing skips" in page
    names = [path.name for path in evaluation_plots(tmp_path)]
    assert names[:4] == ["layers.svg", "layers.png", "heads.svg", "heads.png"]
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "plan.json")])
    words = " ".join(result.output.split())
    assert result.exit_code == 0 and STORED in words and "head groups see everything for every token" in words


def test_what_choosing_skips_is_the_plan_with_all_on_less_the_plan(plan: Plan) -> None:
    shape, length = plan.model, 1024
    first, second = skipped(plan, length)
    attention = 4 * shape.head_dim * shape.query_heads * length * (length + 1) // 2
    cache = length * 2 * shape.kv_heads * 2 * shape.head_dim
    assert (first.attention_flops, first.cache_bytes) == (attention, cache)
    assert (first.flops, first.bytes) == (attention // 2, cache // 2)
    # Heads: a third of three is off. Group 0 has a head that is always on; of group 1 both are off for no token.
    assert second.of_attention == pytest.approx(1 / 4) and second.bytes == 0
    total = Skipped.total([first, second], weights=1000)
    assert total.of_prefill == (first.flops + second.flops) / (2 * attention + 2 * length * 1000)
    assert total.of_step(3) == 3 * first.bytes / (6 * cache + 2 * 1000)
    assert "next to nothing" not in total.words()
    assert total.words().startswith("at 1,024 tokens a prefill skips 37.5% of the attention's FLOPs, ")
    heavy = Skipped.total([first, second], weights=10**9)
    assert heavy.words().count("next to nothing") == 2
    assert chooses(plan) and not chooses(uniform_plan(shape, FullGroup()))
    assert not chooses(uniform_plan(shape, RoutedGroup(active=2, of=2)))


def test_a_bench_tells_of_times_with_all_heads_on(model: Any, plan: Plan) -> None:
    dense = byte_loaded().model
    twin = all_on_model(model)
    assert twin is not None and all_on_model(twin) is None and all_on_model(dense) is None
    groups = [group for layer in twin.config.compress_plan["layers"] for group in layer["groups"]]
    assert all(group["active"] == group["of"] for group in groups)
    kinds = twin.base_model.compress_kinds[0].mixers[0]
    assert torch.equal(kinds.router.route, model.base_model.compress_kinds[0].mixers[0].router.route)
    row = model_row(dense, model, "tiny", "routed", 2, 80, steps=16, plan=plan)
    assert row.all_on is not None and row.skips is not None
    values = json.loads(json.dumps(row.values()))
    assert values["prefill_speedup_of_choosing"] == row.all_on.prefill / row.plan.prefill
    assert values["decode_cache_bytes_skipped"] == 0.25
    lines = "\n".join(model_lines(row))
    assert all(line in lines for line in choosing_lines(row)) and "not read are 25.0% of the cache" in lines
    assert gain_words(1.5) == "1.50 times as fast" and gain_words(1.0) == "nothing is saved (1.00 times)"
    named = model_row(dense, with_mix(dense, "R50", 80), "tiny", "R50", 1, 80, steps=16)
    assert named.skips is not None and named.skips.of_cache == named.skips.of_attention == 0.5


def test_the_figures_of_the_docs_are_those_of_the_account() -> None:
    groups, size, layers, hidden = 8, 4, 32, 4096
    shape = make_shape(layers, groups).model_copy(update={"query_heads": groups * size, "head_dim": 128})
    weights = layers * hidden * (2 * 128 * (groups * size + groups) + 3 * 14336 + 2)
    heads = RoutedGroup.layer(groups, 8, shared=range(16), group_size=size, unit="head", router="norm")
    wide = RoutedGroup.layer(groups, 2, shared=range(4), router="norm")
    table = (Path(__file__).parents[2] / "docs" / "routed.md").read_text(encoding="utf-8")
    for length in (2048, 8192, 32768, 131072):
        one, two = (
            Skipped.total(skipped(make_plan(shape, [layer] * layers), length), weights) for layer in (heads, wide)
        )
        assert f"{one.of_prefill:.1%}" == f"{two.of_prefill:.1%}"
        shares = [one.of_prefill, one.of_cache, two.of_cache]
        step = f"{two.of_step():.1%} and {two.of_step(16):.1%}"
        assert f"| {length:,} | {' | '.join(f'{share:.1%}' for share in shares)} | {step} |" in table
