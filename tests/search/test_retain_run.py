"""Heads that keep tokens from the profile to the evaluation, beside windows, one share and one threshold for all."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from compress.cli.validate import table
from compress.evaluate.comparison import Comparison, read_comparison
from compress.export.card import render_card
from compress.export.verify import Checks
from compress.models.prepared import read_prepared
from compress.plan import Plan, read_plan
from compress.recipe.defaults import Situation
from compress.recipe.load import load_recipe
from compress.report.facts import Facts
from compress.report.sections import costs
from compress.stages.expectation import expectation
from tests.calls import checked
from tests.cli.recipes import HEAD, make_recipe
from tests.tiny import tiny_model

RECIPE = (
    HEAD
    + """\
  documents:
    - {{task: continuation, length: 320, count: 1, answer: text, answer_tokens: 64}}
profile:
  statistics:
    - name: effect
      targets: [{{target: window, sink: 4, alpha: 64, beta: 0.0}}]
prepare:
  targets: [{{target: retain, scorer: ridge}}]
  effect: true
  options: {{retain: {{alphas: [64], shares: [0.125, 0.5], caps: [1.5]}}}}
  objectives: [{{name: reconstruction, documents: 2, lengths: [64, 128]}}]
  length: 128
  batch_size: 2
  steps: 2
search:
  solver: {{name: priced}}
  budget: {{kv: 0.6, lengths: [512]}}
evaluate:
  compare: [plan, uniform-share, global-threshold]
  perplexity: {{text: *text, length: 512, windows: 1}}
"""
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a search, and the folder's recipe."""
    folder = tmp_path_factory.mktemp("retain")
    recipe = make_recipe(folder, tiny_model("llama-gqa"))
    recipe.write_text(RECIPE.format(model=folder / "model", text=folder / "text.txt", output=folder / "run"))
    said = "".join(checked(command, recipe).output for command in ("profile", "prepare", "search"))
    (folder / "said.txt").write_text(said)
    return folder


@pytest.fixture(scope="module")
def plan(run: Path) -> Plan:
    return read_plan(run / "run" / "plan.json")


@pytest.fixture(scope="module")
def comparison(run: Path) -> Comparison:
    checked("eval", run / "recipe.yaml")
    return read_comparison(run / "run" / "evaluation.json")


def test_a_plan_has_thresholds_of_its_head_groups_and_holds_the_budget_on_average(run: Path, plan: Plan) -> None:
    (option,) = read_prepared(run / "run" / "options")
    assert option.retention is not None
    kept = 0
    for number, layer in enumerate(plan.layers):
        for place, group in enumerate(layer.groups):
            if group.target == "retain":
                fields, kept = group.model_dump(), kept + 1
                threshold, spread = option.retention.at(fields["share"])
                assert fields["threshold"] == float(threshold[number, place])
                assert fields["spread"] == float(spread[number, place])
    assert kept
    report = json.loads((run / "run" / "search" / "pareto.json").read_text())
    (limit,) = report["limits"]
    amount = plan.predicted.of("kv")[512]
    cost = plan.cost(512, 4)
    assert limit["smallest"] <= amount.plan <= limit["limit"] and amount.plan >= cost.held_bytes
    assert (
        amount.most is not None and amount.most >= cost.most_bytes > amount.plan and amount.spread == cost.spread_bytes
    )
    for name in ("uniform", "uniform-share", "global-threshold", "random"):
        beside = read_plan(run / "run" / "search" / f"{name}.json")
        assert beside.cost(512, 4).held_bytes <= limit["limit"]
    alike = read_plan(run / "run" / "search" / "global-threshold.json")
    assert len({group.model_dump()["threshold"] for layer in alike.layers for group in layer.groups}) == 1


