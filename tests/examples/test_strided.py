"""A newcomer's target, from its two files to a checkpoint: nothing in the package was touched for it.

`strided.py` and `mixer_strided.py` are all there is, beside its line in the conformance matrix, `test_conformance.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import compress
from compress.cli.app import app
from compress.models.load import load_model
from compress.models.planned import planned_model
from compress.plan import read_plan
from compress.targets.full import FullGroup
from compress.targets.unit import Unit
from tests.cli.recipes import HEAD, make_recipe
from tests.examples.strided import StridedGroup, StrideGrid
from tests.examples.whole import reloads

RECIPE = (
    HEAD
    + """\
  documents:
    - {{task: continuation, length: 320, count: 2, answer_tokens: 16}}
profile:
  statistics:
    - {{name: effect, options: {{strided: {{windows: [16, 64], strides: [4, 16]}}}}}}
search:
  solver: {{name: priced, points: 0}}
  budget: {{kv: 0.5, lengths: [320]}}
"""
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with what the commands made of a recipe that names the target."""
    folder = tmp_path_factory.mktemp("strided")
    recipe = make_recipe(folder)
    recipe.write_text(RECIPE.format(model=folder / "model", text=folder / "text.txt", output=folder / "run"))
    for command in ("validate", "profile", "search", "export"):
        done = CliRunner().invoke(app, [command, str(recipe)])
        assert done.exit_code == 0, done.output
    return folder / "run"


def test_a_cost_is_what_the_mask_says() -> None:
    t = torch.arange(301)
    for group in (StridedGroup(window=20, stride=4), StridedGroup(window=70, stride=7)):
        behind = t[:, None] - t[None]
        seen = (behind >= 0) & ((behind < group.window) | (t[None] % group.stride == 0))
        cost = group.cost(Unit(3, 16), 301)
        assert (cost.keys, cost.flops) == (int(seen[-1].sum()), 4 * 3 * 16 * int(seen.sum()))


def test_a_solver_chooses_it_within_the_budget(run: Path) -> None:
    plan = read_plan(run / "plan.json")
    chosen = {group for layer in plan.layers for group in layer.groups}
    options = StridedGroup.options(Unit(2, 12), [320], StrideGrid(windows=(16, 64), strides=(4, 16)))
    assert chosen & set(options) and chosen <= {*options, FullGroup()}
    assert plan.predicted.of("kv")[320].plan == plan.cost(320, 4).held_bytes
    assert plan.cost(320, 4).held_bytes <= plan.dense_cost(320, 4).held_bytes // 2


def test_the_checkpoint_runs_where_the_package_is_not(run: Path, tmp_path: Path) -> None:
    folder = run / "checkpoint"
    assert (folder / "mixer_strided.py").is_file() and not (folder / "mixer_masked.py").exists()
    checks = json.loads((folder / "compress_checks.json").read_text())
    assert checks["cache_bytes"] == checks["predicted_bytes"] < checks["dense_bytes"]
    assert "strided keys" in (folder / "README.md").read_text()
    loaded = load_model(str(run.parent / "model"), dtype="float32", device="cpu")
    reloads(folder, planned_model(loaded.model, read_plan(run / "plan.json")), tmp_path)


def test_nothing_in_the_package_knows_of_it() -> None:
    package = Path(str(compress.__file__)).parent
    knowing = [path for path in package.rglob("*.py") if "strided" in path.read_text().lower()]
    assert not knowing
