"""Losses of routers: the load of real tokens, whatever the batch; and routers trained before or with a model."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import compress.runtime.mixer_routed  # noqa: F401  (registers the mixer)
from compress.errors import UserError
from compress.models.backward import recomputed
from compress.models.families import attentions_of, layers_of
from compress.models.planned import has_routers, mixers_of, planned_model
from compress.models.prepared import attach, read_prepared
from compress.models.shape import shape_of
from compress.plan import make_plan
from compress.registry import objectives
from compress.runtime.step import Record, Routing
from compress.targets.full import FullGroup
from compress.targets.routed import RoutedGroup
from compress.train import student
from compress.train.fading import faded, left_at
from compress.train.objectives.routing import balance_loss, contributions, router_z_loss
from compress.train.prepare import prepare
from compress.train.recovery import recover
from compress.train.settings import PrepareSettings, RecoverSettings
from tests.tiny import VOCABULARY
from tests.train.common import model_of, settings

GROUPS = 4


def words(count: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(4, VOCABULARY) for _ in range(count)]


def dense_model() -> Any:
    """Four groups of one head each."""
    return model_of(num_key_value_heads=GROUPS)


def routed(dense: Any, active: int = 2, seed: int | None = 0, **fields: Any) -> Any:
    """A model that is routed in all layers, with routers of random weights; None for their first ones."""
    plan = make_plan(shape_of(dense), [RoutedGroup.layer(GROUPS, active, **fields)] * len(layers_of(dense)))
    model = planned_model(dense, plan, untrained=True)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for mixer in mixers_of(model):
                for weight in mixer.parameters():
                    weight.copy_(torch.randn(weight.shape, generator=generator))
    return model


def passed(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Record:
    record = Record()
    model(input_ids=ids, attention_mask=mask, use_cache=False, compress_record=record)
    return record


def losses(record: Record, ids: torch.Tensor, mask: torch.Tensor | None = None) -> list[float]:
    """Balance and z loss a token."""
    inputs: dict[str, Any] = {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask})
    named = [objectives["balance"](), objectives["router_z"]()]
    found = [float(one.loss({"record": record}, None, inputs)) / one.count(inputs) for one in named]
    mean = objectives["balance"](layers="mean").loss({"record": record}, None, inputs)
    assert float(mean) * len(record.routing) == pytest.approx(found[0] * named[0].count(inputs))
    return found


def routing(logits: torch.Tensor, active: int, tokens: Sequence[int]) -> Routing:
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.topk(active).indices, True)
    return Routing(logits, logits.softmax(-1), chosen, ((),) * logits.shape[1], (), tuple(tokens))


def test_the_losses_are_the_published_ones() -> None:
    logits = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = routing(logits, 2, (12,))
    means, shares = logits.softmax(-1).mean(0), found.chosen.double().mean(0)
    released = (means * shares).mean() * 5**2
    torch.testing.assert_close(balance_loss(found, "pass"), 12 * released)
    torch.testing.assert_close(balance_loss(found), 12 * released)
    torch.testing.assert_close(router_z_loss(found), logits.exp().sum(1).log().square().sum())
    split = routing(logits, 2, (8, 4))
    parts = [routing(logits[:8], 2, (8,)), routing(logits[8:], 2, (4,))]
    torch.testing.assert_close(balance_loss(split), sum(map(balance_loss, parts)))
    torch.testing.assert_close(balance_loss(split, "pass"), 12 * released)
    none = routing(logits, 2, (0, 12))
    torch.testing.assert_close(balance_loss(none), 12 * released)
    even = routing(torch.eye(4).repeat(6, 1) + torch.eye(4).roll(1, 0).repeat(6, 1), 2, (24,))
    assert float(balance_loss(even)) / 24 == pytest.approx(2)


@pytest.mark.parametrize("router", ["two_stage", "norm"])
@torch.no_grad()
def test_neither_padding_nor_the_batch_changes_the_losses(router: Any) -> None:
    model = routed(dense_model(), shared=(1,), router=router)
    ids = torch.tensor(words(5 * 12)).view(5, 12)
    whole = losses(passed(model, ids), ids)
    for before, behind in ((7, 0), (0, 5), (3, 4)):
        padded = torch.nn.functional.pad(ids, (before, behind))
        mask = torch.nn.functional.pad(torch.ones_like(ids), (before, behind))
        assert losses(passed(model, padded, mask), padded, mask) == pytest.approx(whole, rel=1e-6)
    alone = [losses(passed(model, row[None]), row[None]) for row in ids]
    assert whole == pytest.approx(torch.tensor(alone).mean(0).tolist(), rel=1e-6)
    # Sequences of different lengths in one batch count by their tokens.
    lengths = (12, 5, 1, 9, 12)
    mask = (torch.arange(12) < torch.tensor(lengths)[:, None]).long()
    ragged = losses(passed(model, ids * mask, mask), ids, mask)
    single = [losses(passed(model, row[None, :n]), row[None, :n]) for row, n in zip(ids, lengths, strict=True)]
    weights = torch.tensor(lengths) / sum(lengths)
    assert ragged == pytest.approx((torch.tensor(single) * weights[:, None]).sum(0).tolist(), rel=1e-6)
    assert max(row[0] for row in single) > 1.02 * min(row[0] for row in single)


def test_two_models_and_two_passes_have_nothing_in_common() -> None:
    dense = dense_model()
    first, second = routed(dense, 2, seed=1), routed(dense, 1, seed=2)
    one, other = (torch.tensor(words(24, seed)).view(2, 12) for seed in (1, 2))
    with torch.no_grad():
        expected = losses(passed(first, one), one), losses(passed(second, other), other)
        records = Record(), Record()
        first(input_ids=one, use_cache=False, compress_record=records[0])
        second(input_ids=other, use_cache=False, compress_record=records[1])
        first(input_ids=other, use_cache=False)  # nobody asked what this one chose
        assert (losses(records[0], one), losses(records[1], other)) == expected
        again = records[0]
        first(input_ids=one, use_cache=False, compress_record=again)
        assert losses(again, one) == expected[0]
    with pytest.raises(ValueError, match="`balance` is a loss of routers, and no layer of the model has one"):
        losses(Record(), one)


def test_layers_that_are_computed_again_count_once() -> None:
    dense = dense_model()
    ids = torch.tensor(words(48)).view(4, 12)
    found: list[dict[str, Any]] = []
    for again in (False, True):
        model = routed(dense, shared=(0,)).train()
        for weight in model.parameters():
            weight.grad = None
        with recomputed(model, ids.numel(), chosen=again):
            record = passed(model, ids)
            loss = torch.stack([balance_loss(each) + router_z_loss(each) for each in record.routing.values()]).sum()
            loss.backward()
        rows = [len(each.probs) for each in record.routing.values()]
        assert rows == [ids.numel()] * 3 and [len(gates) for gates in record.gates.values()] == [1] * 3
        found.append(
            {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        )
    assert found[0].keys() == found[1].keys() and any("router" in name for name in found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def alike(model: Any, noise: float) -> Any:
    """The heads of a layer as good as equal, so that nothing is lost by using one or the other; and tokens that have
    something in common, by which a router can prefer some heads for all of them."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        model.get_input_embeddings().weight += 0.1
        for attention in attentions_of(model):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                weight = getattr(attention, name).weight
                first = weight[:, :12].repeat(1, 4) if name == "o_proj" else weight[:12].repeat(4, 1)
                weight.copy_(first + noise * weight.std() * torch.randn(weight.shape, generator=generator))
    return model


