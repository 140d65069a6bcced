"""`compress run` on families of other layouts, from a stock folder to a checkpoint that loads without `compress`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from compress.cli.app import app
from compress.errors import UserError
from compress.models.families import check_reading
from compress.models.load import load_model
from compress.models.planned import planned_model
from compress.plan import read_plan
from compress.runtime.families import FAMILIES
from tests import processes
from tests.cli.recipes import HEAD, make_recipe
from tests.tiny import random_ids, tiny_model

CHILD = Path(__file__).parents[1] / "reload_child.py"
DOCUMENTS = "  documents: [{{task: continuation, length: 192, count: 1, answer_tokens: 16}}]\n"
WINDOWS = """\
profile: {{statistics: [{{name: influence, grid: {{sinks: [4]}}}}]}}
search:
  solver: {{name: moa, points: 1}}
  budget: {{kv: 0.8, lengths: [192]}}
evaluate:
  compare: [plan]
  perplexity: {{text: *text, length: 64, windows: 1}}
"""
PRUNING = """\
profile: {{statistics: [{{name: taylor}}]}}
search:
  solver: {{name: allocated, importance: taylor, multiple: 8}}
  budget: {{parameters: 0.7}}
"""


def run(name: str, rest: str, folder: Path) -> Path:
    """The finished run of a recipe on a tiny model."""
    recipe = make_recipe(folder, tiny_model(name))
    places = {"model": folder / "model", "text": folder / "text.txt", "output": folder / "run"}
    recipe.write_text((HEAD + DOCUMENTS + rest).format(**places))
    result = CliRunner().invoke(app, ["run", str(recipe)])
    assert result.exit_code == 0, result.output
    return folder / "run"


@pytest.mark.parametrize("name", ["gpt_neox", "mixtral", "olmo2"])
def test_a_whole_run(name: str, tmp_path: Path) -> None:
    folder = run(name, WINDOWS, tmp_path)
    plan = read_plan(folder / "plan.json")
    assert plan.model.architecture == FAMILIES[name].architecture
    assert any(group.target == "window" for layer in plan.layers for group in layer.groups)
    rows = json.loads((folder / "evaluation.json").read_text())["variants"]
    assert [row["name"] for row in rows] == ["dense", "plan"]

    done = processes.run("file", str(CHILD), tmp_path / "reloaded", folder / "checkpoint", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads((tmp_path / "reloaded" / "checkpoint.json").read_text())
    assert not facts["compress_importable"] and facts["class"] == f"{FAMILIES[name].planned}ForCausalLM"
    model = planned_model(load_model(str(tmp_path / "model"), dtype="float32", device="cpu").model, plan)
    with torch.inference_mode():
        expected = model(random_ids(1, 301)).logits
    for logits in load_file(tmp_path / "reloaded" / "checkpoint.safetensors").values():
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_experts_are_pruned_by_their_gradients(tmp_path: Path) -> None:
    plan = read_plan(run("mixtral", PRUNING, tmp_path) / "plan.json")
    assert plan.prunes and all(layer.mlp is None or layer.mlp.kept % 8 == 0 for layer in plan.layers)
    assert any(layer.mlp is not None for layer in plan.layers)


def test_what_experts_give_is_not_read() -> None:
    config = tiny_model("mixtral").config
    check_reading(config, [])
    with pytest.raises(UserError, match="experts are no modules of their own"):
        check_reading(config, ["wanda_sp"])
