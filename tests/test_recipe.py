"""Recipes: every shipped one reads, and a wrong one reports all that is wrong, with its place."""

import json
import re
from pathlib import Path

import pytest

from compress.cli import methods
from compress.errors import UserError
from compress.located_yaml import read_located
from compress.recipe import Methods, Recipe, load_recipe, parse_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
MINIMAL = """\
model: demo/smollm2-135m
output: runs/x
calibration:
  documents:
    - {task: passkey, length: 128, count: 1}
search:
  budget: {kv: 0.5, lengths: [128]}
"""


@pytest.fixture(scope="module")
def known() -> Methods:
    return methods.load()


def read(text: str, known: Methods) -> Recipe:
    return parse_recipe(text, known, Path("r.yaml"))


def problems(text: str, known: Methods) -> list[str]:
    with pytest.raises(UserError) as caught:
        read(text, known)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_read(path: Path, known: Methods) -> None:
    recipe = load_recipe(path, known)
    assert recipe.text == path.read_text(encoding="utf-8")
    calibration = recipe.resolved()["calibration"]
    lengths = {part: [task["length"] for task in calibration[part]] for part in ("documents", "held_out")}
    if lengths["held_out"]:
        assert max(lengths["held_out"]) >= max(lengths["documents"])


def test_defaults_are_written_out_and_read_back_the_same(known: Methods) -> None:
    recipe = read(MINIMAL, known)
    resolved = recipe.resolved()
    assert resolved["calibration"]["text"] == {"source": "embedded"}
    assert [entry["name"] for entry in resolved["profile"]["statistics"]] == ["influence", "attention", "retrieval"]
    assert resolved["search"]["solver"]["name"] == "moa"
    assert resolved["evaluate"]["compare"] == ["plan", "uniform"]
    again = read(json.dumps(resolved), known)
    assert again.resolved() == resolved
    assert json.dumps(again.resolved()) == json.dumps(resolved)


def test_all_problems_at_once_with_line_and_nearest_name(known: Methods) -> None:
    text = MINIMAL.replace("output:", "outptu:").replace("count: 1", "count: four").replace("0.5", "1.5")
    found = problems(text, known)
    assert len(found) == 4
    assert found[0].startswith("r.yaml:1:1: missing key `output`")
    assert found[1].startswith("r.yaml:2:1: unknown key `outptu`") and "did you mean `output`?" in found[1]
    assert found[2].startswith("r.yaml:5:43: wrong value for `calibration.documents[0].count`")
    assert "valid integer" in found[2] and '"four"' in found[2]
    assert found[3].startswith("r.yaml:7:16: wrong value for `search.budget.kv`") and "1.5" in found[3]


def test_a_budget_of_other_kinds_reads(known: Methods) -> None:
    kinds = "{density: {128: 0.5}, decode_time: 0.8, batch_sizes: [1, 8], cost_table: [a.json, b.json], lengths: [128]}"
    recipe = read(MINIMAL.replace("{kv: 0.5, lengths: [128]}", kinds), known)
    budget = recipe.resolved()["search"]["budget"]
    assert budget["kv"] is None and budget["density"] == {"128": 0.5} and budget["cost_table"] == ["a.json", "b.json"]
    assert read(json.dumps(recipe.resolved()), known).resolved() == recipe.resolved()
    assert read(MINIMAL.replace("kv: 0.5, ", ""), known).resolved()["search"]["budget"]["kv"] == 0.5


