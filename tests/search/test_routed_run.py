"""Routed layers beside windows from the profile to the checkpoint, and what stands beside such a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress.evaluate.comparison import read_comparison
from compress.models.load import load_model
from compress.models.planned import planned_model
from compress.models.pruning import block_parameters
from compress.plan import Plan, read_plan
from compress.profile.key import Key
from compress.profile.store import read_profile
from tests.calls import checked
from tests.cli.recipes import HEAD, make_recipe
from tests.tiny import tiny_model

RECIPE = (
    HEAD
    + """\
  documents:
    - {{task: continuation, length: 320, count: 1, answer: text, answer_tokens: 64}}
  held_out:
    - {{task: continuation, length: 384, count: 1, answer: text, answer_tokens: 64}}
profile:
  statistics:
    - name: effect
      targets: [{{target: window, sink: 4, alpha: 64, beta: 0.0}}]
      options: {{routed: {{shared: [0, 0.25], shared_by: removal}}}}
    - {{name: removal}}
search:
  solver: {{name: priced}}
  budget: {{bytes_read: 0.55, kv: 0.85, lengths: [320]}}
evaluate:
  compare: [plan, even, random-routing, static-pruning, random]
  perplexity: {{text: *text, length: 128, windows: 1}}
"""
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a profile, a search and a checkpoint."""
    folder = tmp_path_factory.mktemp("routed")
    recipe = make_recipe(folder, tiny_model("llama-mha"))
    recipe.write_text(RECIPE.format(model=folder / "model", text=folder / "text.txt", output=folder / "run"))
    (folder / "said.txt").write_text(
        "".join(checked(command, recipe).stderr for command in ("profile", "search", "export"))
    )
    return folder


def plans(run: Path) -> dict[str, Plan]:
    found = {path.stem: path for path in (run / "run" / "search").glob("*.json") if path.stem != "pareto"}
    return {name: read_plan(path) for name, path in found.items()} | {"plan": read_plan(run / "run" / "plan.json")}


def test_a_plan_has_routed_layers_and_windows_within_both_budgets(run: Path) -> None:
    plan = plans(run)["plan"]
    kinds = [{group.target for group in layer.groups} for layer in plan.layers]
    assert {"routed"} in kinds and {"window"} in kinds
    report = json.loads((run / "run" / "search" / "pareto.json").read_text())
    assert [row["kind"] for row in report["limits"]] == ["bytes_read", "kv"]
    for row in report["limits"]:
        spent = plan.predicted.of(row["kind"])[320].plan
        assert row["smallest"] <= spent <= row["limit"]
    # Windows alone hold least, and routed heads of all layers read least: neither is the smallest in both.
    windows, cost = plans(run)["streaming"].cost(320, 4), plan.cost(320, 4)
    smallest = {row["kind"]: row["smallest"] for row in report["limits"]}
    assert smallest["kv"] == windows.held_bytes and smallest["bytes_read"] < windows.read_bytes
    assert plan.predicted.of("bytes_read")[320].plan == cost.read_bytes < cost.held_bytes
    assert "routed" in (run / "run" / "checkpoint" / "README.md").read_text()


def test_what_stands_beside_it_differs_in_what_tokens_choose_alone(run: Path) -> None:
    found = plans(run)
    plan, chance, static, drawn = (found[name] for name in ("plan", "random-routing", "static-pruning", "random"))
    assert chance.cost(320, 4) == plan.cost(320, 4) and chance.layers != plan.layers
    routers = {group.model_dump().get("router") for layer in chance.layers for group in layer.groups}
    assert routers == {None, "random"}
    assert sorted(str(layer.groups) for layer in drawn.layers) == sorted(str(layer.groups) for layer in plan.layers)
    dense = load_model(str(run / "model"), dtype="float32", device="cpu").model
    pruned = planned_model(dense, static)
    assert static.prunes and static.predicted.of("parameters")[None].plan == block_parameters(pruned)
    for mine, other in zip(static.layers, plan.layers, strict=True):
        if any(group.by_layer for group in other.groups):
            assert len(mine.kept_groups) == other.groups[0].model_dump()["active"]  # nothing is shared here
        else:
            assert mine == other


PREPARED = """\
prepare:
  targets: [{target: routed, active: 1, of: 4}]
  layers: [{option: routed, router: two_stage, shared: 1, active: 1, shared_by: removal}]
  effect: true
  steps: 2
  length: 64
  batch_size: 2
search:
  solver: {name: priced, level: model}
  budget: {active: 0.5, lengths: [320]}
"""

EVEN = "{name: even, option: {option: routed, shared: 1, shared_by: removal, router: two_stage}}"


def test_routers_are_trained_once_and_priced_for_layers_that_share_other_heads(run: Path) -> None:
    recipe, text = run / "prepared.yaml", (run / "recipe.yaml").read_text()
    head, tail = text.partition("search:\n")[0], "evaluate:" + text.partition("evaluate:")[2]
    head = head.replace(f"output: {run / 'run'}", f"output: {run / 'prepared'}")
    recipe.write_text(head + PREPARED + tail)
    said = "".join(checked(command, recipe).stderr for command in ("profile", "prepare", "search"))
    assert "effect: head groups routed, 1 shared by removal and 1 chosen by a router, nats to first order" in said
    plan = read_plan(run / "prepared" / "plan.json")
    groups: Any = [group for layer in plan.layers for group in layer.groups]
    assert {(group.router, group.active) for group in groups} <= {("two_stage", 1), ("norm", 2), ("norm", 1)}
    assert plan.predicted.of("active")[None].fraction <= 0.5
    effects = read_profile(run / "prepared" / "options" / "effect")
    (option,) = effects.priced_layers
    tensor = effects.tensor(Key("effect", "absolute", 320).to(option))
    shared = read_profile(run / "prepared" / "profile").tensor(Key("removal", "", 320)).argmax(1)
    assert tensor.shape == (3, 4) and bool((tensor > 0).any())
    assert bool((tensor.argmin(1) == shared).all())  # always on, with gates of about 1
    checked("eval", recipe)
    rows = [row.name for row in read_comparison(run / "prepared" / "evaluation.json").variants]
    assert rows == ["dense", "plan", "even", "random-routing", "static-pruning", "random"]
    right = recipe.read_text()
    recipe.write_text(right.replace("{name: priced, level: model}", EVEN))
    checked("search", recipe)
    even: Any = [layer.groups[0] for layer in read_plan(run / "prepared" / "plan.json").layers]
    assert {(group.router, group.always, group.active, group.of) for group in even} == {("two_stage", 1, 1, 3)}
    recipe.write_text(right.replace("effect: true", "effect: false"))
    assert "write `effect: true`" in checked("validate", recipe, fails=True).stderr
    recipe.write_text(right.replace("- {name: removal}", "- {name: lse_spread}"))
    told = checked("validate", recipe, fails=True).stderr
    assert "`effect` reads `removal`, which is not measured" in told and "add `{name: removal}`" in told
