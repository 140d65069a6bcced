"""The worked examples of docs/adding.md run as they stand, and the support matrix says what the code says."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compress import registry
from compress.models.shape import shape_of
from compress.runtime.mixer import MIXERS, Kinds, LayerFacts
from compress.runtime.span import FULL, Span
from compress.search.budget.budget import Budget
from compress.search.dense import Dense
from compress.search.run import make_problem
from compress.search.solvers.uniform import Uniform
from compress.targets.full import FullGroup
from compress.targets.window import SpanGrid
from tests.profile.common import document, measure
from tests.search.synthetic import FakeProfile
from tests.test_house import shipped
from tests.tiny import tiny_model

DOCS = Path(__file__).parents[1] / "docs"
BLOCKS = re.findall(r"```python\n(.*?)```", (DOCS / "adding.md").read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def examples() -> Iterator[dict[str, Any]]:
    """All examples executed, and taken out of the registries afterwards."""
    tables = {name: table for name, table in vars(registry).items() if isinstance(table, registry.Registry)}
    before = {name: dict(table._methods) for name, table in tables.items()}
    found: dict[str, Any] = {"__name__": "docs_example"}
    for block in BLOCKS:
        exec(compile(block, "docs/adding.md", "exec"), found)
    yield found
    for name, methods in before.items():
        getattr(registry, name)._methods = methods
    MIXERS.pop("recent")


def test_examples_are_short() -> None:
    assert len(BLOCKS) == 4 and all(len(block.splitlines()) < 60 for block in BLOCKS)


def test_the_statistic(examples: dict[str, Any]) -> None:
    model = tiny_model("llama-gqa")
    found = measure(model, [examples["Peak"](), registry.statistics["attention"]()], document(90))["peak.90"]
    shape = shape_of(model)
    assert found.shape == (shape.layers, shape.kv_heads)
    assert bool((found > 1 / 90).all()) and bool((found <= 1).all())


def test_the_solver(examples: dict[str, Any]) -> None:
    shape = shape_of(tiny_model("llama-gqa"))
    dense = shape.dense_cost(2048, 4).held_bytes
    problem = make_problem(Dense(shape, 4), FakeProfile((2048,), SpanGrid(), {}), Budget(kv=0.8), Uniform())
    (candidate,) = examples["Layerwise"](every=2).solve(problem)
    plan = candidate.to_plan(problem, {})
    assert plan.layers[0].groups == (FullGroup(),) * shape.kv_heads and plan.layers[1].groups[0].sink == 64
    assert 0.7 * dense < plan.predicted.of("kv")[2048].plan <= 0.8 * dense


def test_the_target(examples: dict[str, Any]) -> None:
    group = registry.targets.parse({"target": "recent", "tokens": 100})
    assert group == examples["RecentGroup"](tokens=100)
    kinds = Kinds([group.model_dump(), {"target": "full"}], LayerFacts(0, 8, 32, 1, None))
    assert [mixer.rules for mixer in kinds.mixers] == [(Span(0, 100, 0.0),), (FULL,)]


def test_the_support_matrix_names_what_the_code_has() -> None:
    text = (DOCS / "support.md").read_text(encoding="utf-8")
    for name in shipped(registry.targets):
        assert f"`{name}`" in text
