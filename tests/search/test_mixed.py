"""One plan that windows some head groups and removes others and neurons, from the profile to the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.models.load import load_model
from compress.models.planned import planned_model
from compress.models.pruning import block_parameters
from compress.models.shape import shape_of
from compress.plan import read_plan
from compress.targets.full import FullGroup
from compress.targets.window import WindowGroup
from tests.calls import checked
from tests.cli.recipes import HEAD, make_recipe
from tests.tiny import random_ids, tiny_model

MIXED = (
    HEAD
    + """\
  documents:
    - {{task: continuation, length: 320, count: 2, answer: text, answer_tokens: 64}}
  held_out:
    - {{task: continuation, length: 384, count: 1, answer: text, answer_tokens: 64}}
profile:
  statistics:
    - {{name: influence, grid: {{sinks: [4]}}}}
    - {{name: taylor}}
search:
  solver: {{name: moa, points: 0, removal: {{weights: [1, 4], multiple: 2}}}}
  budget: {{kv: 0.5, parameters: 0.85, flops: 0.9, lengths: [320]}}
  refine: {{minutes: 5, samples: 2}}
evaluate:
  compare: [plan, uniform, random]
  perplexity: {{text: *text, length: 256, windows: 1}}
"""
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a profile, a search and a checkpoint."""
    folder = tmp_path_factory.mktemp("mixed")
    recipe = make_recipe(folder, tiny_model("llama-mha"))
    recipe.write_text(MIXED.format(model=folder / "model", text=folder / "text.txt", output=folder / "run"))
    (folder / "said.txt").write_text(
        "".join(checked(command, recipe).stderr for command in ("profile", "search", "export"))
    )
    return folder


def test_a_plan_windows_and_prunes_at_once_within_both_budgets(run: Path) -> None:
    report = json.loads((run / "run" / "search" / "pareto.json").read_text())
    limits = {row["kind"]: row for row in report["limits"]}
    assert set(limits) == {"kv", "parameters", "flops"}
    dense = load_model(str(run / "model"), dtype="float32", device="cpu").model
    mixed = 0
    for row in report["plans"]:
        plan = read_plan(run / "run" / "search" / "plans" / f"{row['name']}.json", shape_of(dense))
        model = planned_model(dense, plan)
        assert plan.predicted.of("parameters")[None].plan == block_parameters(model) <= limits["parameters"]["limit"]
        ids = random_ids(1, 320)
        with torch.inference_mode():
            out = model(ids, use_cache=True)
        cache = out.get("cache", out.get("past_key_values"))
        assert plan.predicted.of("kv")[320].plan == cache.allocated_bytes() <= limits["kv"]["limit"]
        flops = plan.cost(320).flops + 2 * 320 * block_parameters(model)
        assert flops <= limits["flops"]["limit"] < limits["flops"]["dense"]
        windows = any(group.target == "window" for layer in plan.layers for group in layer.groups)
        mixed += windows and plan.prunes
    assert mixed == len(report["plans"]) == 4  # two weights of removal, neurons alone, and the refined one
    assert report["refine"]["loss"] <= report["refine"]["start_loss"]
    names = {row["name"] for row in report["baselines"]}
    assert {"uniform", "streaming", "random"} <= names
    chosen = read_plan(run / "run" / "plan.json")
    other = read_plan(run / "run" / "search" / "random.json")
    assert other.predicted.of("parameters")[None].plan == chosen.predicted.of("parameters")[None].plan
    assert other.predicted.of("kv") == chosen.predicted.of("kv") and other.layers != chosen.layers


def test_its_checkpoint_holds_what_was_predicted(run: Path) -> None:
    plan = read_plan(run / "run" / "plan.json")
    checks = json.loads((run / "run" / "checkpoint" / "compress_checks.json").read_text())
    assert checks["predicted_bytes"] == checks["cache_bytes"] == plan.cost(checks["probe_tokens"], 4).held_bytes
    said = (run / "said.txt").read_text()
    assert "of the decoder layers' parameters" in said and "of the dense model's FLOPs" in said
    assert "KiB at 320 tokens" in said and "of the dense KV bytes" in said


PRICED = """\
search:
  solver: {name: priced, part: signed, points: 0, removal: {weights: [1]}}
  budget: {kv: 0.5, parameters: 0.85, lengths: [320]}
evaluate:"""
EFFECT = """\
profile:
  statistics:
    - name: effect
      targets:
        - {target: window, sink: 4, alpha: 64, beta: 0.0}
        - {target: window, sink: 4, alpha: 128, beta: 0.0}
        - {target: pruned}
    - {name: taylor}
"""


def test_targets_that_effect_priced_are_chosen_without_any_table_of_rules(run: Path) -> None:
    recipe = run / "priced.yaml"
    text = (run / "recipe.yaml").read_text().replace(f"output: {run / 'run'}", f"output: {run / 'priced'}")
    head, _, rest = text.partition("profile:\n")
    recipe.write_text(head + EFFECT + PRICED + rest.partition("evaluate:")[2])
    checked("validate", recipe)
    checked("profile", recipe)
    checked("search", recipe)
    plan = read_plan(run / "priced" / "plan.json")
    chosen = {group.model_dump_json() for layer in plan.layers for group in layer.groups if not group.removes}
    asked = {
        row.model_dump_json() for row in (FullGroup(), *(WindowGroup(sink=4, alpha=a, beta=0.0) for a in (64, 128)))
    }
    assert plan.prunes and len(chosen) > 1 and chosen <= asked
    (dense,) = {row["dense"] for row in _limits(run / "priced") if row["kind"] == "kv"}
    assert plan.predicted.of("kv")[320].plan <= 0.5 * dense


def _limits(folder: Path) -> Any:
    return json.loads((folder / "search" / "pareto.json").read_text())["limits"]
