"""What is measured of heads with a window and a state: each branch by itself, recall by distance, and drift."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from compress.cli.app import app
from compress.data.associations import associations, words_of
from compress.data.reader import Reader
from compress.data.text import FileText
from compress.errors import UserError
from compress.evaluate.compare import compare
from compress.evaluate.comparison import Comparison, read_comparison
from compress.evaluate.measure import Variant
from compress.evaluate.measures.branches import TITLE
from compress.evaluate.measures.distance import DistanceResult, Recalled
from compress.evaluate.measures.drift import drift
from compress.evaluate.measures.perplexity import Perplexity, perplexity
from compress.evaluate.paired import wilson
from compress.evaluate.tables import markdown, tables
from compress.models.branches import branched, only
from compress.models.planned import planned_model
from compress.plan import Plan, make_plan, uniform_plan
from compress.plan.states import pays_from, states_of
from compress.registry import measures
from compress.report.facts import read_facts
from compress.report.page import render
from compress.report.plots import evaluation_plots
from compress.runtime.span import PAGE
from compress.runtime.step import Step
from compress.targets.cost import Cost
from compress.targets.full import FullGroup
from compress.targets.linear import LinearGroup
from tests.data.language import byte_loaded, byte_tokenizer

LENGTH = 400
STATE, DELTA = LinearGroup(sink=0, alpha=64), LinearGroup(rule="delta", sink=0, alpha=64)


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Two linear groups that share a mixer; one of another form beside a full one."""
    return make_plan(byte_loaded().shape, [[STATE, STATE], [DELTA, FullGroup()]])


@pytest.fixture(scope="module")
def model(plan: Plan) -> Any:
    """With states that count: gains and gates that are not those of the start."""
    torch.manual_seed(0)
    made = planned_model(byte_loaded().model, plan, untrained=True)
    with torch.no_grad():
        for place in branched(made):
            for name, weight in place.mixer.named_parameters():
                if name in ("gain", "gate_bias", "norm"):
                    weight.fill_(1.0)
    return made


@pytest.fixture(scope="module")
def ids(text: FileText) -> list[int]:
    return list(byte_tokenizer()(text.load())["input_ids"][:LENGTH])


def variants(model: Any) -> list[Variant]:
    return [Variant("dense", lambda: byte_loaded().model), Variant("plan", lambda: model, "a")]


def measured(name: str, model: Any, text: FileText, folder: Path, **keys: Any) -> Comparison:
    asked = [measures[name](**keys)]
    return compare(byte_loaded(), variants(model), asked, text=text, seed=0, cache_dir=folder, batch_size=4)


