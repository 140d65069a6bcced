"""A recipe that prunes, from profile to report: what every command says of it, and what follows from its checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compress.models.load import load_model
from compress.models.source import ModelSource
from compress.plan import read_plan, removal
from compress.recipe.load import load_recipe
from compress.report.facts import read_facts
from compress.report.sections import costs, head_map, headline, quality_charts
from compress.stages.evaluate import row_names
from tests.calls import call
from tests.cli.recipes import HEAD, make_recipe
from tests.tiny import random_ids
from tests.train.common import model_of

PRUNE = (
    HEAD
    + """\
  second: *text
  documents:
    - {{task: continuation, length: 128, count: 2, answer: text, answer_tokens: 64}}
profile:
  statistics:
    - {{name: amp}}
search:
  solver: {solver}
  budget: {{parameters: 0.7}}
recover: {{length: 32, batch_size: 4, steps: 3, rate: 0.01, control: true}}
export: {{form: auto}}
evaluate:
  compare: [plan, random]
  perplexity: {{text: *text, length: 128, windows: 2}}
  latency: {{length: 64, batch: 2, steps: 16}}
"""
)
ROWS = ["dense", "plan", "plan before recovery", "dense, recovered", "random before recovery"]


def run(folder: Path, solver: str) -> str:
    """Run the recipe with a solver; what it told."""
    recipe = make_recipe(folder, model_of())
    recipe.write_text(
        PRUNE.format(model=folder / "model", text=folder / "text.txt", output=folder / "run", solver=solver)
    )
    result = call("run", recipe)
    assert result.exit_code == 0, result.output
    return result.stderr


def rows_of(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an evaluation with each result under its measure."""
    return [row | {result["measure"]: result for result in row["results"]} for row in evaluation["variants"]]


def recipe_on(checkpoint: Path, folder: Path) -> Path:
    """A recipe of windows that starts from a checkpoint."""
    recipe = make_recipe(folder)
    recipe.write_text(recipe.read_text().replace(f"model: {folder / 'model'}", f"model: {checkpoint}"))
    return recipe


@pytest.fixture(scope="module")
def equal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with one width in all layers."""
    folder = tmp_path_factory.mktemp("equal")
    told = run(folder, "{name: amp, multiple: 1}")
    assert "on two corpora" in told and "form native, as LlamaForCausalLM" in told
    return folder


@pytest.fixture(scope="module")
def by_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with widths by layer, the first of which is left whole."""
    folder = tmp_path_factory.mktemp("by-layer")
    assert "form patched, because" in run(folder, "{name: allocated, multiple: 1, protect: [0]}")
    return folder


def test_every_row_has_its_exact_parameters_and_its_time(equal: Path) -> None:
    rows = rows_of(json.loads((equal / "run" / "evaluation.json").read_text()))
    assert [row["name"] for row in rows] == ROWS == row_names(load_recipe(equal / "recipe.yaml"))
    plan = read_plan(equal / "run" / "plan.json")
    amount = plan.predicted.of("parameters")[None]
    small, whole = amount.plan, amount.dense
    assert [row["size"]["block_parameters"] for row in rows] == [whole, small, small, whole, small]
    checkpoint = transformers.AutoModelForCausalLM.from_pretrained(equal / "run" / "checkpoint")
    assert rows[1]["size"]["parameters"] == sum(weight.numel() for weight in checkpoint.parameters())
    for row in rows:
        times = [row["latency"][side][name] for side in ("own", "dense") for name in ("prefill_ms", "decode_ms")]
        assert min(times) > 0
    assert rows[0]["latency"]["own"] == rows[0]["latency"]["dense"]
    cached = [row["latency"]["own"]["cache_bytes"] for row in rows]
    assert cached[0] == cached[3] > cached[1] == cached[2] == cached[4]


def test_the_commands_tell_of_removed_heads(equal: Path) -> None:
    told = call("validate", equal / "recipe.yaml").stdout
    assert "0.7" in told and "time at 64 tokens" in told and "random before" in told
    shown = call("inspect", equal / "run").stdout
    plan = read_plan(equal / "run" / "plan.json")
    left = removal(plan)
    assert left is not None and left in shown.replace("\n", " ")
    lines = [line.split() for line in shown.splitlines()]
    for number, layer in enumerate(plan.layers):
        cells = ["-" if group.target == "pruned" else "full" for group in layer.groups]
        assert layer.mlp is not None
        assert [str(number), *cells, "2", str(layer.mlp.kept)] in lines
    assert "3 of 3 head groups that stay see everything" in shown


