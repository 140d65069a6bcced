"""`compress run` on families of other layouts, from a stock folder to a checkpoint that loads without `compress`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from compress.cli.app import app
from compress.models.load import load_model
from compress.models.planned import planned_model
from compress.plan import read_plan
from compress.runtime.families import FAMILIES
from tests import processes
from tests.cli.recipes import make_recipe
from tests.tiny import random_ids, tiny_model

CHILD = Path(__file__).parents[1] / "reload_child.py"


@pytest.mark.parametrize("name", ["gpt_neox", "mixtral", "olmo2"])
def test_a_whole_run(name: str, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_model(name))
    result = CliRunner().invoke(app, ["run", str(recipe)])
    assert result.exit_code == 0, result.output
    run = tmp_path / "run"
    plan = read_plan(run / "plan.json")
    assert plan.model.architecture == FAMILIES[name].architecture
    assert any(group.target == "window" for layer in plan.layers for group in layer.groups)
    rows = json.loads((run / "evaluation.json").read_text())["variants"]
    assert [row["name"] for row in rows] == ["dense", "plan", "uniform"]

    checkpoint = run / "checkpoint"
    done = processes.run("file", str(CHILD), tmp_path / "reloaded", checkpoint, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads((tmp_path / "reloaded" / "checkpoint.json").read_text())
    assert not facts["compress_importable"] and facts["class"] == f"{FAMILIES[name].planned}ForCausalLM"
    model = planned_model(load_model(str(tmp_path / "model"), dtype="float32", device="cpu").model, plan)
    with torch.inference_mode():
        expected = model(random_ids(1, 301)).logits
    for logits in load_file(tmp_path / "reloaded" / "checkpoint.safetensors").values():
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_experts_are_pruned_by_their_gradients(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_model("mixtral"))
    head = recipe.read_text().partition("profile:")[0]
    for statistic in ("wanda_sp", "taylor"):
        recipe.write_text(
            f"{head}profile: {{statistics: [{{name: {statistic}}}]}}\nsearch:\n  budget: {{parameters: 0.7}}\n"
            f"  solver: {{name: allocated, importance: {statistic}, multiple: 8}}\n"
        )
        result = CliRunner().invoke(app, ["run", str(recipe)])
        if statistic == "wanda_sp":
            assert result.exit_code == 2 and "experts are no modules of their own" in result.stderr
    assert result.exit_code == 0, result.output
    plan = read_plan(tmp_path / "run" / "plan.json")
    assert plan.prunes and all(layer.mlp is None or layer.mlp.kept % 8 == 0 for layer in plan.layers)
    assert any(layer.mlp is not None for layer in plan.layers)
