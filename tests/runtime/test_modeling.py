"""What a planned model refuses, and that refusing is all it does with it."""

import copy

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.utils import logging

from compress.models.planned import planned_model, set_plan
from compress.plan import uniform_plan
from compress.runtime import modeling_compress
from compress.targets.full import FullGroup
from tests.tiny import mixed_plan, random_ids, shape_of, tiny_model


@pytest.fixture(scope="module")
def dense():
    return tiny_model("llama-gqa")


@pytest.fixture
def model(dense):
    return planned_model(dense, mixed_plan(shape_of(dense)))


def test_weights_are_shared_and_plans_switch_in_place(dense, model):
    assert model.lm_head.weight.data_ptr() == dense.lm_head.weight.data_ptr()
    set_plan(model, uniform_plan(shape_of(dense), FullGroup()))
    ids = random_ids(1, 200)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


def test_masks_that_do_not_fit_are_refused(model):
    ids = random_ids(2, 20)
    with pytest.raises(ValueError, match=r"expected one value for each cached and new column, \(2, 20\), got \(2, 7\)"):
        model(ids, attention_mask=torch.ones(2, 7))
    with pytest.raises(ValueError, match="expected one value"):
        model(ids, attention_mask=torch.ones(2, 1, 20, 20))
    mask = torch.ones(2, 20)
    mask[0, :5] = 0
    cache = model.new_cache()
    model(ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match="a mask over all columns is needed"):
        model(ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="masked differently"):
        model(ids[:, :1], attention_mask=torch.ones(2, 21), past_key_values=cache)


def test_packed_sequences_are_refused(model):
    with pytest.raises(ValueError, match="packed sequences are not supported"):
        model(random_ids(1, 6), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False)


def test_a_cache_of_another_kind_is_refused_once_it_holds_tokens(dense, model):
    ids = random_ids(1, 30)
    assert model(ids, past_key_values=DynamicCache()).past_key_values.allocated_bytes() > 0
    filled = dense(ids).past_key_values
    with pytest.raises(ValueError, match="expected the model's PagedCache, got a DynamicCache"):
        model(ids, past_key_values=filled)


def test_what_a_plan_has_not_is_refused(model):
    ids = random_ids(1, 30)
    with pytest.raises(ValueError, match="brings its own"):
        model.generate(ids, cache_implementation="quantized", max_new_tokens=4)
    with pytest.raises(ValueError, match="no attention weights"):
        model(ids, output_attentions=True)


def test_another_attention_runs_dense_and_says_so(dense, monkeypatch):
    model = planned_model(dense, mixed_plan(shape_of(dense)))
    model.set_attn_implementation("sdpa")
    warned = []
    monkeypatch.setattr(
        logging.get_logger("compress.runtime.modeling_compress"), "warning_once", lambda line: warned.append(line)
    )
    ids = random_ids(1, 200)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    assert "the plan is NOT in effect" in warned[0] and "another model" in warned[0]
    assert torch.equal(
        model.generate(ids, max_new_tokens=5, do_sample=False), dense.generate(ids, max_new_tokens=5, do_sample=False)
    )


@pytest.mark.parametrize(("name", "engine"), [("vllm", "vLLM"), ("sglang", "SGLang")])
def test_a_model_that_an_engine_makes_for_its_own_attention_says_at_once_that_the_plan_is_ignored(
    dense, monkeypatch, name, engine
):
    monkeypatch.setitem(AttentionInterface._global_mapping, name, AttentionInterface._global_mapping["sdpa"])
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, AttentionMaskInterface._global_mapping["sdpa"])
    warned = []
    monkeypatch.setattr(
        logging.get_logger("compress.runtime.modeling_compress"), "warning_once", lambda line: warned.append(line)
    )
    config = copy.deepcopy(planned_model(dense, mixed_plan(shape_of(dense))).config)
    config._attn_implementation = name
    model = modeling_compress.CompressLlamaForCausalLM(config).eval()
    assert len(warned) == 1 and warned[0].startswith(f"{engine} runs this checkpoint with attention of its own")
    assert all(words in warned[0] for words in ("the plan is NOT in effect", "another model", "compress-vllm"))
    model.load_state_dict(dense.state_dict())
    ids = random_ids(1, 200)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    assert len(warned) == 1  # the pass itself has nothing to add


def test_training_passes_gradients_to_every_weight(dense):
    model = planned_model(dense, mixed_plan(shape_of(dense))).train()
    ids = random_ids(2, 100)
    model(ids, labels=ids).loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())


def test_unknown_implementations_are_named(model):
    model.config.compress_impl = "fast"
    with pytest.raises(ValueError, match="expected auto, reference, triton, fla, flash, got 'fast'"):
        model(random_ids(1, 5))