def test_a_balance_loss_spreads_the_load_at_equal_loss(tmp_path: Path) -> None:
    ids = torch.tensor(words(40 * 64)).view(40, 64)
    variation, text = {}, {}
    for balance in (0.0, 0.01):
        model = routed(alike(dense_model(), 0.05), seed=None)
        for mixer in mixers_of(model):
            with torch.no_grad():
                mixer.get_parameter("router.route")[0] = 0.02
                mixer.get_parameter("router.route")[1] = 0.015
        given = {"train": "mixers", "balance": balance, "steps": 60, "length": 32, "batch_size": 4, "rate": 0.004}
        recover(model, settings(**given), ids.flatten().tolist(), tmp_path / f"{balance}", seed=3)
        with torch.no_grad():
            loads = [each.chosen.float().mean(0) for each in passed(model, ids).routing.values()]
        variation[balance] = [float(load.std(correction=0) / load.mean()) for load in loads]
        last = json.loads((tmp_path / f"{balance}" / "loss.jsonl").read_text().splitlines()[-1])
        text[balance] = last["text_loss"]
        assert last["loss"] == pytest.approx(last["text_loss"] + balance * last["balance_loss"])
    assert max(variation[0.01]) < 0.3 < 0.5 < min(variation[0.0])
    assert text[0.01] == pytest.approx(text[0.0], rel=0.005)


