"""A text, and a folder with one lm-eval task beside its data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress.data.text import FileText
from tests.data.language import story_in

TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: data/items.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 3.0}
"""


@pytest.fixture(scope="package")
def text(tmp_path_factory: pytest.TempPathFactory) -> FileText:
    """A long story."""
    return story_in(tmp_path_factory.mktemp("text"))


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one task beside its data."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "local_choice.yaml").write_text(TASK, encoding="utf-8")
    (tmp_path / "data").mkdir()
    rows = [
        {
            "question": f"The stone of the {noun} was",
            "choices": [" near it.", " a quiet river.", " so."],
            "label": i % 3,
        }
        for i, noun in enumerate(["river", "light", "winter", "morning", "garden", "window", "paper", "silver"])
    ]
    (tmp_path / "data" / "items.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder
