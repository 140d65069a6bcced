"""A model whose layers lie on several GPUs computes what it does on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import dispatch_model

from compress.models.planned import planned_model
from tests.tiny import mixed_plan, random_ids, shape_of, tiny_model

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def planned() -> Any:
    dense = tiny_model("llama-gqa")
    return planned_model(dense, mixed_plan(shape_of(dense)))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_layers_on_two_devices(impl: str) -> None:
    one, two = planned().cuda(), planned()
    layers = {f"model.layers.{number}": min(number, 1) for number in range(3)}
    two = dispatch_model(two, {"model.embed_tokens": 0, "model.rotary_emb": 0, **layers, "model.norm": 1, "lm_head": 1})
    for model in (one, two):
        model.config.compress_impl = impl
    assert {weight.device.index for weight in two.parameters()} == {0, 1}
    ids, mask = random_ids(2, 150).cuda(), torch.ones(2, 150, dtype=torch.long, device="cuda")
    mask[1, :40] = 0  # padding at the left
    mask[0, 60:70] = 0  # and in the middle, so that tokens are picked together
    arguments: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
    with torch.inference_mode():
        for given in ({}, {"attention_mask": mask}):
            found, expected = two(ids, **given).logits, one(ids, **given).logits
            seen = mask.bool() if given else torch.ones_like(mask, dtype=torch.bool)
            torch.testing.assert_close(found.to(0)[seen], expected[seen], rtol=1e-4, atol=1e-4)
        assert torch.equal(two.generate(ids, **arguments), one.generate(ids, **arguments))
        left = {"attention_mask": mask[1:], **arguments}
        assert torch.equal(two.generate(ids[1:], **left), one.generate(ids[1:], **left))
        static = {"cache_implementation": "static", **arguments}
        assert torch.equal(two.generate(ids, **static), one.generate(ids, **arguments))
        beams = {"num_beams": 2, **arguments}
        assert torch.equal(two.generate(ids, **beams), one.generate(ids, **beams))
