"""Recovery of tiny models: it learns, trains what it should, and leaves a plain model of the same form."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from compress.errors import UserError
from compress.models.planned import planned_model
from compress.models.shape import shape_of
from compress.models.trained import load_trained, write_trained
from compress.train.lora import attach, merge, projections
from compress.train.recovery import read_recovered, recover
from compress.train.schedule import Schedule
from compress.train.token_losses import distill_loss, text_loss
from compress.train.windows import Windows
from tests.tiny import mixed_plan, random_ids, tiny_model
from tests.train.common import model_of, pruned_model, settings, text, trained

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(random_ids(2, 20)).logits
    return found


@pytest.mark.parametrize("train", ["lora", "full"])
def test_training_lowers_the_loss(tmp_path: Path, train: str) -> None:
    model, record = trained(tmp_path, train=train)
    assert record.last_loss < record.first_loss - 0.3
    lines = [json.loads(line) for line in (tmp_path / "loss.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert lines[-1]["tokens"] == record.tokens == 6 * 4 * 16
    assert lines[0]["loss"] == lines[0]["text_loss"] == record.first_loss and "distill_loss" not in lines[0]
    assert not model.training and not hasattr(model, "peft_config")
    assert set(weights(model)) == set(weights(pruned_model()))
    assert record == read_recovered(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.jsonl", "model.safetensors", "recover.json"]


def test_the_recorded_loss_is_that_of_the_batch(tmp_path: Path) -> None:
    untouched = pruned_model()
    _, record = trained(tmp_path)
    batch = Windows(text(), 16, 3).batch(0, 4)
    with torch.no_grad():
        expected = untouched(batch, labels=batch).loss
    assert record.first_loss == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("family", "names"),
    [("llama-gqa", LINEAR), ("qwen2", LINEAR), ("phi3", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"})],
)
def test_only_adapters_of_the_layers_take_gradients(family: str, names: set[str]) -> None:
    model = model_of(family)
    found = projections(model)
    assert {name.rpartition(".")[2] for name in found} == names and len(found) == 3 * len(names)
    attach(model, settings())
    loss = text_loss(model(random_ids(1, 9)).logits, random_ids(1, 9))
    loss.backward()
    with_gradient = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert with_gradient == {f"{name}.lora_{side}.default.weight" for name in found for side in "AB"}


def test_all_weights_move_in_full_training(tmp_path: Path) -> None:
    before = weights(pruned_model())
    model, _ = trained(tmp_path, train="full")
    assert not [name for name, weight in weights(model).items() if torch.equal(weight, before[name])]


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2", "phi3"])
def test_merged_computes_what_the_adapters_did(family: str) -> None:
    model = model_of(family)
    plain = logits(model)
    adapted = attach(model, settings())
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    model.eval()
    expected = logits(model)
    assert float((expected - plain).abs().max()) > 1e-2
    merged = merge(adapted)
    assert merged is model and not [name for name, _ in model.named_parameters() if "lora" in name]
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_only_the_merged_projections_change_and_the_dtype_stays(tmp_path: Path) -> None:
    before = pruned_model().bfloat16()
    model, _ = trained(tmp_path, copy.deepcopy(before), rate=0.05)
    changed = {name for name, weight in weights(model).items() if not torch.equal(weight, weights(before)[name])}
    assert changed == {f"{name}.weight" for name in projections(model)}
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_bfloat16_passes_follow_float32_passes(tmp_path: Path) -> None:
    exact = trained(tmp_path / "a")[1]
    low = trained(tmp_path / "b", precision="bfloat16")[1]
    frozen = trained(tmp_path / "c", pruned_model().bfloat16(), precision="bfloat16")[1]
    assert low.last_loss != exact.last_loss
    assert low.last_loss == pytest.approx(exact.last_loss, rel=0.05)
    assert frozen.last_loss == pytest.approx(exact.last_loss, rel=0.05)


def test_distillation_of_an_untouched_model_has_nothing_to_learn() -> None:
    model = model_of()
    ids = random_ids(2, 12)
    loss = distill_loss(model(ids).logits, logits_of(model, ids), 2.0) / ids.numel()
    loss.backward()
    gradients = [float(weight.grad.abs().max()) for weight in model.parameters() if weight.grad is not None]
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-6) and max(gradients) < 1e-6


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


def test_distillation_is_the_divergence_from_the_teacher() -> None:
    torch.manual_seed(0)
    own, other = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    p, q = (other / 2).softmax(-1), (own / 2).softmax(-1)
    expected = 4 * (p * (p.log() - q.log())).sum()
    torch.testing.assert_close(distill_loss(own, other, 2.0), expected)


def test_distillation_lowers_the_divergence_and_both_is_the_weighted_sum(tmp_path: Path) -> None:
    teacher = model_of()
    _, alone = trained(tmp_path / "a", loss="distill", teacher=teacher, train="full", rate=0.003, steps=12)
    assert alone.last_loss < 0.9 * alone.first_loss and alone.teacher is not None
    trained(tmp_path / "b", loss="both", distill_weight=0.25, teacher=teacher)
    line = json.loads((tmp_path / "b" / "loss.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(0.75 * line["text_loss"] + 0.25 * line["distill_loss"])
    with pytest.raises(ValueError, match="needs a teacher"):
        trained(tmp_path / "c", loss="distill")


@pytest.mark.parametrize("micro", [1, 3])
def test_accumulation_changes_no_weight(tmp_path: Path, micro: int) -> None:
    whole, _ = trained(tmp_path / "a", train="full", rate=0.001)
    split, _ = trained(tmp_path / "b", train="full", rate=0.001, micro_batch=micro)
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weights(split)[name], weight, rtol=1e-3, atol=1e-4)


def test_recomputed_layers_change_no_weight(tmp_path: Path) -> None:
    kept, _ = trained(tmp_path / "a", dropout=0.2, checkpointing=False)
    again, _ = trained(tmp_path / "b", dropout=0.2, checkpointing=True)
    for name, weight in weights(kept).items():
        torch.testing.assert_close(weights(again)[name], weight)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_a_plan_is_trained_on_its_own_copy_of_the_weights(tmp_path: Path, train: str) -> None:
    dense = tiny_model("llama-gqa")
    before, answers = weights(dense), logits(dense)
    planned = planned_model(dense, mixed_plan(shape_of(dense)))
    _, record = trained(tmp_path, planned, train=train, rate=0.003, length=40, steps=8)
    assert record.last_loss < record.first_loss
    assert all(torch.equal(weight, before[name]) for name, weight in weights(dense).items())
    again = load_trained(planned_model(dense, mixed_plan(shape_of(dense))), tmp_path)
    assert torch.equal(logits(again), logits(planned))
    assert torch.equal(logits(dense), answers)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_tied_embeddings_stay_tied(tmp_path: Path, train: str) -> None:
    model, _ = trained(tmp_path / "made", model_of(tie_word_embeddings=True), train=train)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    found = load_trained(model_of(tie_word_embeddings=True), tmp_path / "made")
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert torch.equal(logits(found), logits(model))


def test_the_control_sees_the_same_batches(tmp_path: Path) -> None:
    _, compressed = trained(tmp_path / "plan")
    _, control = trained(tmp_path / "control", model_of())
    _, other = trained(tmp_path / "other", model_of(), steps=7)
    assert compressed.batches == control.batches != other.batches
    assert compressed.before != control.before


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"loss": "distill"}, ["text"]),  # of the dense model to itself, which is zero
        ({"objectives": [{"name": "distill"}, {"name": "text", "weight": 0}, {"name": "balance"}]}, ["text"]),
        ({"loss": "both"}, ["text", "distill"]),
        ({"objectives": [{"name": "text"}, {"name": "side", "loss_name": "L"}]}, ["text"]),
        ({"objectives": [{"name": "distill"}, {"name": "text"}, {"name": "balance"}]}, ["distill", "text"]),
    ],
)
def test_the_control_is_trained_on_what_teaches_a_dense_model(given: dict[str, Any], found: list[str]) -> None:
    assert [loss.registered for loss in settings(**given).of_control.losses_of() if loss.weight] == found


@pytest.mark.parametrize("train", ["lora", "full"])
def test_a_model_without_a_distance_to_what_it_follows_is_not_trained_on_rounding(tmp_path: Path, train: str) -> None:
    same = planned_model(model_of(), mixed_plan(shape_of(model_of())))
    with pytest.raises(UserError, match="nothing to learn"):
        trained(tmp_path, same, teacher=model_of(), loss="distill", train=train, length=4)


def test_the_same_call_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    first, second = trained(tmp_path / "a", dropout=0.1)[1], trained(tmp_path / "b", dropout=0.1)[1]
    other = recover(pruned_model(), settings(dropout=0.1), text(), tmp_path / "c", seed=4)
    assert first.sha256 == second.sha256 != other.sha256


def test_training_leaves_the_random_numbers_of_others_alone(tmp_path: Path) -> None:
    model = pruned_model()
    state = torch.get_rng_state()
    trained(tmp_path, model, dropout=0.1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loss_that_is_not_finite_is_told(tmp_path: Path) -> None:
    model = pruned_model()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite") as error:
        trained(tmp_path, model)
    assert error.value.problems[0].where == "step 1"


def test_windows_take_every_window_once_an_epoch() -> None:
    windows = Windows(range(70), 10, 0)
    epochs = torch.cat([windows.batch(step, 3) for step in range(14)])[:, 0].tolist()
    for start in range(0, 42, 7):
        assert sorted(epochs[start : start + 7]) == list(range(0, 70, 10))
    assert epochs[:7] != epochs[7:14]
    assert torch.equal(windows.batch(5, 4), torch.cat([windows.batch(10, 2), windows.batch(11, 2)]))


def test_the_rate_rises_and_falls() -> None:
    factors = [Schedule.cosine(1.0, 20, 0.2)(step) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:] == sorted(factors[4:], reverse=True) and 0 < factors[-1] < 0.02
    assert Schedule.cosine(1.0, 1, 0.03)(0) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"length": 700}, "training text is too short"), ({"length": 2048}, "longer than the model's context")],
)
def test_windows_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        trained(tmp_path, **changes)


def test_weights_of_another_model_are_refused_with_all_reasons(tmp_path: Path) -> None:
    write_trained(pruned_model(), tmp_path)
    with pytest.raises(UserError) as error:
        load_trained(model_of("qwen2"), tmp_path)
    told = str(error.value)
    assert "lack `model.layers.0.self_attn.q_proj.bias`" in told and "`model.layers.2.mlp.up_proj.weight` does" in told
    with pytest.raises(UserError, match=r"`model.norm.weight` does not fit"):
        load_trained(pruned_model().bfloat16(), tmp_path)
    with pytest.raises(UserError, match=r"which the model does not have"):
        load_trained(model_of(tie_word_embeddings=True), tmp_path)
    with pytest.raises(UserError, match="no trained weights"):
        load_trained(model_of(), tmp_path / "nowhere")


def test_a_disk_that_is_full_is_told_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("compress.models.trained.save_file", full)
    with pytest.raises(UserError, match=r"model\.safetensors: the trained weights could not be written\n.*full"):
        write_trained(pruned_model(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_weights_in_several_files_come_back(tmp_path: Path) -> None:
    model = pruned_model()
    one = write_trained(model, tmp_path)
    assert write_trained(model, tmp_path, max_shard_size="20KB") == one
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 and not (tmp_path / "model.safetensors").exists()
    blank = pruned_model()
    for weight in blank.parameters():
        weight.data = torch.zeros_like(weight)
    assert torch.equal(logits(load_trained(blank, tmp_path)), logits(model))
