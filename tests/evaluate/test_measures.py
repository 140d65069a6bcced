"""Every registered measure on a tiny model: its cells, its file, and that what is kept is not measured again."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.data.passkey import PassKey
from compress.data.reader import Reader
from compress.data.text import FileText
from compress.errors import UserError
from compress.evaluate.compare import compare
from compress.evaluate.comparison import Comparison, read_comparison
from compress.evaluate.measure import Setting, Subject, Variant
from compress.evaluate.measures.kv_held import KvHeld
from compress.evaluate.tables import markdown, tables
from compress.models.families import layers_of
from compress.models.planned import planned_model
from compress.models.pruning import block_parameters
from compress.models.shape import shape_of
from compress.plan import make_plan, uniform_plan
from compress.registry import measures
from compress.runtime.modeling_compress import CACHE
from compress.targets.cost import Cost
from compress.targets.linear import LinearGroup
from compress.targets.retain import RetainGroup
from compress.targets.routed import RoutedGroup
from compress.targets.target import Target
from tests.data.language import byte_loaded, byte_model, story
from tests.tiny import random_ids, tiny_model

# What each measure is tried with, and the labels of its cells.
MATRIX: dict[str, tuple[dict[str, Any], set[str]]] = {
    "agreement": ({"length": 64, "windows": 2}, {"agreement"}),
    "branches": ({"length": 64, "windows": 2}, set()),
    "density": ({}, {"prefill pairs", "decode keys"}),
    "distance": (
        {"lengths": (500,), "window": 128, "count": 2, "texts": 4, "pairs": 4},
        {"pass key inside 128", "pass key beyond 128", "words inside 128", "words beyond 128"},
    ),
    "drift": ({"length": 128}, set()),
    "flops": ({"lengths": (64,)}, {"prefill FLOPs"}),
    "kv_bytes": ({}, {"KV bytes"}),
    "kv_held": ({}, set()),
    "latency": (
        {"length": 32, "steps": 16},
        {"prefill", "decode step, batch 1", "KV cache as allocated, batch 1"},
    ),
    "load": ({"length": 64, "windows": 2}, set()),
    "lm_eval": ({"suites": ("passkey",), "lengths": (600,), "count": 2}, {"passkey_600"}),
    "perplexity": ({"length": 64, "windows": 2}, {"perplexity"}),
    "recall": ({"tasks": (PassKey(length=200, count=2),)}, {"passkey"}),
    "state_bytes": ({}, set()),
    "size": ({}, {"parameters", "parameters of the layers"}),
}
DENSE = Cost(held_bytes=2**20, read_bytes=2**20, keys=200, flops=4000)
HALF = Cost(held_bytes=2**19, read_bytes=2**19, keys=50, flops=1000)


def compared(name: str, text: FileText, folder: Path, built: list[str]) -> Comparison:
    def build(row: str) -> Any:
        built.append(row)
        return loaded.model if row == "dense" else byte_model(1)

    keys, _ = MATRIX[name]
    if "text" in measures[name].model_fields:
        keys = keys | {"text": text}
    loaded = byte_loaded()
    variants = [
        Variant(row, functools.partial(build, row), row, lambda length, cost=cost: cost)  # type: ignore[misc]
        for row, cost in (("dense", DENSE), ("plan", HALF))
    ]
    asked = [measures[name](**keys), *([] if name == "perplexity" else [measures["perplexity"](text=text, length=64)])]
    return compare(loaded, variants, asked, text=text, seed=0, cache_dir=folder / "kept")


@pytest.mark.parametrize("name", MATRIX)
def test_a_measure_makes_cells_that_are_kept_and_shown(name: str, text: FileText, tmp_path: Path) -> None:
    built: list[str] = []
    first = compared(name, text, tmp_path, built)
    labels = MATRIX[name][1]
    for row in first.variants:
        cells = [cell for result in row.of(name) for cell in result.cells()]
        assert {cell.label for cell in cells if cell.part is None} == labels
        assert all(cell.better in ("lower", "higher") and cell.value >= 0 for cell in cells)
    first.write(tmp_path / "evaluation.json")
    assert read_comparison(tmp_path / "evaluation.json") == first
    words = markdown(first)
    for cell in first.variants[1].cells:
        shown = cell.table in ("summary", "task") and cell.part is None
        assert not shown or cell.name in words or cell.label in words
    assert {record["label"] for record in first.records()} >= labels and tables(first)[0].rows[1][0] == "plan"
    kept = len(list((tmp_path / "kept").iterdir()))
    again = compared(name, text, tmp_path, built)
    assert len(list((tmp_path / "kept").iterdir())) == kept
    for before, after in zip(first.variants, again.variants, strict=True):
        assert before.results == after.results
    if name != "flops":  # which counts the parameters of the model in memory
        assert built == ["dense", "plan"]


class Ran(BaseException):
    """A model was run; no handler of errors takes it."""


@pytest.mark.parametrize("name", MATRIX)
def test_a_measure_that_runs_a_model_tells_what_passes_through_it(name: str, text: FileText, tmp_path: Path) -> None:
    keys = MATRIX[name][0] | ({"text": text} if "text" in measures[name].model_fields else {})
    loaded, measure = byte_loaded(), measures[name](**keys)
    groups = loaded.shape.kv_heads
    rows: list[Sequence[Target]] = [[LinearGroup(sink=0, alpha=64)] * groups]
    rows += [RoutedGroup.layer(groups, 1)] * (loaded.shape.layers - 1)
    models = [loaded.model, planned_model(loaded.model, make_plan(loaded.shape, rows), untrained=True)]

    def stop(*_: object) -> None:
        raise Ran

    hooks = [layers_of(model)[0].register_forward_pre_hook(stop) for model in models]
    setting = Setting(Reader(loaded, 0, tmp_path, None), text, 0, 1, measure.input_lengths or (64,))
    dense, plan = (
        Variant(row, lambda model=model: model, row, lambda length: DENSE)  # type: ignore[misc]
        for row, model in zip(("dense", "plan"), models, strict=True)
    )
    ran = 0
    for job in measure.jobs(setting):
        try:
            job.run(Subject(plan, dense, loaded.model, loaded.tokenizer), lambda done, total: None)
        except Ran:
            ran += 1
    for hook in hooks:
        hook.remove()
    for told in (measure.inputs(loaded.shape), measure.inputs()):
        assert bool(ran) == any(inputs.count for inputs in told)


def cells_of(name: str, text: FileText, folder: Path) -> list[dict[str, float]]:
    """Value by label of each row."""
    rows = compared(name, text, folder, []).variants
    return [{cell.label: cell.value for result in row.of(name) for cell in result.cells()} for row in rows]


def test_flops_are_two_for_each_parameter_and_token_and_those_of_attention(text: FileText, tmp_path: Path) -> None:
    dense, plan = cells_of("flops", text, tmp_path)
    weights = 2 * 64 * block_parameters(byte_model())
    assert (dense["prefill FLOPs"], plan["prefill FLOPs"]) == (weights + DENSE.flops, weights + HALF.flops)


def test_densities_are_shares_of_the_dense_model(text: FileText, tmp_path: Path) -> None:
    dense, plan = cells_of("density", text, tmp_path)
    assert dense == {"prefill pairs": 1.0, "decode keys": 1.0}
    assert plan == {"prefill pairs": 0.25, "decode keys": 0.25}


def test_a_model_agrees_with_itself_and_less_with_another(text: FileText, tmp_path: Path) -> None:
    dense, plan = cells_of("agreement", text, tmp_path)
    assert dense["agreement"] == 1.0
    ids = torch.tensor([byte_loaded().tokenizer(story())["input_ids"]])
    with torch.no_grad():
        one, two = (byte_model(seed)(ids[:, :64]).logits.argmax(-1) for seed in (0, 1))
    assert 0 <= plan["agreement"] < 1 and bool((one != two).any())


def test_what_does_not_fit_is_told_before_a_model_is_built(text: FileText, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="context"):
        compare(
            byte_loaded(),
            [Variant("dense", lambda: pytest.fail("built"))],
            [measures["agreement"](text=text, length=50_000)],
            seed=0,
            cache_dir=tmp_path,
        )


def test_what_texts_hold_is_that_of_each_of_them() -> None:
    """As many texts of a length as there is text for, one behind the other."""
    dense = tiny_model("llama-gqa")
    group = RetainGroup(sink=0, alpha=1, scorer="value_norm", threshold=1.77, share=0.5, spread=0.1)
    plan = uniform_plan(shape_of(dense), group)
    model: Any = planned_model(dense, plan)
    beside = SimpleNamespace(cost=functools.partial(plan.dense_cost, itemsize=4))
    subject: Any = SimpleNamespace(
        model=model, variant=SimpleNamespace(cost=functools.partial(plan.cost, itemsize=4)), beside=beside
    )
    ids = random_ids(1, 1000)
    found: Any = KvHeld(texts=4)._held((320, 1100), ids[0].tolist(), subject, lambda *_: None)
    (held,) = found.lengths
    expected = []
    for start in (0, 320, 640):
        cache = model.new_cache()
        with torch.no_grad():
            model(ids[:, start : start + 320], **{CACHE: cache})
        expected.append(cache.allocated_bytes())
    assert held.held == expected and len(set(expected)) > 1
    cells = {cell.label: cell for cell in found.cells()}
    assert cells["measured mean"].value == sum(expected) / 3 and cells["measured mean"].count == 3
    deviation = torch.tensor(expected, dtype=torch.float64).std(correction=0)
    assert cells["measured spread"].value == pytest.approx(float(deviation))
    assert (held.expected, held.most) == (plan.cost(320, 4).held_bytes, plan.cost(320, 4).most_bytes)
    known = uniform_plan(shape_of(dense), group.model_copy(update={"spread": 0.0}))  # as a plan by hand may say
    subject.variant.cost = functools.partial(known.cost, itemsize=4)
    alone: Any = KvHeld(texts=1)._held((320,), ids[0].tolist(), subject, lambda *_: None)
    assert alone.lengths[0].spread == 0
