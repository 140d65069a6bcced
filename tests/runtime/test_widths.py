"""A pruned model equals the dense one with zeroed outputs under the same windows; plans of other widths are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from compress.models.planned import runtime_plan, with_runtime_plan
from compress.models.shape import shape_of
from compress.plan import make_plan
from compress.runtime.modeling_compress import CACHE
from compress.runtime.widths import Width
from tests.pruned import PRUNED, targets_of, uneven, uneven_plan, unevenly_pruned, with_biases, zero
from tests.tiny import random_ids, tiny_model


@pytest.mark.parametrize("family", PRUNED)
def test_pruned_with_windows_equals_zeroed_with_windows(family: str) -> None:
    dense = with_biases(family).double()
    zero(dense, uneven(dense.config))
    plan = runtime_plan(make_plan(shape_of(dense), targets_of(dense)))
    zeroed, pruned = with_runtime_plan(dense, plan), unevenly_pruned(family, torch.float64)
    ids = random_ids(2, 301)
    with torch.no_grad():
        torch.testing.assert_close(pruned(ids).logits, zeroed(ids).logits, rtol=1e-9, atol=1e-9)
    assert len({kinds.count for kinds in pruned.base_model.compress_kinds}) > 1


@pytest.mark.parametrize("family", PRUNED)
def test_it_holds_the_tensors_of_the_pruned_model_and_trains(family: str) -> None:
    model = unevenly_pruned(family)
    again = with_runtime_plan(model, model.config.compress_plan)
    assert next(again.parameters()) is not next(model.parameters())
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()
    model(random_ids(1, 80)).logits.square().mean().backward()
    assert all(weight.grad is not None and torch.isfinite(weight.grad).all() for weight in model.parameters())


@pytest.mark.parametrize("family", ["llama-gqa", "phi3"])
def test_with_another_attention_it_runs_dense_on_a_stock_cache(family: str) -> None:
    model = unevenly_pruned(family)
    ids = random_ids(1, 40)
    full = {"layers": [{**layer, "groups": [{"target": "full"}] * len(layer["groups"])} for layer in layers_in(model)]}
    model.set_plan(full)
    with torch.inference_mode():
        expected = model(ids).logits
        model.set_attn_implementation("sdpa")
        cache = DynamicCache(config=model.config)
        out = torch.cat([model(part, **{CACHE: cache}).logits for part in (ids[:, :30], ids[:, 30:31])], dim=1)
    torch.testing.assert_close(out, expected[:, :31], rtol=1e-4, atol=1e-4)


def layers_in(model: Any) -> list[dict[str, Any]]:
    """The layers of the plan that a model runs."""
    return model.config.compress_plan["layers"]


def test_another_plan_of_the_same_widths_takes_effect_and_one_of_others_does_not() -> None:
    model = unevenly_pruned("llama-gqa")
    wider = {"layers": [{"groups": [{"target": "full"}] * 2} for _ in range(3)]}
    before = layers_in(model)
    with pytest.raises(ValueError, match=r"layer 0: expected Width\(query_heads=1.*the plan has Width\(query_heads=4"):
        model.set_plan(wider)
    with pytest.raises(ValueError, match=r"argument 2 is (shorter|longer)"):
        model.set_plan({"layers": before[:2]})
    assert layers_in(model) is before


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"groups": []}, "layer 0: key/value heads: expected 1 to 2, the plan has 0"),
        ({"groups": [{"target": "full"}] * 3}, "key/value heads: expected 1 to 2, the plan has 3"),
        ({"groups": [{"target": "full"}], "query_heads": 3}, "query heads: expected 1 to 2, the plan has 3"),
        ({"groups": [{"target": "full"}], "query_heads": 0}, "query heads: expected 1 to 2, the plan has 0"),
        ({"groups": [{"target": "full"}] * 2, "query_heads": 3}, "3 do not divide among 2 key/value heads"),
        ({"groups": [{"target": "full"}], "mlp": {"kept": 65}}, "neurons: expected 1 to 64, the plan has 65"),
        ({"groups": [{"target": "full"}]}, "weights do not fit: model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_a_plan_that_no_layer_can_have_says_so(layer: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_runtime_plan(tiny_model("llama-gqa"), {"layers": [layer] * 3})


def test_a_plan_that_says_no_width_has_that_of_the_configuration() -> None:
    config = tiny_model("llama-gqa").config
    assert Width.of_plan({"groups": [{}, {}]}, config) == Width.of(config)
    assert Width.of_plan({"groups": [{}], "mlp": None}, config) == Width(2, 1, 64)
    model = tiny_model("llama-gqa")
    found = [Width.of_plan(layer, config) for layer in runtime_plan(uneven_plan(model))["layers"]]
    assert found == [Width(1, 1, 32), Width(4, 2, 64), Width(2, 2, 63)]
