"""Training loops as people write them: checkpointed layers, labels, accumulation, DDP, compiled, Trainer; then use."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import DataCollatorWithFlattening, DynamicCache, Trainer, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from compress.models.planned import planned_model
from compress.runtime.modeling_compress import CACHE, DROPS_CACHE
from tests.tiny import mixed_plan, random_ids, shape_of, tiny_model

IDS = random_ids(2, 90)


@pytest.fixture
def model() -> Any:
    dense = tiny_model("llama-gqa")
    return planned_model(dense, mixed_plan(shape_of(dense))).train()


def slopes(model: Any) -> list[torch.Tensor]:
    return [weight.grad.clone() for weight in model.parameters()]


def plain(model: Any, ids: torch.Tensor = IDS, **arguments: Any) -> list[torch.Tensor]:
    """Gradients of a copy without cache and checkpointing."""
    other = copy.deepcopy(model)
    other.gradient_checkpointing_disable()
    other.zero_grad()
    other(ids, labels=ids, use_cache=False, **arguments).loss.backward()
    return slopes(other)


def check_use(model: Any) -> None:
    """Generation right after training, in eval mode and, as trainers of policies do it, in training mode."""
    arguments: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    for train in (False, True):
        model.train(train)
        plain = model.generate(IDS[:1, :70], use_cache=False, **arguments)
        if train and DROPS_CACHE and model.is_gradient_checkpointing:
            with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
                model.generate(IDS[:1, :70], **arguments)
        else:
            assert torch.equal(model.generate(IDS[:1, :70], **arguments), plain)


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("use_cache", [None, True, False])
@pytest.mark.parametrize("mask", [False, True], ids=["", "padded"])
def test_checkpointed_layers_give_the_same_gradients(
    model: Any, reentrant: bool, use_cache: bool | None, mask: bool
) -> None:
    masks = {"attention_mask": torch.ones(2, 90)} if mask else {}
    if mask:
        masks["attention_mask"][0, :20] = 0
    expected = plain(model, **masks)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    out = model(IDS, labels=IDS, use_cache=use_cache, **masks)
    out.loss.backward()
    assert out.past_key_values is None
    torch.testing.assert_close(slopes(model), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="gradient checkpointing computes layers again"):
        model(IDS, past_key_values=DynamicCache())
    check_use(model)


@pytest.mark.parametrize("length", [1, 90])
def test_layers_that_others_checkpoint_give_the_same_gradients(model: Any, length: int) -> None:
    """FSDP's activation checkpointing runs a layer again with the cache that transformers' own takes away."""
    ids = IDS[:, :length]
    expected = plain(model, ids) if length > 1 else None
    for layer in model.model.layers:
        layer.forward = lambda *args, forward=layer.forward, **kwargs: checkpoint(
            forward, *args, use_reentrant=False, **kwargs
        )
    out = model(ids, labels=ids)
    before = copy.deepcopy(out.past_key_values)
    out.logits.logsumexp(-1).sum().backward() if expected is None else out.loss.backward()
    if expected is not None:
        torch.testing.assert_close(slopes(model), expected, rtol=1e-4, atol=1e-6)
    assert out.past_key_values.get_seq_length() == length  # the second run has stored nothing
    assert out.past_key_values.held_bytes() == before.held_bytes()
    later = model(ids, past_key_values=out.past_key_values)
    with pytest.raises(RuntimeError, match="train without a cache, or without checkpointing"):
        later.logits.sum().backward()


def test_layers_that_lose_their_cache_say_so(model: Any) -> None:
    layer = model.model.layers[1]
    layer.forward = lambda *args, forward=layer.forward, **kwargs: forward(*args, **kwargs | {CACHE: None})
    with pytest.raises(RuntimeError, match="layer 1 ran without the cache"), torch.no_grad():
        model(IDS)


def test_accumulated_gradients_are_those_of_the_batch(model: Any) -> None:
    expected = plain(model)
    model.gradient_checkpointing_enable()
    for row in range(2):
        (model(IDS[row : row + 1], labels=IDS[row : row + 1]).loss / 2).backward()
    torch.testing.assert_close(slopes(model), expected, rtol=1e-4, atol=1e-6)


@pytest.fixture
def one_process_group() -> Iterator[None]:
    store: Any = vars(dist)["HashStore"]()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_wrapped_for_several_processes(model: Any, checkpointed: bool, one_process_group: None) -> None:
    expected = plain(model)
    if checkpointed:
        model.gradient_checkpointing_enable()
    wrapped = DistributedDataParallel(model, find_unused_parameters=not checkpointed)
    wrapped(input_ids=IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(slopes(model), expected, rtol=1e-4, atol=1e-6)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(wrapped(IDS).logits, model(IDS, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_compiled_training_gives_the_same_gradients(traced: Callable[..., Any]) -> None:
    dense = tiny_model("llama-gqa")
    dense.model.layers, dense.config.num_hidden_layers = dense.model.layers[:1], 1  # tracing takes its time
    model = planned_model(dense, mixed_plan(shape_of(dense))).train()
    expected = plain(model)
    model.gradient_checkpointing_enable()
    compiled = torch.compile(model, backend=traced)
    compiled(IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(slopes(model), expected, rtol=1e-4, atol=1e-6)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS).logits, model(IDS, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    assert not model._can_compile_fullgraph


@pytest.fixture
def accelerate_of_its_own() -> Iterator[None]:
    """accelerate keeps the precision of a process's first trainer for all later ones."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_trainer_in_bfloat16_with_checkpointing_and_evaluation(
    model: Any, tmp_path: Path, accelerate_of_its_own: None
) -> None:
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in random_ids(4, 40)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=True,
        gradient_checkpointing=True,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=1,
        max_steps=2,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = copy.deepcopy(model.state_dict())
    done = trainer.train()
    assert torch.isfinite(torch.tensor(done.training_loss))
    assert any(not torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    found = trainer.evaluate()["eval_loss"]
    model.eval()
    ids = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        assert found == pytest.approx(float(model(ids, labels=ids).loss), rel=0.02)


PACKED = {"position_ids": torch.cat([torch.arange(50), torch.arange(40)])[None]}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "more", [{}, {"attention_mask": torch.ones(1, 90)}, {"use_cache": False}, {"use_cache": True}], ids=str
)
def test_packed_rows_are_refused_in_every_form(model: Any, mode: str, more: dict[str, Any]) -> None:
    getattr(model, mode)()
    with pytest.raises(ValueError, match="packed sequences are not supported; pass one sequence per row"):
        model(IDS[:1], labels=IDS[:1], **PACKED, **more)
    with torch.no_grad():  # a cache that holds tokens already
        cache = model(IDS[:1, :5]).past_key_values
        with pytest.raises(ValueError, match="packed sequences"):
            model(IDS[:1], past_key_values=cache, position_ids=PACKED["position_ids"] + 5)
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True}], ids=str)
def test_what_a_flattening_collator_makes_is_refused(model: Any, options: dict[str, Any]) -> None:
    rows = [{"input_ids": row.tolist()} for row in random_ids(3, 20)]
    batch = DataCollatorWithFlattening(return_tensors="pt", **options)(rows)
    with pytest.raises(ValueError, match="packed sequences are not supported"):
        model(**batch)
    batch.pop("position_ids", None)
    if options:
        with pytest.raises(ValueError, match=r"cu_seq_lens_q|seq_idx"):
            model(**batch)


