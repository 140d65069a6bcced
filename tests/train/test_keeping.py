"""Training what heads keep: less is lost at an equal share, the share holds, and what is exported is the rule."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError

from compress.cli.recipe import opened
from compress.errors import UserError
from compress.models.backward import recomputed
from compress.models.planned import keeps_tokens, planned_model
from compress.models.prepared import attach
from compress.models.shape import shape_of
from compress.models.trained import load_trained
from compress.plan import make_plan, measured_plan, read_plan, uniform_plan
from compress.runfolder import TRAINED_PLAN
from compress.runtime.step import Record
from compress.stages.evaluate import _variants
from compress.stages.recover import recover_stage, trained_plan
from compress.targets.full import FullGroup
from compress.targets.retain import RetainGroup
from compress.train import student
from compress.train.keeping import check_decisions, decided, decisions_at, keepers_of, measure_again
from compress.train.objectives.kept import Kept, share_that_leaves
from compress.train.recovery import recover
from compress.train.token_losses import distill_loss
from tests.cli.recipes import make_recipe
from tests.tiny import SIZES, VOCABULARY, attach_as_they_start, random_ids
from tests.train.common import settings

LENGTH, SHARE = 192, 0.125
GROUP = RetainGroup(sink=0, alpha=1, scorer="ridge", threshold=0.0, share=SHARE)
SCORERS_ONLY: dict[str, Any] = {"train": "mixers", "loss": "distill", "length": LENGTH, "batch_size": 2}


def dense_model() -> Any:
    """Every head looks at tokens of one kind wherever they are: twelve words have a number of their own in their
    embedding, which keys have in a direction that RoPE hardly turns, and all queries look that way."""
    torch.manual_seed(0)
    sizes = SIZES | {"initializer_range": 0.1, "num_hidden_layers": 2}
    model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config(**sizes)).float().eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = -0.1
        model.get_input_embeddings().weight[4:16, 0] = 1.5
        for layer in model.model.layers:
            attention = layer.self_attn
            for row in range(5, 48, 12):
                attention.q_proj.weight[row], attention.q_proj.bias[row] = 0, 4
            for row in range(5, 24, 12):
                attention.k_proj.weight[row] = 0
                attention.k_proj.weight[row, 0] = 1
    return model


def untrained(dense: Any, group: RetainGroup = GROUP) -> Any:
    """The plan with scorers that know nothing."""
    model = planned_model(dense, uniform_plan(shape_of(dense), group), untrained=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for mixer in keepers_of(model):
            for weight in mixer.parameters():
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


def words(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(4, VOCABULARY), k=count)


def documents() -> list[torch.Tensor]:
    """Texts that nothing is trained on."""
    return [torch.tensor(words(LENGTH, seed)) for seed in range(1, 5)]


@torch.no_grad()
def lost(model: Any, dense: Any) -> float:
    """KL(dense || model) of the documents, nats a token."""
    ids = torch.stack(documents())
    return float(distill_loss(model(ids, use_cache=False).logits, dense(ids).logits, 1.0)) / ids.numel()


def mean_share(kept: Any) -> float:
    shares = [one.share for row in kept for one in row]
    return sum(shares) / len(shares)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any, Any, Path]:
    """The dense model, the plan's before and after training of the scorers alone, the record, and the folder."""
    folder = tmp_path_factory.mktemp("keeping")
    dense = dense_model()
    before = untrained(dense)
    measure_again(before, documents(), "plan", None)
    model = copy.deepcopy(before)
    given = settings(**SCORERS_ONLY, steps=20, rate=0.02, keep_documents=8)
    record = recover(model, given, words(LENGTH * 60), folder, teacher=dense, seed=3)
    return dense, before, model, record, folder


