"""Figures from recorded requests and answers are lm-eval's own on the model in memory."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

pytest.importorskip("lm_eval")

from compress.cli.app import app
from compress.errors import UserError
from compress.evaluate.comparison import read_comparison
from compress.evaluate.harness import run_task
from compress.evaluate.likelihood import score
from compress.evaluate.measures.lm_eval import LmEval
from compress.evaluate.paired import Paired, averaged
from compress.evaluate.replay import compare_answers, record, replay
from compress.evaluate.requests import AnswerFile, RequestFile
from tests.data.language import byte_model, byte_tokenizer

WORDS = """
task: local_words
dataset_path: json
dataset_kwargs: {data_files: {test: data/items.jsonl}}
output_type: OUTPUT
test_split: test
doc_to_text: "{{question}} "
doc_to_target: "{{choices[label]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
NAMES = ("local_choice", "local_words")


@pytest.fixture
def folder(tasks: Path) -> Path:
    """Two tasks: multiple choice, and one continuation behind a context that ends with a space."""
    (tasks / "local_words.yaml").write_text(WORDS.replace("OUTPUT", "loglikelihood"), encoding="utf-8")
    return tasks


def recorded(folder: Path, tokenizer: Any = None, context: int = 2048, **changes: Any) -> RequestFile:
    request = LmEval(**{"tasks": NAMES, "include": str(folder)} | changes)
    return record(byte_model(context=context).config, tokenizer or byte_tokenizer(), request, "tiny")


@pytest.mark.parametrize("begin", [False, True])
def test_as_with_the_model_in_memory(folder: Path, begin: bool) -> None:
    model, tokenizer = byte_model(), byte_tokenizer(begin=begin)
    asked = recorded(folder, tokenizer, limit=6)
    found = replay(asked, score(model, asked.requests), str(folder))
    request = LmEval(tasks=NAMES, include=str(folder), limit=6)
    choice, words = (run_task(model, tokenizer, request, name, None, seed=0, text="") for name in NAMES)
    assert found[0] == choice and 0 < choice.metrics["acc"] + choice.metrics["acc_norm"] < 2
    assert found[1].metrics == pytest.approx(words.metrics, rel=1e-4)
    assert found[1].errors == pytest.approx(words.errors, rel=1e-3)
    assert len(asked.requests) == 6 * 3 + 6 and len(found[1].samples) == 6
    assert all((request.context_ids[0] == 1) == begin for request in asked.requests)


def by_hand(asked: RequestFile, name: str, right_words: int) -> AnswerFile:
    """All choices right, and the first of the words."""
    right = [
        row.choice == row.doc % 3 if row.task == "local_choice" else row.doc < right_words for row in asked.requests
    ]
    return AnswerFile(name, "float32", "cpu", asked.key, tuple((-1.0 if good else -9.0, good) for good in right))


def test_the_figures_are_those_of_the_answers(folder: Path) -> None:
    asked = recorded(folder)
    choice, words = replay(asked, by_hand(asked, "dense", 2).answers, str(folder))
    assert choice.metrics["acc"] == 1.0 and words.metrics["acc"] == 0.25
    assert words.metrics["perplexity"] == pytest.approx(math.exp((2 * 1 + 6 * 9) / 8))


def test_other_items_than_were_recorded_are_told(folder: Path, tmp_path: Path) -> None:
    asked = recorded(folder)
    answers = score(byte_model(), asked.requests)
    with pytest.raises(UserError, match="number of answers differs"):
        replay(asked, answers[1:], str(folder))
    data = tmp_path / "data" / "items.jsonl"
    data.write_text(data.read_text(encoding="utf-8").replace("garden", "gardens"), encoding="utf-8")
    with pytest.raises(UserError, match="differ from the recorded"):
        replay(asked, answers, str(folder))


def test_what_cannot_be_recorded_is_told(folder: Path) -> None:
    with pytest.raises(UserError, match="never shortened"):
        recorded(folder, context=4)
    for kind in ("generate_until", "loglikelihood_rolling"):
        (folder / "local_words.yaml").write_text(WORDS.replace("OUTPUT", kind), encoding="utf-8")
        with pytest.raises(UserError, match="only log-likelihoods"):
            recorded(folder)


def test_models_are_paired_over_the_items(folder: Path) -> None:
    asked = recorded(folder)
    comparison = compare_answers(asked, [by_hand(asked, "dense", 8), by_hand(asked, "pruned", 2)], str(folder))
    words = comparison.against_dense(comparison.variants[1], comparison.tasks()[1])
    mean = comparison.average(comparison.variants[1])
    assert words is not None and words.difference == -0.75
    assert mean is not None and mean.difference == -0.375
    assert mean.error == pytest.approx(words.error / 2)
    assert words.error == pytest.approx(math.sqrt((6 * 0.25**2 + 2 * 0.75**2) / 7 / 8))


def test_average_by_hand() -> None:
    mean = averaged([Paired(difference=-0.02, error=0.03), Paired(difference=0.06, error=0.04)])
    assert mean.difference == pytest.approx(0.02) and mean.error == pytest.approx(0.025)
    assert mean.interval == pytest.approx((0.02 - 1.96 * 0.025, 0.02 + 1.96 * 0.025)) and not mean.significant


def test_the_command_from_end_to_end(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, include = tmp_path / "requests.json.gz", ["--include", folder]
    models = [tmp_path / "model0", tmp_path / "model1"]
    for seed, path in enumerate(models):
        byte_model(seed).save_pretrained(path)
        byte_tokenizer().save_pretrained(path)

    def call(*words: Any) -> Result:
        return CliRunner().invoke(app, ["eval", *map(str, words), "--device", "cpu"])

    recorded = call(models[0], "--tasks", ",".join(NAMES), *include, "--record", asked)
    assert recorded.exit_code == 0 and "32 requests" in recorded.stdout, recorded.output
    options = ["--replay", asked, "--out", tmp_path / "out"]
    with monkeypatch.context() as without:
        without.setattr(importlib.util, "find_spec", lambda name: None)
        answered = call(*models, *options)
        assert answered.exit_code == 0 and "lm-eval is not here" in answered.stderr, answered.output
    files = sorted((tmp_path / "out").glob("answers-*.json"))
    assert len(files) == 2 and not (tmp_path / "out" / "evaluation.json").exists()
    counted = call(files[0], models[1], *options, *include)
    assert counted.exit_code == 0 and "answered before" in counted.stderr, counted.output
    assert "mean" in counted.stdout and "local_words" in counted.stdout
    read = read_comparison(tmp_path / "out" / "evaluation.json")
    assert [variant.name for variant in read.variants] == [str(path) for path in models]
    assert all(cell.count == 8 for variant in read.variants for cell in variant.cells)
    wrong = call(asked, *options, *include)
    assert wrong.exit_code == 2