def test_commands_say_what_is_a_mean_how_it_spreads_and_what_bounds_it(run: Path, plan: Plan) -> None:
    said = " ".join((run / "said.txt").read_text().split())
    assert "on average over texts, whose standard deviation is at most" in said
    assert "50% by ridge, at most 64 + 0.75 of the position, nats to first order" in said
    shown = " ".join(checked("inspect", run / "run").output.split())
    assert "any text, at most" in shown and "thresholds" in shown and "shares of texts deviate by" in shown
    kinds = {group.anywhere for layer in plan.layers for group in layer.groups if group.target == "retain"}
    assert shown.count("by ridge") == len(kinds)  # and not one for each threshold
    listed = " ".join(checked("inspect", run / "run" / "options").output.split())
    assert listed.count("by ridge") == 3


def test_before_a_run_options_are_told_with_their_bounds(run: Path, plan: Plan) -> None:
    recipe = load_recipe(run / "recipe.yaml")
    console = Console(file=StringIO(), width=240)
    console.print(table(recipe, Situation(shape=plan.model)))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "expected: 2 options: 52.7% to 76.6% of a head group's" in shown and "known after" not in shown
    assert re.search(r"spread: \d\.\d% to \d\.\d% of a head group's KV bytes,", shown)
    assert "bound: 76.6% to 102.1% of any text" in shown
    budget = recipe.search.budget.model_copy(update={"kv": None, "kv_bound": 0.5})
    section = recipe.search.model_copy(update={"budget": budget})
    bound = expectation(recipe.model_copy(update={"search": section}), plan.model)
    assert bound is not None and "the budget asks for the bound" in bound.mean
    (target,) = recipe.prepare.targets if recipe.prepare is not None else ()
    open_ended = recipe.prepare.model_copy(update={"effect": False, "options": {}}) if recipe.prepare else None
    one = expectation(recipe.model_copy(update={"prepare": open_ended}), plan.model)
    assert bound.spread == "known after prepare, from its texts"
    assert one is not None and "as large as the budget holds" in one.mean and "no cap" in one.bound
    assert target.idle and expectation(recipe.model_copy(update={"prepare": None}), plan.model) is None


def test_an_evaluation_measures_what_its_texts_hold(run: Path, plan: Plan, comparison: Comparison) -> None:
    for row in comparison.variants:
        cells = {cell.label: cell for result in row.of("kv_held") for cell in result.cells()}
        beside = run / "run" / "search" / f"{row.name}.json"
        made = plan if row.name == "plan" else read_plan(beside) if beside.is_file() else None
        if made is None or not made.in_expectation:
            assert not cells and row.name == "dense"
            continue
        cost = made.cost(512, 4)
        assert cells["expected mean"].value == cost.held_bytes and cells["any text, at most"].value == cost.most_bytes
        assert cells["expected spread, at most"].value == cost.spread_bytes
        assert cells["measured mean"].count == 4 and cells["measured spread"].value >= 0
        assert 0.7 * cost.held_bytes < cells["measured mean"].value <= cost.most_bytes
    shown = checked("eval", run / "recipe.yaml").output
    assert "KV bytes that texts hold" in shown and "4 texts of 512 tokens" in shown


def test_the_card_and_the_report_tell_a_mean_from_a_bound(plan: Plan) -> None:
    checks = Checks(100, 0.0, 1e-4, "", 1, 1, 2, "CompressLlamaForCausalLM")
    facts: dict[str, Any] = {"name": "x", "source": {}, "dtype": "float32", "itemsize": 4, "context": 1024}
    card = render_card(plan, **facts, checks=checks, versions={"transformers": "5"})
    assert "token-eviction" in card and "depends on the text" in card and "scorers that say which older tokens" in card
    cost, dense = plan.cost(512, 4), plan.dense_cost(512, 4).held_bytes
    row = next(line for line in card.splitlines() if line.startswith("| 1024 |"))
    assert row.count("|") == 7 and "any text, at most" in card
    shown = Facts("x", Path(), None, plan, None, {}, {}, None, {}, None, {})
    about = next(row for row in costs(shown) if row["length"] == 8192)
    assert 0 < about["spread"] < about["share"] < about["most"] < 1
    assert cost.held_bytes < cost.most_bytes < dense