@pytest.mark.parametrize("positions", ["of the tokens", "of the columns"])
def test_positions_of_padded_rows_are_not_taken_for_packed_ones(model: Any, positions: str) -> None:
    """What trainers on preferences and `generate` pass: padding on both sides and in between, with positions."""
    model.eval()
    mask = torch.ones(2, 90, dtype=torch.long)
    mask[0, :30] = mask[1, 80:] = mask[1, 40:45] = 0
    where = mask.cumsum(-1) - 1
    where = where.masked_fill(mask == 0, 1)
    with torch.no_grad():
        found = model(IDS, attention_mask=mask, position_ids=where).logits
        assert torch.equal(found[mask.bool()], model(IDS, attention_mask=mask).logits[mask.bool()])
        mask[1, 40:45] = 1
        columns = torch.arange(90)[None]  # RoPE sees differences only
        found = model(IDS, attention_mask=mask, position_ids=columns).logits
        expected = model(IDS, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-3, atol=1e-3)


def test_prompt_and_p_tuning_work_and_prefix_tuning_is_refused_by_name(model: Any) -> None:
    for method in (PromptTuningConfig, PromptEncoderConfig):
        prompt: Any = get_peft_model(copy.deepcopy(model), method(task_type="CAUSAL_LM", num_virtual_tokens=4))
        prompt(input_ids=IDS, labels=IDS, attention_mask=torch.ones(2, 90)).loss.backward()
        assert prompt.prompt_encoder.default.embedding.weight.grad.abs().sum() > 0
    prefix = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match=r"a DynamicCache that holds tokens already.*prefix tuning does not"):
        prefix(input_ids=IDS, labels=IDS, attention_mask=torch.ones(2, 90))


def test_layers_are_checkpointed_by_the_flag_that_the_model_asks_for(model: Any) -> None:
    model.gradient_checkpointing_enable()
    assert all(isinstance(layer, GradientCheckpointingLayer) for layer in model.model.layers)
    assert model.model._is_checkpointed()
    with torch.no_grad():
        assert model.model._is_checkpointed() == DROPS_CACHE
    assert not model.eval().model._is_checkpointed()
