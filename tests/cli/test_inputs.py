"""What a stage read is part of its key by content: a file replaced under its path is never taken as done."""

import json
import os
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.cli.output import Terminal
from compress.cli.recipe import opened
from compress.data.text import MOST, DatasetText, FileText
from compress.errors import UserError
from compress.stages.inputs import Inputs
from compress.stages.session import Session
from compress.stages.stage import timed
from tests.calls import call
from tests.cli.recipes import make_recipe

EVERYTHING = """\
recover: {steps: 1, length: 64, batch_size: 1, text: {source: file, path: FOLDER/recover.txt}}
"""
KEYS: dict[str, Callable[[Session], str]] = {
    "profile": Session.profile_key,
    "search": Session.search_key,
    "recover": Session.recover_key,
    "control": Session.control_key,
    "evaluate": Session.evaluate_key,
}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that names a file wherever one can stand."""
    folder = tmp_path_factory.mktemp("everything")
    path = make_recipe(folder)
    text = (folder / "text.txt").read_text()
    for name in ("second", "perplexity", "recover"):
        (folder / f"{name}.txt").write_text(text)
    (folder / "rows.jsonl").write_text(json.dumps({"text": text}) + "\n")
    tasks = folder / "tasks" / "inner"
    tasks.mkdir(parents=True)
    (tasks / "mine.yaml").write_text("task: mine\ndataset_kwargs: {data_files: {test: data/items.jsonl}}\n")
    (folder / "tasks" / "data").mkdir()
    (folder / "tasks" / "data" / "items.jsonl").write_text("{}\n")
    (folder / "bench.json").write_text("{}")
    recipe = path.read_text()
    perplexity = f"perplexity: {{text: {{source: file, path: {folder}/perplexity.txt}}"
    recipe = recipe.replace("perplexity: {text: *text", perplexity)
    recipe = recipe.replace("calibration:\n", f"calibration:\n  second: {{source: file, path: {folder}/second.txt}}\n")
    recipe = recipe.replace(f"{folder}/text.txt", f"{folder}/rows.jsonl")
    recipe = recipe.replace("  statistics:\n", "  statistics:\n    - {name: amp}\n")
    recipe = recipe.replace("kv: 0.8", f"decode_time: 0.8, cost_table: {folder}/bench.json")
    recipe += f"  lm_eval: {{tasks: [mine], include: {folder}/tasks/inner}}\n"
    path.write_text(recipe + EVERYTHING.replace("FOLDER", str(folder)))
    return path


def keys(recipe: Path) -> dict[str, str]:
    with opened(str(recipe)) as session:
        return {name: key(session) for name, key in KEYS.items()}


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("rows.jsonl", {"profile", "search"}),
        ("second.txt", {"profile", "search"}),
        ("recover.txt", {"recover", "control"}),
        ("perplexity.txt", {"evaluate"}),
        ("bench.json", {"search"}),
        ("tasks/inner/mine.yaml", {"evaluate"}),
        ("tasks/data/items.jsonl", {"evaluate"}),
    ],
)
def test_every_file_that_a_recipe_names_counts_by_content(everything: Path, name: str, stages: set[str]) -> None:
    path = everything.parent / name
    before, stat = keys(everything), path.stat()
    content = path.read_bytes()
    # As long as before, and as old: neither size nor time tell.
    path.write_bytes(content.replace(b"w1", b"w2") if b"w1" in content else content[::-1])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = keys(everything)
    path.write_bytes(content)
    assert {stage for stage in before if before[stage] != after[stage]} == stages
    assert keys(everything) == before


def test_the_text_of_the_embedded_source_counts_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pydoc_data.topics

    recipe = make_recipe(tmp_path)
    named = f"{{source: file, path: {tmp_path / 'text.txt'}}}"
    recipe.write_text(recipe.read_text().replace(named, "{source: embedded}"))
    before = _profile_key(recipe)
    changed = {**pydoc_data.topics.topics, "assert": "other words of another Python"}
    monkeypatch.setattr(pydoc_data.topics, "topics", changed)
    assert _profile_key(recipe) != before


def test_a_dataset_counts_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "one"}, {"text": "two"}]

    class Rows(list[dict[str, str]]):
        column_names = ("text",)

    module: Any = types.ModuleType("datasets")
    module.__version__, module.load_dataset = "5.0.0", lambda *args, **options: Rows(rows)
    monkeypatch.setitem(sys.modules, "datasets", module)
    source = DatasetText(id="a/b")
    before = Inputs(tmp_path, Terminal()).text(source, MOST)
    assert Inputs(tmp_path, Terminal()).text(source, MOST) == before
    rows[1] = {"text": "six"}
    assert Inputs(tmp_path, Terminal()).text(source, MOST) != before


def _profile_key(recipe: Path) -> str:
    with opened(str(recipe)) as session:
        return session.profile_key()


def test_a_text_replaced_under_its_path_is_profiled_again(copied: Path) -> None:
    text = copied.parent / "text.txt"
    copied.write_text(copied.read_text().replace(str(_original(copied)), str(text)))
    assert call("profile", copied).exit_code == 0
    assert "profile: done before" in call("profile", copied).stderr
    stat, words = text.stat(), text.read_text().split()
    text.write_text(" ".join(reversed(words)))
    os.utime(text, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    result = call("export", copied)
    assert result.exit_code == 2 and "an earlier form of this recipe" in result.stderr
    result = call("profile", copied)
    assert result.exit_code == 0 and "profile: starting" in result.stderr, result.output


def _original(copied: Path) -> Path:
    """The text that the recipe of a copied run names."""
    line = next(line for line in copied.read_text().splitlines() if "source: file" in line)
    return Path(line.split("path: ")[1].rstrip("}"))


def test_a_text_that_is_gone_leaves_finished_stages_done(copied: Path) -> None:
    original = _original(copied)
    text = copied.parent / "moved.txt"
    shutil.copy(original, text)
    copied.write_text(copied.read_text().replace(str(original), str(text)))
    with opened(str(copied)) as session:
        session.run.finish("profile", session.profile_key(), seconds=1, made=[])
    text.unlink()
    with opened(str(copied)) as session:
        assert session.run.stage_done("profile", session.profile_key())
    (copied.parent / "run" / "inputs.json").write_text('{"schema": 1, "inputs": [3]}')
    with opened(str(copied)) as session, pytest.raises(UserError, match="cannot be read"):
        session.profile_key()


def test_a_text_replaced_while_a_stage_runs_does_not_count(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    text = tmp_path / "text.txt"
    with opened(str(recipe)) as session:
        key = session.profile_key
        key()
        text.touch()
        timed(session, "first", key, [], lambda: None)  # another time, the same content
        with pytest.raises(UserError, match="changed while the stage ran"):
            timed(session, "profile", key, [], lambda: text.write_text("w5 " * 8000))
        assert list(session.run.stages()) == ["first"]


def test_only_what_is_used_of_a_long_text_is_hashed_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "long.txt"
    path.write_text("a line of text\n" * 20_000)
    source, most = FileText(path=str(path)), 160_000
    before = Inputs(tmp_path, Terminal()).text(source, most)
    assert f"text: {path}: the first 1" in capsys.readouterr().err
    with path.open("a") as file:
        file.write("and more\n")
    assert Inputs(tmp_path, Terminal()).text(source, most) == before
    assert Inputs(tmp_path, Terminal()).text(source, MOST) != before
