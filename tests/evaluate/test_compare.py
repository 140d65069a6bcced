"""Variants side by side: one at a time, on the same items, kept on disk, in a file and in a table."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from compress.cli.tables import show
from compress.data.continuation import Continuation
from compress.data.key_value import KeyValue
from compress.data.passkey import PassKey
from compress.data.prompt import Task
from compress.data.text import FileText, split_text, tokenise
from compress.errors import UserError
from compress.evaluate.compare import compare
from compress.evaluate.comparison import Comparison, read_comparison
from compress.evaluate.measure import Measure, Variant
from compress.evaluate.measures.perplexity import Perplexity, perplexity
from compress.evaluate.measures.recall import Recall
from compress.evaluate.tables import tables
from compress.targets.cost import Cost
from tests.data.language import byte_loaded, byte_model, byte_tokenizer, story_in

COST = Cost(2**19, 2**19, 100, 1000)
RECALL: list[Task] = [PassKey(length=200, count=3), KeyValue(length=240, count=2, lines=1)]


@pytest.fixture
def source(tmp_path: Path) -> FileText:
    return story_in(tmp_path)


class Builder:
    """Counts how often each variant's model is made."""

    def __init__(self) -> None:
        self.built: list[str] = []

    def variants(self, names: tuple[str, ...] = ("dense", "plan")) -> list[Variant]:
        return [
            Variant(
                name,
                lambda name=name: self.build(name),  # type: ignore[misc]
                key=name,
                cost=lambda length, name=name: COST * (2 if name == "dense" else 1),  # type: ignore[misc]
            )
            for name in names
        ]

    def build(self, name: str) -> Any:
        self.built.append(name)
        return byte_model(0 if name == "dense" else 1)


def run(source: FileText, folder: Path, builder: Builder, **changes: Any) -> Comparison:
    options: dict[str, Any] = {"text": source, "seed": 0, "cache_dir": folder}
    asked: list[Measure] = list(changes.pop("windows", [Perplexity(text=source, length=200, windows=2)]))
    asked += Recall.of(changes.pop("recall", RECALL))
    names = changes.pop("names", ("dense", "plan"))
    loaded = changes.pop("loaded", None) or byte_loaded()
    return compare(loaded, builder.variants(names), asked, **options | changes)


def test_rows_are_what_each_model_does_on_the_evaluation_part(tmp_path: Path, source: FileText) -> None:
    builder, reports = Builder(), []
    result = run(source, tmp_path / "kept", builder, progress=lambda *report: reports.append(report))
    assert builder.built == ["dense", "plan"]
    assert [variant.name for variant in result.variants] == ["dense", "plan"]
    text = tokenise(byte_tokenizer(), split_text(source.load(), "evaluation"))
    for seed, variant in enumerate(result.variants):
        own = perplexity(byte_model(seed), text, Perplexity(text=source, length=200, windows=2))
        assert variant.of("perplexity")[0].nll == pytest.approx(own.nll)
        assert [(r.task, r.length, len(r.items)) for r in variant.of("recall")] == [
            ("passkey", 200, 3),
            ("key_value", 240, 2),
        ]
    expected = [[item.expected for item in result.variants[i].of("recall")[0].items] for i in (0, 1)]
    assert expected[0] == expected[1]
    assert (result.model, result.dtype, result.device, result.seed) == ("tiny/bytes", "float32", "cpu", 0)
    assert reports[-1][:2] == (14, 14)
    assert [report[0] for report in reports] == sorted(report[0] for report in reports)


def test_what_is_measured_is_not_measured_again(tmp_path: Path, source: FileText) -> None:
    builder, kept = Builder(), tmp_path / "kept"
    first = run(source, kept, builder)
    second = run(source, kept, builder)
    assert builder.built == ["dense", "plan"]
    assert [v.model_dump(exclude={"seconds"}) for v in second.variants] == [
        v.model_dump(exclude={"seconds"}) for v in first.variants
    ]
    run(source, kept, builder, names=("dense", "plan", "uniform"))
    assert builder.built == ["dense", "plan", "uniform"]
    run(source, kept, builder, recall=[*RECALL, PassKey(length=220, count=1)])
    assert builder.built == ["dense", "plan", "uniform", "dense", "plan"]
    run(source, kept, builder, seed=1)
    assert len(builder.built) == 7
    for path in kept.glob("plan-perplexity-*.json"):
        path.write_text(path.read_text(encoding="utf-8")[:50], encoding="utf-8")
    run(source, kept, builder)
    assert builder.built[7:] == ["plan"]


def test_file_form_comes_back_the_same(tmp_path: Path, source: FileText) -> None:
    result = run(source, tmp_path / "kept", Builder())
    path = tmp_path / "evaluation.json"
    result.write(path)
    assert read_comparison(path) == result
    assert '"schema": 2' in path.read_text(encoding="utf-8")


def test_damaged_files_are_refused(tmp_path: Path, source: FileText) -> None:
    path = tmp_path / "evaluation.json"
    with pytest.raises(UserError, match="the comparison is missing"):
        read_comparison(path)
    run(source, tmp_path / "kept", Builder()).write(path)
    text = path.read_text(encoding="utf-8")
    for damaged in (text[:-40], text.replace('"schema": 2', '"schema": 3'), text.replace('"seed"', '"sede"')):
        path.write_text(damaged, encoding="utf-8")
        with pytest.raises(UserError, match=r"evaluation\.json"):
            read_comparison(path)


def printed(result: Comparison) -> str:
    stream = io.StringIO()
    for table in tables(result):
        show(table, Console(file=stream, width=300, color_system=None))
    return " ".join(stream.getvalue().split())


def test_table_names_everything_a_reader_needs(tmp_path: Path, source: FileText) -> None:
    result = run(source, tmp_path / "kept", Builder())
    text = printed(result)
    for part in (
        "tiny/bytes, float32 on cpu, seed 0",
        "1.00 MiB (100%)",
        "0.50 MiB (50%)",
        "2 windows of 200 tokens",
        "passkey at 200: 3 prompts in natural text",
        "key_value at 240: 2 prompts",
        "batch 1",
        "0.00 (0.00 to 0.56)",
    ):
        assert part in text
    dense, plan = (row.of("perplexity")[0] for row in result.variants)
    assert f"{dense.perplexity:.3f}" in text
    assert f"{plan.perplexity / dense.perplexity - 1:+.1%}" in text


def test_either_half_may_be_left_out(tmp_path: Path, source: FileText) -> None:
    alone = run(source, tmp_path / "a", Builder(), recall=[])
    assert alone.text is None
    assert "passkey" not in printed(alone)
    recall_only = run(source, tmp_path / "b", Builder(), windows=[])
    assert "perplexity" not in printed(recall_only)


def test_requests_that_do_not_fit_are_refused_before_a_model_is_built(tmp_path: Path, source: FileText) -> None:
    builder = Builder()
    with pytest.raises(UserError, match="context"):
        run(source, tmp_path, builder, recall=[PassKey(length=5000, count=1)])
    with pytest.raises(UserError, match="no right answer"):
        run(source, tmp_path, builder, recall=[Continuation(length=200, count=1)])
    with pytest.raises(UserError, match="too short"):
        run(source, tmp_path, builder, windows=[Perplexity(text=source, length=2000, windows=500)])
    with pytest.raises(ValueError, match="`dense` first"):
        run(source, tmp_path, builder, names=("plan", "dense"))
    assert builder.built == []


def test_positions_and_depths_are_printed_for_every_variant(tmp_path: Path, source: FileText) -> None:
    result = run(source, tmp_path / "kept", Builder())
    main, positions, *depths = tables(result)
    assert [table.title.split(",")[0] for table in depths] == ["passkey at 200 by depth", "key_value at 240 by depth"]
    (dense,) = result.dense.of("perplexity")
    assert [row[0] for row in positions.rows] == ["dense", "plan"] == [row[0] for row in main.rows]
    assert positions.rows[0][1:] == [f"{bucket.perplexity:.3f}" for bucket in dense.buckets]
    prompts = [int(column.head.split("(")[1].rstrip(")")) for column in depths[0].columns[1:]]
    assert sum(prompts) == 3


@pytest.mark.parametrize("asked", [{"recall": []}, {"windows": []}])
def test_a_token_without_an_embedding_is_told_before_anything_is_measured(
    asked: dict[str, Any], source: FileText, tmp_path: Path
) -> None:
    loaded = byte_loaded()
    loaded.tokenizer = copy.deepcopy(loaded.tokenizer)
    loaded.tokenizer.add_tokens(["was near"])
    builder = Builder()
    with pytest.raises(UserError, match="a token that the model has no embedding for"):
        run(source, tmp_path, builder, loaded=loaded, **asked)
    assert not builder.built


def test_published_evaluations_of_the_first_form_are_read(tmp_path: Path) -> None:
    folder = Path(__file__).parents[2] / "profiles" / "smollm2-135m"
    record = json.loads((folder / "quickstart.measured.json").read_text(encoding="utf-8"))
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(record["comparisons"][0]), encoding="utf-8")
    result = read_comparison(path)
    rows = {row[0]: row[1:] for row in tables(result)[0].rows}
    assert rows["plan 0"] == ["22.50 MiB (50%)", "11.398", "+1.3%", "0.96 (0.87 to 0.99)"]
    assert "50 prompts in natural text" in tables(result)[0].caption
    result.write(path)
    assert read_comparison(path) == result
    damages: list[dict[str, Any]] = [{"recall": 7}, {"recall": []}, {"variants": [7]}, {"perplexity": 3}]
    for damage in damages:
        path.write_text(json.dumps(record["comparisons"][0] | damage), encoding="utf-8")
        with pytest.raises(UserError, match="the comparison"):
            read_comparison(path)
