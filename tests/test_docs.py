"""The worked examples of docs/adding.md run as they stand, from profile to checkpoint."""

import json
import re
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import yaml

from compress import registry
from compress.evaluate.measure import asked_for
from compress.export.export import export_checkpoint
from compress.models.planned import planned_model
from compress.plan import Plan
from compress.profile.heads.effect import Effect
from compress.profile.heads.hidden_mass import HiddenMass
from compress.profile.key import Key
from compress.profile.run import run_profile
from compress.profile.store import Profile
from compress.recipe.load import load_recipe
from compress.runtime.mixer import MIXERS
from compress.search.budget.budget import Budget
from compress.search.dense import Dense
from compress.search.run import make_problem
from compress.search.solver import Solver
from compress.search.solvers.priced import Priced
from compress.targets.full import FullGroup
from compress.targets.routed import RoutedGroup
from compress.targets.window import SpanGrid, WindowGroup
from tests.examples.whole import reloads
from tests.profile.common import document
from tests.test_house import shipped
from tests.tiny import tiny_loaded

DOCS = Path(__file__).parents[1] / "docs"
BLOCKS = re.findall(r"```python\n(.*?)```", (DOCS / "adding.md").read_text(encoding="utf-8"), flags=re.DOTALL)
LENGTH = 192
LOADED = tiny_loaded("llama-gqa")


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """All examples executed, the mixer as the module that its target names; taken out of the registries afterwards."""
    tables = {name: table for name, table in vars(registry).items() if isinstance(table, registry.Registry)}
    before = {name: dict(table._methods) for name, table in tables.items()}
    found: dict[str, Any] = {"__name__": "docs_example"}
    *blocks, mixer = BLOCKS
    for block in blocks:
        exec(compile(block, "docs/adding.md", "exec"), found)
    path = tmp_path_factory.mktemp("runtime") / "mixer_recent.py"
    path.write_text(mixer)
    name = found["RecentGroup"].runtime
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    yield found
    for kind, methods in before.items():
        getattr(registry, kind)._registered = methods
    MIXERS.pop("recent")
    del sys.modules[name]


@pytest.fixture(scope="module")
def profile(examples: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """A profile of the example's statistic, of what all options of the example's target cost, and of windows."""
    statistics = [examples["Peak"](), Effect(options={"recent": None}), HiddenMass(grid=SpanGrid(sinks=(0,)))]
    return run_profile(LOADED, {LENGTH: [document(LENGTH)]}, statistics, tmp_path_factory.mktemp("profile"), seed=0)


def plan_by(solver: Solver, profile: Profile, kv: float) -> Plan:
    """The first plan of a solver."""
    problem = make_problem(Dense(LOADED.shape, 4), profile, Budget(kv=kv, lengths=(LENGTH,)), solver)
    plan = solver.solve(problem)[0].to_plan(problem, {"made by": "tests"})
    assert plan.cost(LENGTH, 4).held_bytes <= kv * plan.dense_cost(LENGTH, 4).held_bytes
    return plan


def test_examples_are_short() -> None:
    assert len(BLOCKS) == 4 and all(len(block.splitlines()) < 60 for block in BLOCKS)


def test_the_statistic(profile: Profile) -> None:
    found = profile.tensor(Key("peak", length=LENGTH))
    assert found.shape == (LOADED.shape.layers, LOADED.shape.kv_heads)
    assert bool((found > 1 / LENGTH).all()) and bool((found <= 1).all())


def test_the_solver(examples: dict[str, Any], profile: Profile, tmp_path: Path) -> None:
    plan = plan_by(examples["Layerwise"](every=2, sink=0), profile, 0.8)
    groups = [set(layer.groups) for layer in plan.layers]
    assert groups[0] == groups[2] == {FullGroup()}
    assert groups[1] == {WindowGroup(sink=0, alpha=64, beta=0.0)}
    report = export_checkpoint(LOADED, plan, tmp_path / "checkpoint")
    assert report.checks.cache_bytes == report.checks.predicted_bytes


def test_the_target_is_chosen_exported_and_reloaded(examples: dict[str, Any], profile: Profile, tmp_path: Path) -> None:
    options = {examples["RecentGroup"](tokens=LENGTH // part) for part in (8, 4, 2)}
    assert set(profile.priced) == options == {registry.targets.parse(option.model_dump()) for option in options}
    plan = plan_by(Priced(points=0), profile, 0.7)
    chosen = {group for layer in plan.layers for group in layer.groups}
    assert chosen & options and chosen <= {*options, FullGroup()}
    report = export_checkpoint(LOADED, plan, tmp_path / "checkpoint")
    assert report.checks.cache_bytes == report.checks.predicted_bytes < report.checks.dense_bytes
    assert (tmp_path / "checkpoint" / "mixer_recent.py").is_file()
    (tmp_path / "again").mkdir()
    reloads(tmp_path / "checkpoint", planned_model(LOADED.model, plan), tmp_path / "again")


def test_the_support_matrix_names_what_the_code_has() -> None:
    text = (DOCS / "support.md").read_text(encoding="utf-8")
    for name in shipped(registry.targets):
        assert f"`{name}`" in text


def test_the_recipe_of_routed_heads_is_whole(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / "routed.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    part, text = sorted(blocks, key=lambda block: block.startswith("schema:"))
    whole = yaml.safe_load(text)
    for block in (text, yaml.safe_dump({**whole, **yaml.safe_load(part)})):  # a part of one, in its place
        (tmp_path / "recipe.yaml").write_text(block, encoding="utf-8")
        load_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    asked = {measure.registered for measure in asked_for(recipe.evaluate)}
    assert {"load", "latency", "perplexity", "recall"} <= asked and recipe.recover is not None


def test_the_entry_of_a_plan_in_the_docs_is_one_of_a_layer_that_fits() -> None:
    (text,) = re.findall(r"```json\n(.*?)```", (DOCS / "routed.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    entry = json.loads(text)
    layer = RoutedGroup.layer(8, 2, shared=range(4), router="norm")
    assert RoutedGroup.model_validate(entry) == layer[0] and RoutedGroup.layer_problem(layer, 4) is None
