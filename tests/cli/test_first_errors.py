"""What a newcomer meets first: every message says what to do next, and none is a traceback."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from compress.cli.app import app
from tests.calls import call
from tests.cli.recipes import make_recipe


def told(*words: Any) -> str:
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output and "\n  do " in result.stderr, result.stderr
    return result.stderr


def told_once(*words: Any) -> str:
    """What is told of a recipe with one mistake in it."""
    result = call(*words)
    assert result.exit_code == 2 and "problems" not in result.stderr, result.output
    return result.stderr


@pytest.fixture
def no_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.split(".")[0] == "lm_eval":
            raise ImportError("No module named 'lm_eval'")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)


def test_no_recipe() -> None:
    assert "did you mean `recipes/smollm2-quickstart.yaml`?" in told("run", "recipes/smollm2-quickstrt.yaml")


def test_a_recipe_of_no_similar_name() -> None:
    assert "did you mean" not in told("run", "recipes/nope.yaml")


def test_the_model_of_a_recipe_is_told_with_its_place(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {tmp_path}/run/checkpoint\noutput: {tmp_path}/out\nsearch: {{budget: {{kv: 0.5}}}}\n")
    for command in ("validate", "run"):
        error = told(command, recipe)
        assert error.startswith(f"{recipe}:1:8: {tmp_path}/run/checkpoint: no such model folder")
        assert "whose `output` is" in error
    assert not (tmp_path / "out").exists()
    assert told("validate", recipe, "--set", "model=./nope").startswith("--set model: ./nope: no such model")


def test_what_is_set_is_told_by_its_option_to_the_last_part(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    documents = "calibration.documents=[{task: passkey, length: 128, count: 0}]"
    assert told_once("validate", recipe, "--set", documents).startswith("--set calibration.documents: wrong value")
    entry = "calibration.documents.0.count=0"
    assert told_once("validate", recipe, "--set", entry).startswith("--set calibration.documents.0.count: wrong value")
    documents = "calibration.documents=[{task: facts, length: 128, count: 1, facts: 3, asked: 4}]"
    error = told_once("validate", recipe, "--set", documents)
    assert "wrong value for `calibration.documents[0].asked`\n" in error
    assert error.endswith("expected at most 3, the number of `facts`\n  found    4\n")
    window = "prepare={targets: [{target: window, sink: 4, alpha: 64, beta: 0}], steps: 1}"
    error = told_once("validate", recipe, "--set", window)
    assert "wrong value for `prepare.targets`: `window` has nothing to train" in error and "expected" not in error
    for target, near in (("linear, map: hedghog", "hedgehog"), ("retain, scorer: rigde", "ridge")):
        prepare = f"prepare={{targets: [{{target: {target}}}], steps: 1}}"
        assert f"did you mean `{near}`?" in told_once("validate", recipe, "--set", prepare)
    error = told_once("validate", recipe, "--set", "search.solver={name: mao}")
    assert error.startswith("--set search.solver: unknown solver `mao`") and "statistics" not in error


def test_an_output_that_a_run_would_refuse_is_told_by_validate(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    assert f"{recipe}: output: {recipe}: the output is a file" in told("validate", recipe, "--set", f"output={recipe}")
    assert "below a file" in told("validate", recipe, "--set", f"output={recipe}/run")
    taken = call("validate", recipe, "--set", f"output={tmp_path}")
    assert taken.exit_code == 0 and "with --overwrite alone: the output folder already holds" in taken.stdout


def test_no_model(tmp_path: Path) -> None:
    assert "demo/smollm2-135m" in told("eval", "demo/smolm2", "--perplexity", 64)
    assert "check the path" in told("eval", tmp_path / "nowhere", "--perplexity", 64)


def test_an_evaluation_replaces_nothing_of_a_run_or_a_model(tmp_path: Path, finished: Path) -> None:
    model = make_recipe(tmp_path).parent / "model"
    for folder, found in ((finished.parent / "run", "stages.json"), (model, "config.json")):
        before = sorted(folder.iterdir())
        assert found in told("eval", model, "--perplexity", 64, "--out", folder)
        assert sorted(folder.iterdir()) == before


def test_a_second_model_that_cannot_be_loaded_is_told_before_the_first_is_measured(tmp_path: Path) -> None:
    model = make_recipe(tmp_path).parent / "model"
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    result = call("eval", model, other, "--perplexity", 64, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "`bert` is not supported" in result.stderr and "eval:" not in result.stderr


def test_a_wrong_measure() -> None:
    unknown = told("eval", "model", "--measure", "agreement: {length: 64, windos: 1}")
    assert unknown.startswith("--measure: windos: the measure agreement: unknown key") and "methods measures" in unknown
    assert told("eval", "model", "--measure", "agrement").startswith("--measure: unknown measure `agrement`")


def test_a_run_folder_in_place_of_a_model(finished: Path) -> None:
    assert "checkpoint`?" in told("eval", finished.parent / "run", "--perplexity", 64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu() -> None:
    assert "compress doctor" in told("bench", "tiny", "--mix", "A", "--device", "cuda")
    assert "compress doctor" in told("eval", "demo/smollm2-135m", "--perplexity", 64, "--device", "cuda")


def test_no_data(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    (tmp_path / "text.txt").unlink()
    result = CliRunner().invoke(app, ["run", str(recipe)])
    assert result.exit_code == 2 and "text.txt: the text file cannot be read" in result.stderr


def test_no_extra(finished: Path, no_lm_eval: None) -> None:
    words = told("eval", finished.parent / "model", "--suites", "vt", "--lengths", 512, "--device", "cpu")
    assert "pip install -e '.[lm-eval]'" in words


def test_a_wrong_suite_is_told_before_a_model_is_loaded(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.models.load.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    assert "did you mean `vt`?" in told("eval", finished.parent / "model", "--suites", "vtt", "--device", "cpu")


@pytest.mark.parametrize("command", ["report", "inspect"])
def test_wrong_folder(command: str, tmp_path: Path) -> None:
    assert "compress run RECIPE" in told(command, tmp_path / "nowhere")


def test_nothing_asked() -> None:
    result = CliRunner().invoke(app, ["eval", "demo/smollm2-135m"])
    assert result.exit_code == 2 and "--tasks, --suites, --perplexity, --latency" in result.stderr
