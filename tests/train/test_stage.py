"""Recovery as a stage of a run: its place, its keys, what is compared, and several processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file

from compress.cli.recipe import opened
from compress.evaluate.comparison import read_comparison
from compress.runfolder import RunFolder
from tests import processes
from tests.calls import call
from tests.cli.recipes import make_recipe
from tests.train.common import model_of

SECTION = "recover: {length: 32, batch_size: 4, steps: 5, rate: 0.01, loss: both, control: true}\n"


def recipe_of(folder: Path, section: str = SECTION) -> Path:
    recipe = make_recipe(folder, model_of())
    recipe.write_text(recipe.read_text() + section)
    return recipe


def values(folder: Path) -> dict[str, float]:
    """Perplexity of every row."""
    rows = read_comparison(folder / "run" / "evaluation.json").variants
    return {row.name: row.of("perplexity")[0].perplexity for row in rows}


@pytest.fixture(scope="module")
def recovered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a finished run with recovery."""
    recipe = recipe_of(tmp_path_factory.mktemp("recovered"))
    result = call("run", recipe)
    assert result.exit_code == 0, result.output
    return recipe


def test_a_run_recovers_between_search_and_export(recovered: Path) -> None:
    run = recovered.parent / "run"
    assert list(RunFolder(run).stages()) == ["profile", "search", "recover", "control", "export", "evaluate"]
    assert list(values(run.parent)) == [
        "dense",
        "plan",
        "plan before recovery",
        "dense, recovered",
        "uniform before recovery",
    ]
    found = values(run.parent)
    assert found["plan"] < 0.9 * found["plan before recovery"] and found["dense, recovered"] < 0.9 * found["dense"]
    assert found["plan before recovery"] != found["dense"]
    records = [json.loads((run / name / "recover.json").read_text()) for name in ("recover", "recover/control")]
    assert records[0]["batches"] == records[1]["batches"] and records[0]["before"] != records[1]["before"]
    assert records[0]["teacher"] == records[1]["teacher"] is not None


def test_the_checkpoint_has_the_trained_weights(recovered: Path) -> None:
    run = recovered.parent / "run"
    trained, written = load_file(run / "recover/model.safetensors"), load_file(run / "checkpoint/model.safetensors")
    assert trained.keys() == written.keys()
    assert all(bool((trained[name] == written[name]).all()) for name in trained)
    assert "The weights were trained afterwards" in (run / "checkpoint/README.md").read_text()
    assert (run / "checkpoint/recover.json").read_text() == (run / "recover/recover.json").read_text()
    dense = load_file(recovered.parent / "model/model.safetensors")
    assert not bool((dense["model.layers.0.mlp.up_proj.weight"] == written["model.layers.0.mlp.up_proj.weight"]).all())


def test_a_finished_recovery_is_not_repeated_and_keys_follow_it(recovered: Path) -> None:
    result = call("recover", recovered)
    assert result.exit_code == 0 and result.stdout.strip() == str(recovered.parent / "run" / "recover")
    assert "recover: done before" in result.stderr and "control: done before" in result.stderr
    record = recovered.parent / "run/recover/recover.json"
    before = record.read_text()
    with opened(str(recovered)) as session:
        keys = session.export_key(), session.evaluate_key()
        record.write_text(before.replace('"seed"', ' "seed"'))
        assert session.export_key() != keys[0] and session.evaluate_key() != keys[1]
        record.write_text(before)
        assert (session.export_key(), session.evaluate_key()) == keys


def test_another_rate_is_another_recovery_and_saving_is_not(tmp_path: Path) -> None:
    keys = []
    for section in (SECTION, SECTION.replace("0.01", "0.02"), SECTION.replace("steps", "save_every: 3, steps")):
        recipe = recipe_of(tmp_path, section)
        with opened(str(recipe)) as session:
            keys.append((session.recover_key(), session.control_key()))
    assert keys[0] == keys[2] and keys[0][0] != keys[1][0] and keys[0][1] != keys[1][1]


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "")
    assert "a section `recover:`" in call("recover", recipe).stderr
    recipe = recipe_of(tmp_path)
    result = call("recover", recipe)
    assert result.exit_code == 2 and "the search stage is missing" in result.stderr
    for command in ("profile", "search"):
        assert call(command, recipe).exit_code == 0
    for command in ("export", "eval"):
        result = call(command, recipe)
        assert result.exit_code == 2 and f"compress recover {recipe}" in result.stderr


def test_mistakes_in_the_section_are_told_where_they_are(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "recover: {length: 32, stebs: 5, loss: distil}\n")
    told = call("validate", recipe).stderr
    assert "did you mean `steps`?" in told and "did you mean `distill`?" in told
    recipe = recipe_of(tmp_path, "recover: {length: 32}\n")
    assert "expected either `steps` or `tokens`" in call("validate", recipe).stderr
    recipe = recipe_of(tmp_path, "recover: {length: 32, steps: 2, text: {source: file, path: gone.txt}}\n")
    assert "gone.txt: the text file cannot be read" in call("validate", recipe).stderr
    recipe = recipe_of(tmp_path, "recover: {length: 1025, steps: 2}\n")
    assert "longer than the model's context" in call("validate", recipe).stderr


def test_validate_shows_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert "5 steps of 4 x 32 tokens" in call("validate", recipe_of(tmp_path)).stdout


def test_two_processes_run_one_recipe(tmp_path: Path, recovered: Path) -> None:
    """Profile, losses and training are shared, the first two to the bit; the other process says and writes nothing."""
    recipe = recipe_of(tmp_path)
    told, printed = "", ""
    for process in processes.launch("compress", "run", recipe, count=2):
        assert process.returncode == 0, process.stderr[-3000:]
        told, printed = told + process.stderr, printed + process.stdout
    assert told.count("recover: starting") == 1 and printed.count("run folder") == 1
    record = json.loads((tmp_path / "run/recover/recover.json").read_text())
    assert record["processes"] == 2
    losses = [folder / "search/response.jsonl" for folder in (tmp_path / "run", recovered.parent / "run")]
    assert losses[0].read_text() == losses[1].read_text()
    profiles = [folder / "profile/statistics.safetensors" for folder in (tmp_path / "run", recovered.parent / "run")]
    assert profiles[0].read_bytes() == profiles[1].read_bytes()
    two, one = values(tmp_path), values(recovered.parent)
    assert two == pytest.approx(one, rel=0.05)
    assert two["dense"] == one["dense"] and two["plan before recovery"] == one["plan before recovery"]
    checkpoint = tmp_path / "run" / "checkpoint"
    assert transformers.AutoConfig.from_pretrained(checkpoint, trust_remote_code=True).compress_plan is not None
