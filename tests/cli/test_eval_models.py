"""`compress eval` on several models: it writes into its folder only, and results belong to contents, not to names."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from compress.cli.app import app
from compress.cli.evaluate import MOST_NAME, _folder_name
from compress.evaluate.comparison import read_comparison
from compress.evaluate.measures import latency as module
from compress.models.content import content_key
from compress.plan import uniform_plan
from compress.targets.window import WindowGroup
from tests.calls import call
from tests.tiny import shape_of, tiny_model, tiny_tokenizer


def model_in(folder: Path, seed: int = 0) -> Path:
    tiny_model("llama-gqa", seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def evaluated(*words: Any) -> list[dict[str, Any]]:
    """The rows of an evaluation in time, which takes models of different tokenizers."""
    options = ["--latency", "16", "--device", "cpu", "--json"]
    result = CliRunner().invoke(app, ["eval", *map(str, words), *options])
    assert result.exit_code == 0, result.output
    rows: list[dict[str, Any]] = json.loads(result.stdout)["variants"]
    return rows


def test_other_models_are_another_folder_by_default() -> None:
    """Checkpoints of all runs have one name; what else was measured stays."""
    names = [
        _folder_name(specs)
        for specs in (
            ["runs/a/checkpoint"],
            ["runs/b/checkpoint/"],
            ["demo/smollm2-135m", "runs/a/checkpoint"],
            ["demo/smollm2-135m", "runs/b/plan.json"],
            ["models/llama"],
        )
    ]
    assert names == ["a", "b", "smollm2-135m-a", "smollm2-135m-b", "llama"]
    assert len(_folder_name([f"models/{number:040}" for number in range(40)])) == MOST_NAME


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A number of each model that is timed, in order."""
    seen: list[float] = []
    real: Any = module.latency

    def latency(model: Any, dense: Any, request: Any) -> Any:
        seen.append(float(model.lm_head.weight.detach().sum()))
        return real(model, dense, request)

    monkeypatch.setattr(module, "latency", latency)
    return seen


def test_nothing_is_written_outside_the_folder(tmp_path: Path, measured: list[float]) -> None:
    first, second = model_in(tmp_path / "a" / "model"), model_in(tmp_path / "b" / "model", seed=1)
    (tmp_path / "out" / "evaluation").mkdir(parents=True)
    left = tmp_path / "out" / "evaluation" / f".dense-size-0.json.{os.getpid()}.part"  # of a killed command
    left.write_text("{")
    before = sorted(tmp_path.rglob("*"))
    rows = evaluated(first, second, "--out", tmp_path / "out")
    assert not left.exists()
    assert [row["name"] for row in rows] == ["dense", str(second)]
    added = set(tmp_path.rglob("*")) - set(before)
    assert added and all(path.is_relative_to(tmp_path / "out") for path in added)
    assert len(measured) == 2


def test_results_belong_to_contents(tmp_path: Path, measured: list[float]) -> None:
    first, second = model_in(tmp_path / "a" / "model"), model_in(tmp_path / "b" / "model", seed=1)
    for _ in range(2):
        evaluated(first, second, "--out", tmp_path / "out")
    assert len(measured) == 2
    weights = second / "model.safetensors"
    times = weights.stat()
    data = bytearray(weights.read_bytes())
    data[-64:] = bytes(64)
    weights.write_bytes(data)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))  # the same name, size and time
    evaluated(first, second, "--out", tmp_path / "out")
    assert len(measured) == 3


def test_models_of_one_name_are_two_rows(
    tmp_path: Path, measured: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("model", "dense", "b/model")):
        model_in(tmp_path / name, seed=number)
    rows = evaluated("model", "dense", "b/model", "--out", "out")
    assert [row["name"] for row in rows] == ["dense", str(tmp_path / "dense"), "b/model"]
    assert len(set(measured)) == 3


def test_a_key_of_a_model_is_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "model.gguf"
    file.write_bytes(b"GGUF1")
    key = content_key(str(file))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert content_key(str(tmp_path / "b" / "model.gguf")) == key
    file.write_bytes(b"GGUF2")
    assert content_key(str(file)) != key
    folder = content_key(str(tmp_path / "a"))
    (tmp_path / "a" / "README.md").write_text("an evaluation writes its table here")
    assert content_key(str(tmp_path / "a")) == folder
    (tmp_path / "a" / "config.json").write_text("{}")
    assert content_key(str(tmp_path / "a")) != folder
    assert content_key("some/model") != content_key("other/model")


def test_a_plan_file_is_a_row_with_the_uniform_window_of_its_bytes(tmp_path: Path) -> None:
    model = model_in(tmp_path / "model")
    plan = uniform_plan(shape_of(tiny_model("llama-gqa")), WindowGroup(sink=4, alpha=256, beta=0.0))
    (tmp_path / "plan.json").write_text(plan.to_json())
    words = ["eval", model, tmp_path / "plan.json", "--uniform", "--measure", "flops: {lengths: [1024, 2048]}"]
    options = ["--device", "cpu", "--out", tmp_path / "out", "--json"]
    result = call(*words, *options)
    assert result.exit_code == 0, result.output
    names = ["dense", str(tmp_path / "plan.json"), f"uniform beside {tmp_path / 'plan.json'}"]
    rows = read_comparison(tmp_path / "out" / "evaluation.json").variants
    assert [row.name for row in rows] == names
    held = [row.of("kv_bytes")[0].held[2048] for row in rows]
    assert held[0] > held[1] >= held[2] > 0 and held[1] == plan.cost(2048, 4).held_bytes
    flops = [row.of("flops")[0].prefill for row in rows]
    assert flops[0][2048] > flops[1][2048] > flops[1][1024]


@pytest.mark.parametrize(
    ("asked", "told"),
    [("nosuch: {}", "unknown measure"), ("agreement: {windows: 2}", "length"), ("recall: [{task: passkey}]", "length")],
)
def test_a_wrong_measure_is_told(asked: str, told: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["eval", str(model_in(tmp_path / "model")), "--measure", asked])
    assert result.exit_code == 2 and told in result.stderr, result.output