@pytest.mark.parametrize("train", ["mixers", "lora", "full"])
def test_routers_alone_with_lora_or_with_all_weights(tmp_path: Path, train: str) -> None:
    model = routed(dense_model())
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    recover(model, settings(train=train, steps=2, rank=2), words(640), tmp_path, seed=3)
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    routers = {name for name in before if name.endswith("router.route")}
    others = {"mixers": set(), "lora": {"q_proj.weight"}, "full": {"q_proj.weight", "norm.weight"}}[train]
    assert routers <= moved and all(any(name.endswith(other) for name in moved) for other in others)
    assert train != "mixers" or moved == routers
    assert train != "lora" or not any("norm" in name for name in moved)


def test_a_training_of_routers_goes_on_where_it_was(tmp_path: Path) -> None:
    dense = dense_model()

    class Stop(Exception):
        pass

    def stop(done: int, *_: Any) -> None:
        if done == 3:
            raise Stop

    options = settings(train="mixers", save_every=2)
    whole, cut = routed(dense), routed(dense)
    recover(whole, options, words(640), tmp_path / "whole", seed=3)
    with pytest.raises(Stop):
        recover(cut, options, words(640), tmp_path / "cut", seed=3, progress=stop)
    cut = routed(dense)
    recover(cut, options, words(640), tmp_path / "cut", seed=3)
    for name, weight in whole.named_parameters():
        assert torch.equal(cut.get_parameter(name), weight)


def test_a_random_router_stays_as_it_is(tmp_path: Path) -> None:
    dense = dense_model()
    model = routed(dense, router="random", seed=None)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if "router" in name}
    recover(model, settings(train="full", steps=2, weight_decay=0.5), words(640), tmp_path / "full", seed=3)
    assert before and all(torch.equal(model.get_parameter(name), weight) for name, weight in before.items())
    with pytest.raises(UserError, match="no parameters of their own to train"):
        recover(routed(dense, router="random"), settings(train="mixers"), words(640), tmp_path / "mixers")
    given = {"targets": [{"target": "routed", "router": "random", "active": 2, "of": 4}], "steps": 1, "length": 16}
    with pytest.raises(ValueError, match="has nothing to train"):
        PrepareSettings.model_validate(given)


