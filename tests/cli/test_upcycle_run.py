"""A recipe that makes one model of several, from the command to the report, and what follows from its checkpoint."""

from __future__ import annotations

import copy
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from compress.export.verify import verify_checkpoint
from compress.models.trained import read_trained
from compress.plan import read_plan
from compress.recipe.load import load_recipe
from compress.stages.evaluate import row_names
from tests.calls import call
from tests.cli.recipes import make_recipe
from tests.tiny import tiny_model, tiny_tokenizer

UPCYCLE = """\
model: {folder}/model
output: {folder}/run
device: cpu
calibration:
  text: &text {{source: file, path: {folder}/text.txt}}
upcycle:
  experts: [{folder}/one, {folder}/two]
  texts: [*text, {{source: file, path: {folder}/other.txt}}]
  text_tokens: 128
recover: {{train: full, length: 32, batch_size: 2, steps: 2, rate: 0.001}}
evaluate: {{perplexity: {{text: *text, length: 64, windows: 1}}}}
"""
ROWS = ["dense", "expert 1 one", "expert 2 two", "plan", "plan before recovery"]


def make_models(folder: Path) -> None:
    """Two experts of the model that `make_recipe` makes, whose layers are others, and a text of few words."""
    (folder / "other.txt").write_text(" ".join(f"w{4 + number % 7}" for number in range(4000)))
    for number, name in enumerate(("one", "two")):
        torch.manual_seed(number)
        expert = copy.deepcopy(tiny_model("llama-gqa"))
        for key, weight in expert.named_parameters():
            weight.data += 0.05 * torch.randn_like(weight) if ".layers." in key else 0
        expert.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run."""
    folder = tmp_path_factory.mktemp("upcycled")
    make_recipe(folder)
    make_models(folder)
    (folder / "recipe.yaml").write_text(UPCYCLE.format(folder=folder))
    with pytest.MonkeyPatch.context() as patch:  # plots and charts have tests of their own
        patch.setattr("compress.report.sections.chart_svg", lambda chart, name: "")
        patch.setattr("compress.stages.evaluate.draw", lambda session, plots: None)
        patch.setattr("compress.export.export.verify_checkpoint", partial(verify_checkpoint, length=130))
        done = call("run", folder / "recipe.yaml")
    assert done.exit_code == 0, done.output
    return folder


def test_the_run_says_what_it_makes_and_what_it_adds(folder: Path) -> None:
    plan = read_plan(folder / "run" / "plan.json")
    assert plan.upcycle is not None
    assert [expert.name for expert in plan.upcycle.experts] == [str(folder / name) for name in ("one", "two")]
    told = call("upcycle", folder / "recipe.yaml")
    assert told.exit_code == 0 and "done before" in told.output
    shown = call("inspect", folder / "run" / "checkpoint").output
    card = (folder / "run" / "checkpoint" / "README.md").read_text()
    page = (folder / "run" / "report.html").read_text()
    for text in (shown, card, page):
        assert "2 models in one" in text and "adds to what the seed costs" in text
    amounts = {amount.kind: amount for amount in plan.predicted.longest}
    assert amounts["kv"].fraction == 2 and 1 < amounts["flops"].fraction < amounts["parameters"].fraction
    assert f"{amounts['parameters'].plan:,} parameters" in card


def test_it_is_measured_beside_seed_and_experts(folder: Path) -> None:
    evaluation = json.loads((folder / "run" / "evaluation.json").read_text())
    assert [row["name"] for row in evaluation["variants"]] == ROWS
    assert row_names(load_recipe(folder / "recipe.yaml")) == ROWS


def test_the_checkpoint_is_taken_by_the_other_commands(folder: Path, tmp_path: Path) -> None:
    dense, checkpoint = folder / "model", folder / "run" / "checkpoint"
    measured = call("eval", dense, checkpoint, "--perplexity", 64, "--out", tmp_path / "eval", "--device", "cpu")
    assert measured.exit_code == 0, measured.output
    timed = call("bench", checkpoint, "--dense", dense, "--lengths", 64, "--device", "cpu", "--dtype", "float32")
    assert timed.exit_code == 0, timed.output
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, attn_implementation="sdpa")
    with pytest.raises(ValueError, match="there is no dense model here"):
        loaded(torch.tensor([[5, 6]]))
    alone = call("eval", checkpoint, "--perplexity", 64, "--device", "cpu", "--out", tmp_path / "alone")
    assert alone.exit_code == 2 and "compress eval DENSE CHECKPOINT" in alone.output
    checked = call("validate", folder / "recipe.yaml")
    assert checked.exit_code == 0 and "upcycle" in checked.output
    for command in ("profile", "search"):
        refused = call(command, folder / "recipe.yaml")
        assert refused.exit_code == 2 and f"an upcycled model has no {command}" in refused.output


# What else a recipe may say: keys of `upcycle`, then head groups and query heads of the model that comes of it.
VARIANTS = (
    ({"attention": "base", "rest": "seed"}, 2, 4),
    ({"attention": "soft", "kv": "shared", "texts": [], "start": "zero"}, 2, 8),
    ({"kv": "expert", "rest": "average", "texts": [], "start": "random", "mlp": {"top": "all", "weight": "one"}}, 4, 8),
    ({"seed": True, "texts": [], "mlp": {"top": 1, "weight": "p"}}, 6, 12),
)


def test_variants_of_the_recipe(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    for keys, groups, heads in VARIANTS:
        given = yaml.safe_load(UPCYCLE.format(folder=folder)) | {"output": str(tmp_path / "run")}
        given["upcycle"] |= keys
        recipe.write_text(yaml.safe_dump(given))
        done = call("upcycle", recipe, "--json")
        assert done.exit_code == 0, done.output
        plan = read_plan(tmp_path / "run" / "plan.json")
        assert (plan.model.kv_heads, plan.model.query_heads) == (groups, heads)
        weights = read_trained(tmp_path / "run" / "upcycle")
        routers = [weight for name, weight in weights.items() if name.endswith(".router")]
        assert all(bool(router.any()) for router in routers) == (keys.get("start") != "zero")


def test_experts_of_another_shape_and_sections_that_have_no_place_are_refused(folder: Path, tmp_path: Path) -> None:
    text = UPCYCLE.format(folder=folder).replace(f"{folder}/run", f"{tmp_path}/run")
    recipe = tmp_path / "recipe.yaml"
    shutil.copytree(folder / "two", tmp_path / "two")
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    (tmp_path / "two" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    recipe.write_text(text.replace(f"{folder}/two", f"{tmp_path}/two"))
    for command in ("validate", "upcycle"):
        refused = call(command, recipe)
        assert refused.exit_code == 2 and "an expert is of another shape: `rms_norm_eps` differs" in refused.output
    recipe.write_text(text.replace("  texts:", "  seed: true\n  texts:").replace(f"{folder}/two", f"{folder}/model"))
    assert "expected one for each of the 3 experts" in call("upcycle", recipe).output
    recipe.write_text(recipe.read_text().replace("  texts:", "#"))
    assert "the seed is an expert twice" in call("upcycle", recipe).output
    (tmp_path / "short.txt").write_text("w5 w6 w7")
    recipe.write_text(text.replace(f"{folder}/other.txt", f"{tmp_path}/short.txt"))
    for command in ("validate", "upcycle"):
        told = call(command, recipe).output
        assert "upcycle.texts[1]: the training text is too short" in told and "smaller `upcycle.text_tokens`" in told
    recipe.write_text(text + "search: {budget: {kv: 0.5}}\n")
    refused = call("upcycle", recipe)
    assert refused.exit_code == 2 and "an upcycled model has no `search`" in refused.output
    recipe.write_text(text.replace(f", {folder}/two", ""))
    assert "expected two experts or more" in call("upcycle", recipe).output