def test_the_report_opens_with_parameters(equal: Path) -> None:
    facts = read_facts(equal / "run")
    assert facts.plan is not None
    found = headline(facts)
    share = facts.plan.predicted.of("parameters")[None].fraction
    assert found["shares"][0] == (share, "of the decoder layers' parameters")
    assert found["lines"][0] == removal(facts.plan) and any("decode step" in line for line in found["lines"])
    heads = head_map(facts)
    assert heads is not None
    cells = [cell for row in heads["layers"] for cell in row]
    assert len(cells) == 6 and sum(cell["words"][0].endswith(": removed") for cell in cells) == 3
    assert {cell["level"] for cell in cells if cell["target"] == "pruned"} == {0}
    assert costs(facts)[0]["prefill_sparsity"] == costs(facts)[0]["decode_sparsity"] == 0.5
    (chart,) = next(each.charts for each in quality_charts([facts]) if each.cost == "parameters of the layers")
    shares = [one.points[0][0] for one in chart.series]
    assert [one.label for one in chart.series] == ROWS
    assert shares == pytest.approx([1, share, share, 1, share])
    page = (equal / "run" / "report.html").read_text()
    assert "Quality against parameters of the layers" in page and "of the decoder layers&#39; parameters" in page


def test_the_card_is_that_of_an_ordinary_model(equal: Path, by_layer: Path) -> None:
    card = (equal / "run" / "checkpoint" / "README.md").read_text()
    assert "as an ordinary LlamaForCausalLM" in card and "whole heads and neurons were removed" in card
    assert "slide" not in card and "sparse-attention" not in card and "remote_code" not in card
    assert "of the decoder layers' parameters" in card and "random before recovery" in card
    other = (by_layer / "run" / "checkpoint" / "README.md").read_text()
    whole = "6 of 6 head groups, 12 of 12 query heads" in other
    assert ("whole neurons were removed" in other) == whole and "computes the\nsame with a cache of its own" in other
    assert "a width of its own for every layer." in other and "trust_remote_code=True" in other
    assert "it expects layers of one width" in other


def test_spans_are_searched_on_the_pruned_checkpoint(equal: Path, tmp_path: Path) -> None:
    checkpoint = equal / "run" / "checkpoint"
    recipe = recipe_on(checkpoint, tmp_path)
    shutil.rmtree(tmp_path / "model")
    result = call("run", recipe)
    assert result.exit_code == 0, result.output
    card = (tmp_path / "run" / "checkpoint" / "README.md").read_text()
    left = removal(read_plan(checkpoint / "compress_plan.json"))
    assert left is not None and left in card and "a span of its own" in card


def test_a_checkpoint_with_widths_of_its_own_is_measured_beside_the_model_it_came_from(
    by_layer: Path, tmp_path: Path
) -> None:
    dense, checkpoint = by_layer / "model", by_layer / "run" / "checkpoint"
    options = ["--latency", 64, "--batch", 2, "--device", "cpu", "--out", tmp_path / "eval", "--json"]
    result = call("eval", dense, checkpoint, *options)
    assert result.exit_code == 0, result.output
    rows = rows_of(json.loads(result.stdout))
    plan = read_plan(by_layer / "run" / "plan.json")
    assert rows[1]["size"]["block_parameters"] == plan.predicted.of("parameters")[None].plan
    told = call("eval", checkpoint, "--latency", 64)
    assert told.exit_code == 2 and "compress eval DENSE CHECKPOINT" in told.stderr
    bench = ["bench", checkpoint, "--what", "model", "--lengths", 64, "--dtype", "float32", "--device", "cpu"]
    told = call(*bench)
    assert told.exit_code == 2 and "--dense DENSE" in told.stderr
    result = call(*bench, "--dense", dense, "--json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["model_rows"]
    assert (row["parameters"], row["dense_parameters"]) == tuple(rows[i]["size"]["parameters"] for i in (1, 0))
    assert row["most_any_plan_gains"] is None


def test_a_checkpoint_that_carries_a_plan_is_no_model_to_start_from(by_layer: Path, tmp_path: Path) -> None:
    told = call("validate", recipe_on(by_layer / "run" / "checkpoint", tmp_path))
    assert told.exit_code == 2 and "already carries a plan" in told.stderr


def test_the_bench_runs_a_checkpoint_as_it_is_meant_to(by_layer: Path) -> None:
    checkpoint = by_layer / "run" / "checkpoint"
    source = ModelSource(str(checkpoint))
    assert source.has_own_widths
    own = source.carried(torch.device("cpu"), torch.float32)
    brought = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    ids = random_ids(2, 40)
    with torch.no_grad():
        assert torch.equal(own(ids).logits, brought(ids).logits)
    assert not ModelSource(str(by_layer / "model")).has_own_widths
    assert load_model(str(by_layer / "model")).model.config.model_type == "llama"