def test_what_is_off_fades_in_training_alone(tmp_path: Path) -> None:
    """At first the model is the dense one, at the end of `fade` the routed one; and so it is without gradients."""
    dense = dense_model()
    model, ids = routed(dense, router="norm"), torch.tensor(words(40)).view(2, 20)
    plain = model(ids).logits
    with faded(model, 1.0):
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, plain)
    with faded(model, 0.5):
        between = model(ids).logits
    assert min((between - other).abs().max() for other in (plain, dense(ids).logits)) > 0.01
    assert torch.equal(model(ids).logits, plain)
    asked = settings(train="full", steps=4, length=16, batch_size=2, rate=1e-4, fade=0.5)
    assert [left_at(asked, step) for step in range(4)] == [1.0, 0.5, 0.0, 0.0]
    for name, each in (("routed", model), ("dense", dense)):
        recover(each, asked, words(300), tmp_path / name)
    steps = [json.loads(line) for line in (tmp_path / "routed" / "loss.jsonl").read_text().splitlines()]
    control = json.loads((tmp_path / "dense" / "loss.jsonl").read_text().splitlines()[0])
    assert steps[0]["text_loss"] == pytest.approx(control["loss"], rel=1e-5)
    assert all(mixer.left == 0 for mixer in mixers_of(model))


def test_logits_in_parts_train_routers_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, teacher = dense_model(), dense_model()

    def trained(name: str) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        model = routed(dense, shared=(3,))
        given = {"loss": "both", "train": "full", "rate": 0.003, "steps": 3, "balance": 0.5, "router_z": 0.1}
        recover(model, settings(**given), words(640), tmp_path / name, teacher=teacher, seed=3)
        lines = (tmp_path / name / "loss.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], dict(model.named_parameters())

    whole, weights = trained("whole")
    calls: list[int] = []
    split = student.Student._run_in_parts

    def noted(self: Any, *args: Any) -> None:
        calls.append(len(args[-1]))
        split(self, *args)

    monkeypatch.setattr(student, "LOGITS_BYTES", 4 * 16 * VOCABULARY * 3)  # three of four sequences
    monkeypatch.setattr(student.Student, "_run_in_parts", noted)
    parts, others = trained("parts")
    assert calls == [2, 2, 2]
    assert whole[0].keys() >= {"balance_loss", "router_z_loss", "text_loss", "distill_loss"}
    for one, other in zip(whole, parts, strict=True):
        assert {name: one[name] for name in one.keys() - {"seconds"}} == pytest.approx(
            {name: other[name] for name in one.keys() - {"seconds"}}, rel=1e-5
        )
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-3, atol=1e-5)


def test_models_without_routers_go_without_their_losses(tmp_path: Path) -> None:
    dense = dense_model()
    named = settings(objectives=[{"name": "text"}, {"name": "balance", "weight": 0.5, "over": "pass"}], router_z=0.1)
    assert [each.registered for each in named.losses_of(routed=False)] == ["text"]
    with_routers = [(each.registered, each.weight) for each in named.losses_of(routed=True)]
    assert with_routers == [("text", 1.0), ("balance", 0.5), ("router_z", 0.1)]
    assert has_routers(routed(dense)) and not has_routers(dense)
    windows = planned_model(dense, make_plan(shape_of(dense), [[FullGroup()] * GROUPS] * 3))
    assert not has_routers(windows)
    alone = settings(objectives=[{"name": "balance"}])
    with pytest.raises(UserError, match="nothing is minimised"):
        recover(dense, alone, words(640), tmp_path)
    assert settings().facts() == settings(balance=0.01, router_z=0.0).facts()
    assert "balance" in settings(balance=0.0).facts() and "balance" in RecoverSettings.model_fields


def test_contributions_are_norms_behind_the_output_projection() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, weight = (torch.randn(*sizes, generator=generator, dtype=torch.float64) for sizes in ((7, 4, 6), (10, 24)))
    found = contributions(outputs, weight, ((2,), (0, 3)))
    for place, heads in enumerate(((2,), (0, 3))):
        alone = torch.zeros_like(outputs)
        alone[:, list(heads)] = outputs[:, list(heads)]
        torch.testing.assert_close(found[:, place], (alone.flatten(1) @ weight.T).norm(dim=1))


def uneven_model() -> Any:
    """Two groups of two heads, of which one adds most; tokens have something in common, so a router can say so."""
    dense = model_of(num_key_value_heads=2)
    with torch.no_grad():
        dense.get_input_embeddings().weight += 0.1
        for attention in attentions_of(dense):
            attention.o_proj.weight[:, 2 * 12 : 3 * 12].mul_(4)
    return dense