@torch.inference_mode()
def heads_of(model: Any, ids: list[int]) -> list[torch.Tensor]:
    """What every layer's heads give, `[T, H, D]`."""
    found: list[torch.Tensor] = []
    attentions = [layer.self_attn for layer in model.model.layers]
    hooks = [
        attention.o_proj.register_forward_pre_hook(lambda _, args: found.append(args[0][0])) for attention in attentions
    ]
    model(input_ids=torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [heads.unflatten(1, (4, -1)) for heads in found]


def test_branches_are_switched_for_all_groups_or_for_one(model: Any, ids: list[int]) -> None:
    places = branched(model)
    assert [(place.layer, place.groups) for place in places] == [(0, (0, 1)), (1, (0,))]
    full = heads_of(model, ids)[0]
    seen: dict[str, torch.Tensor] = {}
    for branches in ("window", "linear", "none"):
        with only(places, branches):
            seen[branches] = heads_of(model, ids)[0]
        with only(places[:1], branches, 1):
            one = heads_of(model, ids)[0]
        torch.testing.assert_close(one[:, :2], full[:, :2], rtol=0, atol=0)
        torch.testing.assert_close(one[:, 2:], seen[branches][:, 2:], rtol=0, atol=0)
    torch.testing.assert_close(heads_of(model, ids)[0], full, rtol=0, atol=0)
    assert not seen["none"].any()
    hidden = slice(3 * PAGE, None)  # where there are keys that the window hides
    torch.testing.assert_close(seen["window"][:PAGE], full[:PAGE])
    assert not seen["linear"][:PAGE].any()
    assert all((seen[branches][hidden] - full[hidden]).abs().amin((1, 2)).max() > 0 for branches in seen)


def test_the_dense_model_reads_a_text_once_for_all_variants(model: Any, text: FileText, tmp_path: Path) -> None:
    loaded = byte_loaded()
    passes: list[None] = []
    hook = loaded.model.base_model.layers[0].register_forward_pre_hook(lambda *_: passes.append(None))
    rows = [Variant("dense", lambda: loaded.model), *variants(model)[1:], Variant("again", lambda: model, "b")]
    asked = [measures[name](text=text, length=100, windows=2) for name in ("agreement", "branches")]
    found = compare(loaded, rows, asked, seed=0, cache_dir=tmp_path)
    assert len(passes) == 2 * len(asked)
    for name in ("agreement", "branches"):
        assert found.variants[1].of(name) == found.variants[2].of(name)
    for file in tmp_path.glob("plan-*.json"):  # as if the run had ended after the dense model
        file.unlink()
    assert compare(loaded, rows, asked, seed=0, cache_dir=tmp_path).variants[1].results == found.variants[1].results
    hook.remove()


def test_the_table_of_branches(model: Any, text: FileText, ids: list[int], tmp_path: Path) -> None:
    found = measured("branches", model, text, tmp_path / "kept", length=LENGTH, windows=1, by="group")
    found.write(tmp_path / "evaluation.json")
    assert read_comparison(tmp_path / "evaluation.json") == found
    assert not [cell for cell in found.dense.cells if cell.table == TITLE]
    plan = found.variants[1]
    whole = {cell.label: cell for cell in plan.cells if cell.table == TITLE and cell.part is None}
    assert list(whole) == [f"perplexity, {words}" for words in ("full", "window only", "linear only", "none")]
    part = Reader(byte_loaded(), 0, tmp_path).ids(text, "evaluation", LENGTH)
    request = Perplexity(length=LENGTH, windows=1)
    nll = {}
    for branches, label in zip(("both", "window", "linear", "none"), whole, strict=True):
        with only(branched(model), branches):  # type: ignore[arg-type]
            expected = perplexity(model, part, request)
        nll[branches] = expected.nll
        assert whole[label].value == pytest.approx(expected.perplexity)
        parts = [cell.value for cell in plan.cells if cell.label == label and cell.part is not None]
        assert parts == pytest.approx([bucket.perplexity for bucket in expected.buckets])
    dense = perplexity(byte_loaded().model, part, request)
    assert whole["perplexity, full"].dense == pytest.approx(dense.perplexity)

    units = {(cell.place, cell.label): cell.value for cell in plan.cells if cell.place is not None}
    assert {place for place, _ in units} == {(0, 0), (0, 1), (1, 0)} and len(units) == 9
    with only(branched(model)[:1], "window", 1):
        lost = (perplexity(model, part, request).nll - nll["both"]) / (LENGTH - 1)
    assert units[(0, 1), "loss with window only"] == pytest.approx(lost, abs=1e-9)

    words = markdown(found)
    assert "which branch of the converted heads does the work" in words and "| group 0 | group 1 |" in words
    grid = tables(found)[-1]
    assert [row[0] for row in grid.rows] == ["0", "1"] and grid.rows[0][2].count("/") == 2 and not grid.rows[1][2]
    whole_only = measured("branches", model, text, tmp_path / "kept", length=LENGTH, windows=1, by="model").variants[1]
    assert whole_only.cells == [cell for cell in plan.cells if cell.place is None]
    by_layer = measured("branches", model, text, tmp_path / "kept", length=LENGTH, windows=1, by="layer").variants[1]
    assert {cell.place for cell in by_layer.cells if cell.place} == {(0, None), (1, None)}


def test_gaps_of_associations_follow_their_law() -> None:
    tokenizer, words = byte_tokenizer(), words_of(byte_tokenizer())
    assert all(tokenizer.decode([word]).strip().isalpha() for word in words)
    pairs, length, before = 4, 320, 20
    made = associations(tokenizer, words, length, pairs, 200, random.Random(0), before)
    gaps = []
    for one in made:
        assert len(one.tokens) == length and len(one.queries) == pairs
        end = before + 2 * pairs
        context = dict(zip(one.tokens[before:end:2], one.tokens[before + 1 : end : 2], strict=True))
        assert len(context) == pairs and not set(context) & set(context.values())
        for query in one.queries:
            assert context[one.tokens[query.position]] == query.value == one.tokens[query.position + 1]
            said = query.position - query.gap
            assert one.tokens[said] == query.value and before < said < end
            gaps.append((query.position - end) // 2 + 1)
        assert sum(token in context for token in one.tokens) == 2 * pairs
    slots = np.arange(1, (length - before - 2 * pairs) // 2 + 1)
    law = slots**-0.99 / (slots**-0.99).sum()
    numbers = np.random.default_rng(0)
    expected = np.concatenate([numbers.choice(slots, pairs, replace=False, p=law) for _ in range(2000)])
    for edge in (1, 3, 12, 50):
        share, other = np.mean(np.array(gaps) <= edge), np.mean(expected <= edge)
        assert abs(share - other) < 4 * math.sqrt(other * (1 - other) / len(gaps))
    assert made == associations(tokenizer, words, length, pairs, 200, random.Random(0), before)
    for sizes, message in (((20, 6), "no room"), ((4000, 500), "too few words")):
        with pytest.raises(UserError, match=message):
            associations(tokenizer, words, *sizes, 1, random.Random(0))


def test_recall_is_told_apart_by_distance(model: Any, text: FileText, tmp_path: Path) -> None:
    keys = {"lengths": (600,), "window": 128, "count": 3, "texts": 2, "pairs": 4}
    found = measured("distance", model, text, tmp_path / "kept", **keys)
    for row in found.variants:
        cells = {cell.label: cell for cell in row.cells if cell.part is None and "window" not in cell.label}
        inside, beyond = cells["pass key inside 128"], cells["pass key beyond 128"]
        assert (inside.count, beyond.count) == (3, 3) and inside.interval == wilson(round(3 * inside.value), 3)
        assert sum(cell.count or 0 for cell in row.cells if cell.label == beyond.label and cell.part) == 3
        assert 0 < (cells["words beyond 128"].count or 0) <= 8
    items = found.variants[0].of("distance")[0].items
    assert all(item.near <= 128 for item in items[:3]) and all(item.far >= 128 + PAGE for item in items[3:])
    # The evidence of a word is its key and its value, and a window counts the query that asks, too.
    assert all(item.near == item.far + 2 for item in found.variants[0].of("distance")[1].items)
    assert "128 tokens" in markdown(found)
    for wrong, message in (({"window": 8}, "do not fit into the window"), ({"lengths": (256,)}, "no place beyond")):
        with pytest.raises(UserError, match=message):
            measured("distance", model, text, tmp_path / "kept", **{**keys, **wrong})


def test_an_answer_is_inside_beyond_or_between() -> None:
    items = [
        Recalled(near=near, far=far, correct=correct)
        for near, far, correct in (
            (64, 40, True),
            (65, 41, True),
            (200, 127, True),
            (150, 128, False),
            (900, 800, True),
        )
    ]
    result = DistanceResult(task="words", length=1000, window=64, items=items)
    cells = [
        (cell.label, cell.part and (cell.part.low, cell.part.high), cell.value, cell.count) for cell in result.cells()
    ]
    assert cells == [
        ("words inside 64", None, 1.0, 1),
        ("words beyond 64", None, 0.5, 2),
        ("words beyond 64", (128, 512), 0.0, 1),
        ("words beyond 64", (512, 1000), 1.0, 1),
    ]
    assert "1 inside, 2 beyond" in result.words()


def test_a_state_in_float32_does_not_drift_and_one_in_bfloat16_does(model: Any, text: FileText, tmp_path: Path) -> None:
    found = measured("drift", model, text, tmp_path / "kept", length=LENGTH + 3)
    assert not found.dense.of("drift")[0].cells()
    whole, *layers = found.variants[1].of("drift")[0].cells()
    assert whole.value == max(cell.value for cell in layers) < 1e-5 and [cell.place for cell in layers] == [
        (0, None),
        (1, None),
    ]
    mixer = copy.deepcopy(branched(model)[0].mixer)
    torch.manual_seed(1)
    query, key, value = (torch.randn(1, heads, LENGTH, 8) for heads in (4, 2, 2))
    step = Step.begin(None, None, 1, LENGTH, query.device)
    assert 0 < drift(mixer, query, key, value, step, None) < 1e-5
    absorb = type(mixer)._absorb

    class Short(type(mixer)):  # type: ignore[misc]
        def _absorb(self, state: Any, *args: Any) -> None:
            absorb(self, state, *args)
            state.tensors["state"].copy_(state.tensors["state"].bfloat16())

    mixer.__class__ = Short
    with torch.no_grad():
        for gain in (1.0, -20.0):  # it is of the state alone, however little a head makes of it
            mixer.gain.fill_(gain)
            assert drift(mixer, query, key, value, step, None) > 1e-4


def test_drift_copies_the_mixer_and_not_the_model_around_it(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a model was copied for the sake of one mixer")

    monkeypatch.setattr(torch.nn.Embedding, "__deepcopy__", refuse, raising=False)
    query, key, value = (torch.randn(1, heads, 2 * PAGE, 8) for heads in (4, 2, 2))
    step = Step.begin(None, None, 1, 2 * PAGE, query.device)
    assert drift(branched(model)[0].mixer, query, key, value, step, None) < 1e-5


def test_bytes_of_states_and_from_where_they_pay(plan: Plan, model: Any, tmp_path: Path) -> None:
    shape, unit = byte_loaded().shape, plan.unit(0, 4, "patched")
    states = states_of(plan, 4)
    assert states is not None and states.groups == 3
    assert states.bytes == 2 * STATE.state_bytes(8) + DELTA.state_bytes(8) == 4 * (2 * 16 * 9 + 8 * 8)
    assert states.pays_from == 192  # two pages of three stay, and a state takes less than the third
    for length in (64, 192, 256, 320, 4096):
        saved = plan.dense_cost(length, 4).held_bytes - plan.cost(length, 4).held_bytes
        assert (saved > 0) == (length >= states.pays_from), (length, saved)
    assert "3 head groups keep a state" in states.words and "from 192 tokens on" in states.words
    assert unit.token_bytes == 64 and states_of(uniform_plan(shape, FullGroup())) is None
    assert pays_from(lambda length: length + 1000, lambda length: length) is None
    assert pays_from(lambda length: 10_000, lambda length: length) == 157 * 64
    assert pays_from(lambda length: 256, lambda length: length) == 320  # as many bytes are no fewer

    def cost(length: int) -> Cost:
        return plan.cost(length, 4)

    dense = Variant("dense", lambda: byte_loaded().model, cost=lambda length: plan.dense_cost(length, 4))
    asked = [measures["density"]()]
    found = compare(
        byte_loaded(), [dense, Variant("plan", lambda: model, cost=cost)], asked, seed=0, cache_dir=tmp_path
    )
    cells = {cell.label: cell.value for cell in found.variants[1].of("state_bytes")[0].cells()}
    assert cells == {"bytes of states": states.bytes, "fewer bytes than dense from": 192}
    assert not found.dense.of("state_bytes")[0].cells() and "192 tokens" in markdown(found)


def test_the_report_and_inspect_tell_of_states_and_branches(
    model: Any, plan: Plan, text: FileText, tmp_path: Path
) -> None:
    measured("branches", model, text, tmp_path / "kept", length=128, windows=1).write(tmp_path / "evaluation.json")
    (tmp_path / "plan.json").write_text(plan.to_json())
    page = render([read_facts(tmp_path)], "2026-01-02", "0")
    states = states_of(plan)
    assert states is not None and f"<p>{states.words}.</p>" in page and "<h3>By layer</h3>" in page
    assert "which branch of the converted heads does the work" in page and "cannot serve heads with a state" in page
    assert next(path.name for path in evaluation_plots(tmp_path)) == "layers.svg"
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "plan.json")])
    assert result.exit_code == 0 and states.words in " ".join(result.output.split())
