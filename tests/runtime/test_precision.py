"""Every mix of weights' and autocast's dtype: forward, backward, generation, and a cache that passes of both fill."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from compress.models.planned import planned_model
from tests.tiny import mixed_plan, model_of_kinds, random_ids, shape_of, tiny_model

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOW = DTYPES[1:]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
# Largest difference of logits from those of float32: of logits up to 3, where hiding nothing makes a difference of 1.3.
NEAR = {torch.bfloat16: 0.15, torch.float16: 0.02}


def soft_model(family: str) -> Any:
    """A model whose attention is less sharp, so that rounding does not decide."""
    dense = tiny_model(family)
    with torch.no_grad():
        for weight in dense.parameters():
            if weight.dim() == 2:
                weight.mul_(0.4)
    return dense


@pytest.fixture(scope="module", params=["llama-gqa", "qwen3", "phi3"])
def planned(request: pytest.FixtureRequest) -> Any:
    dense = soft_model(request.param)
    return planned_model(dense, mixed_plan(shape_of(dense)))


def of(planned: Any, device: str, dtype: torch.dtype) -> Any:
    """A copy on a device, on a GPU with its kernels."""
    model = copy.deepcopy(planned).to(device, dtype)
    model.config.compress_impl = "auto" if device == "cpu" else "triton"
    return model


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("weights", DTYPES, ids=str)
def test_all_of_a_model_runs_under_autocast(planned: Any, weights: torch.dtype, low: torch.dtype, device: str) -> None:
    model, ids = of(planned, device, weights), random_ids(2, 90).to(device)
    check_autocast(model, of(planned, device, torch.float32), low, ids)
    with torch.autocast(device, dtype=low):
        made = model.generate(ids, max_new_tokens=3, do_sample=False)
        assert torch.equal(made, model.generate(ids, max_new_tokens=3, do_sample=False, cache_implementation="static"))


def check_autocast(model: Any, exact: Any, low: torch.dtype, ids: torch.Tensor) -> None:
    """Forward with and without cache and backward of a model under autocast, beside one in float32."""
    device, weights = ids.device.type, model.dtype
    near: dict[str, Any] = {"rtol": 0, "atol": max(NEAR[low], NEAR.get(weights, 0))}
    with torch.no_grad():
        expected = exact(ids).logits
    with torch.autocast(device, dtype=low):
        with torch.no_grad():
            cut = ids.shape[1] - 10
            cached = model(ids[:, :cut])
            cache = cached.past_key_values
            parts = [cached.logits, model(ids[:, cut : cut + 1], past_key_values=cache).logits]
            parts.append(model(ids[:, cut + 1 :], past_key_values=cache).logits)
            torch.testing.assert_close(torch.cat(parts, dim=1).float(), expected, **near)
        assert {layer.dtype for layer in cache.paged} == {low}
        out = model(ids, labels=ids, use_cache=False)
        torch.testing.assert_close(out.logits.float(), expected, **near)
    out.loss.backward()
    exact(ids, labels=ids).loss.backward()
    for weight, known in zip(model.parameters(), exact.parameters(), strict=True):
        slope, right = weight.grad.float(), known.grad
        assert weight.grad.dtype == weights
        assert torch.cosine_similarity(slope.flatten(), right.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("weights", "low"),
    [(torch.bfloat16, None), (torch.float16, None), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)],
    ids=str,
)
def test_every_kind_of_head_runs_in_every_dtype(weights: torch.dtype, low: torch.dtype | None, device: str) -> None:
    """What is chosen or kept may change with rounding, so passes are compared with others of their own dtype."""
    model, ids = of(model_of_kinds(soft_model("llama-gqa")), device, weights), random_ids(2, 140).to(device)
    cache, kind = model.new_cache(), low or weights
    with torch.autocast(device, dtype=kind, enabled=low is not None):
        with torch.no_grad():
            whole = model(ids, use_cache=False).logits
            parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 130), (130, 131), (131, 140))]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=NEAR[kind])
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    assert {layer.dtype for layer in cache.paged} == {kind}
    states = [state.tensors["state"] for layer in cache.paged for state in layer.states if "state" in state.tensors]
    assert states and all(state.dtype == torch.float32 for state in states)
    slopes = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert all(slope.dtype == weights and bool(slope.isfinite().all()) for slope in slopes)
    assert all(bool(weight.grad.any()) for name, weight in model.named_parameters() if "linear" in name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU itself")
def test_kernels_run_under_autocast_in_the_interpreter() -> None:
    """In float16: Triton's interpreter computes nonsense in bfloat16."""
    dense = soft_model("llama-gqa")
    dense.model.layers, dense.config.num_hidden_layers = dense.model.layers[:1], 1
    model = planned_model(dense, mixed_plan(shape_of(dense)))
    exact = copy.deepcopy(model)
    model.config.compress_impl = "triton"
    check_autocast(model, exact, torch.float16, random_ids(1, 20))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("first", [True, False], ids=["prefill under autocast", "decoding under autocast"])
@pytest.mark.parametrize("weights", DTYPES, ids=str)
def test_a_cache_keeps_the_dtype_of_its_first_pass(
    planned: Any, weights: torch.dtype, first: bool, device: str
) -> None:
    model, ids = of(planned, device, weights), random_ids(2, 90).to(device)
    low = torch.float16 if weights == torch.bfloat16 else torch.bfloat16

    def run(tokens: torch.Tensor, autocast: bool, cache: Any) -> torch.Tensor:
        with torch.no_grad(), torch.autocast(device, dtype=low, enabled=autocast):
            return model(tokens, past_key_values=cache).logits

    cache = model.new_cache()
    parts = [run(ids[:, :80], first, cache), run(ids[:, 80:81], not first, cache), run(ids[:, 81:], not first, cache)]
    assert {layer.dtype for layer in cache.paged} == {low if first else weights}
    assert [part.dtype for part in parts] == [low if first else weights, *[weights if first else low] * 2]
    with torch.no_grad():
        expected = of(planned, device, torch.float32)(ids).logits
    found = torch.cat([part.float() for part in parts], dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=NEAR[torch.bfloat16])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["growing", "reserved", "padded"])
def test_gradients_of_one_token_behind_a_cache(planned: Any, device: str, kind: str) -> None:
    """As those of the same token in a pass of several; the cache itself takes none."""
    model = of(planned, device, torch.float32)
    ids = random_ids(1, 30).to(device)
    mask = torch.ones(1, 31, device=device)
    mask[:, :5] = kind != "padded"
    slopes = []
    for several in (False, True):
        cache = model.new_cache(None if kind == "growing" else 40)
        with torch.no_grad():
            model(ids[:, :29], attention_mask=mask[:, :29], past_key_values=cache)
        tokens = torch.cat([ids[:, 29:], ids[:, :1]], dim=1) if several else ids[:, 29:]
        model.zero_grad()
        out = model(tokens, attention_mask=mask[:, : 29 + tokens.shape[1]], past_key_values=cache)
        out.logits[:, 0].logsumexp(-1).sum().backward()
        slopes.append([weight.grad.clone() for weight in model.parameters()])
    for one, more in zip(*slopes, strict=True):
        torch.testing.assert_close(one, more, rtol=1e-4, atol=1e-5)
