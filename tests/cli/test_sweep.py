"""`compress sweep`: every combination in a folder of its own, shared work done once, one table of all."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from compress.errors import UserError
from compress.recipe.grid import axes_of, grid, split
from tests.calls import call
from tests.cli.recipes import make_recipe

SEARCH = """\
search:
  solver: {name: uniform, sink: 4}
  budget: {kv: 0.8, lengths: [320]}
evaluate:
  compare: [plan]
  perplexity: {length: 320, windows: 1}
"""


def test_values_are_separated_outside_of_brackets() -> None:
    assert split("0.5,0.25") == ["0.5", "0.25"]
    assert split("{name: moa, points: 1},{name: uniform}") == ["{name: moa, points: 1}", "{name: uniform}"]
    assert split("[1, [2, 3]],'a,b'") == ["[1, [2, 3]]", "'a,b'"]


OUTLINE = """\
model: some/model
output: runs/a
calibration: {documents: [{length: 1}]}
search: {budget: {kv: 0.5}}
"""


@pytest.fixture
def outline(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(OUTLINE)
    return path


def test_a_grid_is_every_combination(outline: Path) -> None:
    documents = "calibration.documents[0].length=8,16"
    given = ["search.budget.kv=0.5,0.25", documents, "search.solver={name: moa, points: 1}", "evaluate.flops={}"]
    folder, points = grid(outline, axes_of(given), None)
    assert folder == Path("runs/a-sweep") and len(points) == 4 and len({point.name for point in points}) == 4
    first = yaml.safe_load(points[0].text)
    assert first["output"] == f"runs/a-sweep/{points[0].name}"
    assert points[0].name.startswith("kv-0.5_length-8_solver-moa-points-1")
    assert first["search"] == {"budget": {"kv": 0.5}, "solver": {"name": "moa", "points": 1}}
    assert first["calibration"] == {"documents": [{"length": 8}]} and first["evaluate"] == {"flops": {}}
    assert list(points[3].settings.values())[:2] == [0.25, 16]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["kv"], "without values"),
        (["kv="], "without values"),
        (["seed=1", "seed=2"], "set twice"),
        (["seed=1,1"], "same value twice"),
        (["calibration.documents[7].length=1"], "this key cannot be set"),
        (["output.x=1"], "this key cannot be set"),
        (["seed={a"], "--set seed"),
        (["nosuch=1"], "nosuch"),
    ],
)
def test_what_is_no_grid_is_told(given: list[str], told: str, outline: Path) -> None:
    with pytest.raises(UserError, match=told):
        grid(outline, axes_of(given), "out")


def test_a_sweep_runs_every_recipe_and_repeats_nothing(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    text = recipe.read_text()
    recipe.write_text(text[: text.index("search:")] + SEARCH)
    words = ["sweep", recipe, "--set", "search.budget.kv=0.8,0.6,0.0001", "--out", tmp_path / "sweep"]
    first = call(*words)
    assert first.exit_code == 2, first.output  # one of the budgets cannot be met
    assert first.stderr.count("profile: starting") == 1 and first.stderr.count("profile: taken over") == 1
    assert "search.budget.kv: no plan meets the budget" in first.stderr
    assert "2 of 3 done" in first.stderr and "not done: kv-0.0001" in first.stderr
    assert "kv-0.8" in first.stdout and "kv-0.6" in first.stdout and first.stdout.count("dense") == 1
    with (tmp_path / "sweep" / "cells.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["label"] == "KV bytes" and row["variant"] == "plan"]
    assert [row["search.budget.kv"] for row in rows] == ["0.8", "0.6"]
    assert float(rows[0]["value"]) > float(rows[1]["value"]) and float(rows[0]["share_of_dense"]) <= 1
    assert "2 evaluations" in (tmp_path / "sweep" / "report.html").read_text(encoding="utf-8")
    again = call(*words, "--json")
    assert "starting" not in again.stderr.replace("search: starting", "") and "evaluate: done before" in again.stderr
    assert {record["folder"] for record in json.loads(again.stdout)} == {"kv-0.8", "kv-0.6"}
    alone = call("search", tmp_path / "sweep" / "recipes" / "kv-0.6.yaml")
    assert alone.exit_code == 0 and "search: done before" in alone.stderr
    dense = [path.name for path in (tmp_path / "sweep" / "kv-0.6" / "evaluation").glob("dense-*")]
    assert dense and all(
        (tmp_path / "sweep" / "kv-0.8" / "evaluation" / name).samefile(
            tmp_path / "sweep" / "kv-0.6" / "evaluation" / name
        )
        for name in dense
    )