@pytest.mark.parametrize(
    ("old", "new", "place", "hint"),
    [
        ("task: passkey", "task: paskey", "5:14: unknown task `paskey`", "did you mean `passkey`?"),
        ("task: passkey, ", "", "5:7: missing key `calibration.documents[0].task`", "passkey"),
        ("length: 128,", "lenght: 128,", "5:23: unknown key `calibration.documents[0].lenght`", "`length`?"),
        ("count: 1", "count: true", "5:43: wrong value", "true"),
        ("count: 1", 'count: "1"', "5:43: wrong value", '"1"'),
        ("count: 1", "count: 0", "5:43: wrong value", "greater than or equal to 1"),
        ("[128]", "[0]", "7:30: wrong value for `search.budget.lengths`", "at least 1 token"),
        ("budget:", "solver: {name: mao}\n  budget:", "7:18: unknown solver `mao`", "did you mean `moa`?"),
        ("budget:", "solver: moa\n  budget:", "7:11: wrong value for `search.solver`", "write `{name: moa}`"),
        ("model:", "seed: -1\nmodel:", "1:7: wrong value for `seed`", "greater than or equal to 0"),
        ("model:", "device: cude\nmodel:", "1:9: wrong value for `device`", "auto, cpu, mps"),
        ("model:", "dtype: float23\nmodel:", "1:8: wrong value for `dtype`", "did you mean `float32`?"),
        ("model:", "seed: 1\nseed: 2\nmodel:", "2:1: key `seed` is given twice", "line 1"),
        ("model:", "schema: 2\nmodel:", "1:9: wrong value for `schema`", "1"),
        ("model:", "profile: {statistics: [{name: entropy}]}\nmodel:", "1:31: unknown statistic", "attention"),
        ("model:", "evaluate: {recall: [{task: continuation, length: 128, count: 1}]}\nmodel:", "1:21", "passkey"),
        ("model:", "evaluate: {perplexity: {text: {source: fil}, length: 64}}\nmodel:", "1:31", "`file`?"),
        ("model:", "evaluate: {perplexity: {text: {source: file, pth: x}, length: 64}}\nmodel:", "1:46", "`path`?"),
        ("model:", "export: {max_shard_size: lots}\nmodel:", "1:26: wrong value", "5GB"),
        ("demo/smollm2-135m", "3", "1:8: wrong value for `model`", "valid string"),
    ],
)
def test_one_mistake(old: str, new: str, place: str, hint: str, known: Methods) -> None:
    found = problems(MINIMAL.replace(old, new, 1), known)
    assert any(line.startswith(f"r.yaml:{place}") and hint in line for line in found), found


def test_the_same_document_twice(known: Methods) -> None:
    line = "    - {task: passkey, length: 128, count: 1}\n"
    (found,) = problems(MINIMAL.replace(line, line * 2), known)
    assert found.startswith("r.yaml:6:7: `calibration.documents[1]` is there twice")


def test_scores_that_are_not_measured(known: Methods) -> None:
    solver = "solver: {name: amp, importance: [amp, wandasp, taylor]}\n  budget: {parameters: 0.7}"
    text = MINIMAL.replace("budget: {kv: 0.5, lengths: [128]}", solver)
    measured = "profile: {statistics: [{name: amp}, {name: wanda_sp}]}\nmodel:"
    first, second = problems(text.replace("model:", measured, 1), known)
    assert first.startswith("r.yaml:8:11: the solver reads `wandasp`") and "did you mean `wanda_sp`?" in first
    assert "reads `taylor`" in second and "add `{name: taylor}`" in second
    assert read(text.replace("model:", measured, 1).replace("wandasp, taylor", "wanda_sp"), known)


@pytest.mark.parametrize("text", ["", "[1, 2]", "3", "a: [", "a: *b", "\t- x", "a: &a [*a]", "\x00"])
def test_what_is_no_mapping_is_no_recipe(text: str, known: Methods) -> None:
    assert all(re.match(r"r\.yaml(:\d+:\d+)?: ", line) for line in problems(text, known))


def test_numbers_with_an_exponent_are_numbers(known: Methods) -> None:
    text = MINIMAL.replace("budget:", "solver: {name: moa, gap: 1e-3}\n  budget:")
    assert read(text, known).resolved()["search"]["solver"]["gap"] == 0.001
    assert read_located("a: '1e-3'", "x").data == {"a": "1e-3"}


def test_dates_and_keys_of_numbers(known: Methods) -> None:
    text = MINIMAL.replace("output: runs/x", "output: 2026-01-01").replace(
        "{kv: 0.5, lengths: [128]}", "{kv: {128: 0.5, 256: 0.25}}"
    )
    resolved = read(text, known).resolved()
    assert resolved["output"] == "2026-01-01"
    assert resolved["search"]["budget"]["kv"] == {"128": 0.5, "256": 0.25}


def test_files_that_are_not_there_or_not_text(tmp_path: Path, known: Methods) -> None:
    (tmp_path / "quickstart.yaml").write_text(MINIMAL)
    with pytest.raises(UserError, match=r"no such recipe file[\s\S]*did you mean"):
        load_recipe(tmp_path / "quikstart.yaml", known)
    (tmp_path / "bad.yaml").write_bytes(b"model: \xff")
    with pytest.raises(UserError, match="not UTF-8"):
        load_recipe(tmp_path / "bad.yaml", known)
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(tmp_path, known)