def test_a_preparation_can_spread_the_load(tmp_path: Path) -> None:
    dense, ids = uneven_model(), torch.tensor(words(256, 1)).view(8, 32)
    given = {"targets": [{"target": "routed", "active": 1, "of": 2}], "length": 32, "batch_size": 2, "steps": 40}
    forms: dict[str, list[dict[str, Any]]] = {
        "shares": [{"name": "routing"}],
        "balanced": [{"name": "routing"}, {"name": "balance", "weight": 4.0}],
        "relative": [{"name": "routing", "relative": True}],
    }
    loads, probs = {}, {}
    for name, objectives_named in forms.items():
        options = PrepareSettings.model_validate(given | {"objectives": objectives_named, "warmup": 0.0})
        prepare(dense, shape_of(dense), options, words(1280), tmp_path / name, seed=1)
        attach(dense, read_prepared(tmp_path / name))
        plan = make_plan(shape_of(dense), [RoutedGroup.layer(2, 1)] * 3)
        with torch.no_grad():
            found = passed(planned_model(dense, plan), ids).routing.values()
        loads[name] = [float(each.chosen[:, 1].float().mean()) for each in found]
        probs[name] = [float(each.probs[:, 1].mean()) for each in found]
    assert min(loads["shares"]) > 0.95 and min(probs["shares"]) > 0.65
    assert probs["balanced"] == pytest.approx([0.5] * 3, abs=0.05)
    assert probs["relative"] == pytest.approx([0.5] * 3, abs=0.05)
    assert all(0.1 < load < 0.9 for load in loads["relative"])


@pytest.mark.parametrize("unit", ["group", "head"])
def test_a_prepared_router_has_the_units_shares(tmp_path: Path, unit: Any) -> None:
    dense = uneven_model()
    of, large = {"group": (2, 1), "head": (4, 2)}[unit]
    given = {"targets": [{"target": "routed", "unit": unit, "active": 1, "of": of}], "length": 32, "batch_size": 4}
    options = PrepareSettings.model_validate(given | {"steps": 40, "rate": 0.01, "warmup": 0.0})
    (record,) = prepare(dense, shape_of(dense), options, words(1280), tmp_path, seed=1).values()
    assert record.objective["name"] == "routing" and record.last_loss < record.first_loss - 0.1
    attach(dense, read_prepared(tmp_path))

    def planned(untrained: bool = False, **fields: Any) -> Any:
        entries = RoutedGroup.layer(2, group_size=2, unit=unit, **fields)
        return planned_model(dense, make_plan(shape_of(dense), [entries] * 3), untrained=untrained)

    ids, kept = torch.tensor(words(256, 1)).view(8, 32), []
    attention = attentions_of(dense)[0]
    hook = attention.o_proj.register_forward_pre_hook(lambda _, given: kept.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        dense(ids)
        hook.remove()
        found, first = (passed(planned(untrained, active=1), ids).routing[0] for untrained in (False, True))
        sizes = contributions(kept[0].unflatten(1, (4, 12)), attention.o_proj.weight, found.units)
    assert bool(first.chosen[:, 0].all()) and float(found.chosen[:, large].float().mean()) > 0.95
    wanted = (sizes / sizes.sum(1, keepdim=True)).mean(0)
    torch.testing.assert_close(found.probs.mean(0), wanted, atol=0.03, rtol=0)
    # The tensors serve other plans: other numbers of units that are chosen, and shared ones beside them.
    for fields in ({"active": of}, {"active": 1, "shared": (0,)}):
        for number, mixer in enumerate(mixers_of(planned(**fields))):
            tensor = read_prepared(tmp_path)[0].tensors[f"{number}.router.route"]
            assert torch.equal(mixer.get_parameter("router.route"), tensor) and bool(tensor.any())