def test_training_loses_less_at_an_equal_share(case: tuple[Any, ...]) -> None:
    dense, before, model, record, _ = case
    found = measure_again(copy.deepcopy(before), documents(), "plan", None)
    assert mean_share(found) == pytest.approx(SHARE, abs=0.005)
    assert mean_share(record.kept) == pytest.approx(SHARE, abs=0.005)
    again = copy.deepcopy(model)  # at just the share of the untrained ones on the very documents
    assert mean_share(measure_again(again, documents(), "plan", None)) <= mean_share(found) + 0.002
    assert max(lost(model, dense), lost(again, dense)) < 0.6 * lost(before, dense)


def test_the_share_holds_while_it_is_trained(case: tuple[Any, ...]) -> None:
    lines = [json.loads(line) for line in (case[4] / "loss.jsonl").read_text().splitlines()]
    assert max(line["kept_loss"] for line in lines) < 0.4 and sum(line["kept_loss"] for line in lines) / 20 < 0.1
    for line in lines:
        assert line["loss"] == pytest.approx(line["distill_loss"] + 0.3 * line["kept_loss"], abs=1e-5)


def test_the_plan_has_what_was_measured_and_the_model_is_its_rule(case: tuple[Any, ...]) -> None:
    dense, before, model, record, folder = case
    plan = uniform_plan(shape_of(dense), GROUP)
    found = measured_plan(plan, record.kept)
    assert [[group.model_dump() for group in layer.groups] for layer in found.layers] == [
        [GROUP.model_dump() | one.model_dump() for one in row] for row in record.kept
    ]
    shifts = [
        after.threshold - entry["threshold"]
        for mixer, row in zip(keepers_of(before), record.kept, strict=True)
        for after, entry in zip(row, mixer.groups, strict=True)
    ]
    assert max(shifts) - min(shifts) < 1e-6 and all(one.spread > 0 for row in record.kept for one in row)
    ids = random_ids(2, 300)
    with torch.no_grad():
        attach_as_they_start(dense, [GROUP])
        exported = load_trained(planned_model(dense, found), folder)
        attach(dense, ())
        assert torch.equal(exported(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
        cached = model(ids[:, :170], use_cache=True)
        rest = model(ids[:, 170:], past_key_values=cached.past_key_values).logits
    torch.testing.assert_close(rest, model(ids, use_cache=False).logits[:, 170:].detach(), rtol=1e-3, atol=1e-4)


def test_scorers_learn_beside_other_weights_by_parts_and_with_layers_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, made = dense_model(), []
    start = {name: weight.detach().clone() for name, weight in untrained(dense).named_parameters()}
    for again in (False, True):
        if again:
            monkeypatch.setattr(student, "LOGITS_BYTES", 4 * LENGTH * VOCABULARY)  # one of two sequences
        model, folder = untrained(dense), tmp_path / str(again)
        given = SCORERS_ONLY | {"train": "full", "steps": 2, "keep_hard": 0.5, "keep_documents": 2}
        record = recover(
            model, settings(**given, checkpointing=again), words(LENGTH * 4), folder, teacher=dense, seed=3
        )
        made.append((record, dict(model.named_parameters())))
    assert made[0][0].last_loss == pytest.approx(made[1][0].last_loss, rel=1e-4)
    for name, weight in made[0][1].items():
        torch.testing.assert_close(made[1][1][name], weight, rtol=1e-3, atol=1e-5)
    moved = {name for name, weight in made[0][1].items() if not torch.equal(weight, start[name])}
    assert {name for name in start if "scorer" in name} <= moved and any("q_proj" in name for name in moved)


def test_scorers_learn_beside_adapters_or_are_left_alone(tmp_path: Path) -> None:
    dense = dense_model()
    for rate, moves in ((None, True), (0, False)):
        model = untrained(dense)
        start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        given = SCORERS_ONLY | {"train": "lora", "mixer_rate": rate, "steps": 1, "keep_documents": 2, "batch_size": 1}
        recover(model, settings(**given), words(LENGTH * 4), tmp_path / str(rate), teacher=dense, seed=3)
        moved = {name for name, weight in start.items() if not torch.equal(model.get_parameter(name), weight)}
        assert any("scorer" in name for name in moved) == moves and any("q_proj" in name for name in moved)


def test_neither_padding_nor_the_batch_changes_what_counts() -> None:
    model, ids = untrained(dense_model()), torch.stack(documents())[:, :170]

    def loss(ids: torch.Tensor, mask: torch.Tensor | None = None) -> float:
        record = Record()
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, use_cache=False, compress_record=record)
        inputs = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
        return float(Kept().loss({"record": record}, None, inputs))

    whole = loss(ids)
    assert whole > 0
    for before, behind in ((7, 0), (3, 70)):
        padded = torch.nn.functional.pad(ids, (before, behind))
        mask = torch.nn.functional.pad(torch.ones_like(ids), (before, behind))
        assert loss(padded, mask) == pytest.approx(whole, rel=1e-5)


def test_layers_computed_again_decide_once() -> None:
    dense = dense_model()
    ids, made = torch.stack(documents())[:2, :170], []
    for again in (False, True):
        model = untrained(dense).train()
        model.requires_grad_(True)
        record = Record()
        with recomputed(model, ids.numel(), chosen=again), decided(model, decisions_at(settings(**SCORERS_ONLY), 0)):
            torch.manual_seed(5)
            logits = model(input_ids=ids, use_cache=False, compress_record=record).logits
            (logits.square().mean() + Kept().loss({"record": record}, None, {"input_ids": ids})).backward()
        assert [len(each) for each in record.keeping.values()] == [1, 1]
        made.append([weight.grad for mixer in keepers_of(model) for weight in mixer.parameters()])
    for one, other in zip(*made, strict=True):
        torch.testing.assert_close(one, other)
    assert all(bool(gradient.abs().sum() > 0) for gradient in made[0])


def test_the_temperature_falls_and_then_the_rule_decides() -> None:
    given = settings(**SCORERS_ONLY | {"steps": 10, "keep_temperature": [1.0, 0.01], "keep_hard": 0.3})
    found = [decisions_at(given, step) for step in range(10)]
    assert given.decisions == "tokens kept softly in 7 steps, temperature 1 to 0.01, then by the rule"
    assert settings(mixer_rate=0).decisions == "tokens kept by the rule"
    assert [one.hard for one in found] == [False] * 7 + [True] * 3
    assert [one.temperature for one in found[:7]] == pytest.approx([10 ** (-step / 3) for step in range(7)])
    assert all(one.temperature == 0.01 for one in found[7:]) and all(one.noise for one in found[:7])
    assert all(decisions_at(settings(**SCORERS_ONLY, mixer_rate=0), step).hard for step in range(6))
    assert not decisions_at(settings(**SCORERS_ONLY, keep_hard=0), 5).hard
    with pytest.raises(ValidationError, match="expected `keep_temperature` to fall, got 0\\.1 first"):
        settings(keep_temperature=[0.1, 0.5])


def test_bytes_of_the_plan_or_the_share_of_every_group() -> None:
    model = untrained(dense_model())
    found = measure_again(model, documents(), "group", None)
    assert all(one.share == pytest.approx(SHARE, abs=0.02) for row in found for one in row)
    for by in ("plan", "group"):  # of texts that leave no window nothing is to be held
        assert measure_again(model, documents()[:1], by, 64)[0][0].threshold == found[0][0].threshold
    windows = GROUP.model_copy(update={"alpha": 64, "beta": 0.25}).span()
    assert share_that_leaves(windows, None) == 0.75 and share_that_leaves(windows, 64) == 0
    assert share_that_leaves(windows, 1024) == (961 - (64 + 961 // 4)) // 64 * 64 / 1024


@pytest.mark.parametrize("at", [None, 448])
def test_bytes_count_by_what_leaves_the_windows(at: int | None) -> None:
    """Half of what one group of a layer keeps lies in its window, which grows; the other one keeps an eighth."""
    dense, wide = dense_model(), GROUP.model_copy(update={"beta": 0.5, "share": 0.5})
    groups = [[GROUP, wide]] * 2
    model = planned_model(dense, make_plan(shape_of(dense), groups), untrained=True)
    torch.manual_seed(1)
    with torch.no_grad():
        for mixer in keepers_of(model):
            for weight in mixer.parameters():
                torch.nn.init.normal_(weight, std=0.1)
    found = measure_again(model, [torch.tensor(words(320, seed)) for seed in (1, 2)], "plan", at)
    leave = [[share_that_leaves(group.span(), at) for group in row] for row in groups]
    assert leave[0] == [1.0, 0.5] if at is None else 0.4 < leave[0][1] / leave[0][0] < 0.6
    weights = torch.tensor(leave)
    kept, expected = (torch.tensor([[one.share for one in row] for row in rows]) for rows in (found, groups))
    assert float((weights * kept).sum()) == pytest.approx(float((weights * expected).sum()), rel=0.03)


def test_only_models_that_keep_tokens_have_the_loss(tmp_path: Path) -> None:
    dense = dense_model()
    assert keeps_tokens(untrained(dense)) and not keeps_tokens(dense)
    assert not keeps_tokens(planned_model(dense, uniform_plan(shape_of(dense), FullGroup())))
    given = settings(objectives=[{"name": "text"}, {"name": "kept", "weight": 2.0, "by": "group"}])
    assert [one.registered for one in given.losses_of()] == ["text"]
    assert [(one.registered, one.weight) for one in given.losses_of(keeps=True)] == [("text", 1.0), ("kept", 2.0)]
    assert [one.registered for one in settings(kept=0.1).losses_of(keeps=True, routed=True)] == [
        *("text", "balance", "router_z", "kept")
    ]
    assert settings().facts() == settings(kept=0.3, keep_hard=0.25).facts() and "kept" in settings(kept=0.1).facts()
    with pytest.raises(ValueError, match="`kept` is a loss of heads that keep tokens, and no layer of the model has"):
        Kept().loss({"record": Record()}, None, {"input_ids": torch.zeros(1, 2)})
    with pytest.raises(UserError, match="nothing is minimised"):
        alone = settings(**SCORERS_ONLY | {"objectives": [{"name": "kept"}]})
        recover(untrained(dense), alone, words(LENGTH * 4), tmp_path)
    with pytest.raises(UserError, match="never leave the windows") as caught:
        check_decisions(untrained(dense), 64)
    assert caught.value.problems[0].expected == "more than 64 tokens, better several times as many"
    check_decisions(untrained(dense), 65)


def test_a_run_goes_on_with_the_thresholds_that_were_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a scorer without parameters, whose scores move with the keys."""
    recipe = make_recipe(tmp_path, dense_model())
    section = "recover: {length: 192, batch_size: 1, steps: 1, rate: 0.01, loss: distill, keep_documents: 2}\n"
    recipe.write_text(recipe.read_text() + section)
    group = RetainGroup(sink=0, alpha=1, scorer="key_norm", threshold=-1.0, share=0.25)
    with opened(str(recipe)) as session:
        plan = uniform_plan(session.shape, group)
        monkeypatch.setattr("compress.stages.recover.finished_plan", lambda session: plan)
        folder = recover_stage(session)
        assert folder is not None
        found = read_plan(session.run.path / TRAINED_PLAN, session.shape)
        assert found == trained_plan(plan, folder) != plan and trained_plan(plan, None) is plan
        assert mean_share([layer.groups for layer in found.layers]) == pytest.approx(0.25, abs=0.01)
        rows = {row.name: row for row in _variants(session, plan, folder)}
        assert list(rows)[:3] == ["dense", "plan", "plan before recovery"]
        kept = {name: keepers_of(rows[name].build())[0].thresholds for name in list(rows)[1:3]}
        assert kept["plan before recovery"] == (-1.0, -1.0)
        assert kept["plan"] == tuple(target.model_dump()["threshold"] for target in found.layers[0].groups)
        assert rows["plan"].cost is not None and rows["plan"].cost(512) == found.cost(512, 4)
