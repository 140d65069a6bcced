"""Models on several devices: where they are put, what follows them there, and what a pass copies.

Machines without GPUs have one device that computes; `meta` stands for another, whose tensors have no values.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model

from compress.errors import UserError
from compress.models.placement import (
    input_device,
    place_for,
    place_in,
    placement_of,
    put_like,
    spread,
    spread_map,
    takes_graphs,
)
from compress.models.planned import planned_model, runtime_plan, with_runtime_plan
from compress.plan import uniform_plan
from compress.runtime import impl
from compress.runtime.modeling_compress import CACHE
from compress.runtime.step import Step
from compress.targets.linear import LinearGroup
from tests.tiny import mixed_plan, random_ids, shape_of, tiny_model

CPU, META = torch.device("cpu"), torch.device("meta")


def table(*devices: str) -> dict[str, str]:
    """A map with the embedding on the first device, the layers on these, and the rest on the last."""
    layers = {f"model.layers.{number}": device for number, device in enumerate(devices)}
    first, last = {"model.embed_tokens": devices[0], "model.rotary_emb": devices[0]}, devices[-1]
    return {**first, **layers, "model.norm": last, "lm_head": last}


def on_one(*tensors: torch.Tensor) -> None:
    assert len({tensor.device for tensor in tensors}) == 1


def check_devices(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Replace the implementations by one that looks where its arguments lie; the devices of decode steps."""
    decoded: list[torch.device] = []

    def prefill(query: Any, key: Any, value: Any, spans: Any, **options: Any) -> torch.Tensor:
        on_one(query, key, value)
        return torch.zeros_like(query)

    def store(key: Any, value: Any, pages: Any, rows: Any, *others: Any) -> None:
        on_one(key, value, pages.keys, pages.values, pages.table, rows.tensor(key.device))

    def store_one(key: Any, value: Any, pages: Any, lengths: Any, *others: Any) -> None:
        on_one(key, value, pages.keys, pages.values, pages.table, lengths)

    def decode(query: Any, pages: Any, lengths: Any, spans: Any, **options: Any) -> torch.Tensor:
        on_one(query, pages.keys, pages.table, lengths)
        decoded.append(query.device)
        return torch.zeros_like(query)

    looking = replace(impl.IMPLS["reference"], prefill=prefill, store=store, store_one=store_one, decode=decode)
    monkeypatch.setitem(impl.IMPLS, "reference", looking)
    return decoded


def test_a_pass_copies_what_layers_share_once_to_each_further_device(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_model("llama-gqa")
    dense = spread(dense, table("cpu", "meta", "meta"))
    model = planned_model(dense, mixed_plan(shape_of(tiny_model("llama-gqa"))))
    assert placement_of(model).layers == (CPU, META, META) and placement_of(model).devices == (CPU, META)
    assert input_device(model) == CPU and not takes_graphs(model)
    decoded, steps = check_devices(monkeypatch), list[Step]()
    begin = Step.begin

    def noted(*given: Any) -> Step:
        steps.append(begin(*given))
        return steps[-1]

    monkeypatch.setattr(Step, "begin", staticmethod(noted))
    ids, mask = random_ids(2, 150), torch.ones(2, 150, dtype=torch.long)
    mask[1, :40] = mask[0, 60:70] = 0  # at the left, and in the middle, so that tokens are picked together
    with torch.no_grad():
        for given in (None, mask):
            cache = model.new_cache()
            states = model.base_model(ids, attention_mask=given, **{CACHE: cache}).last_hidden_state
            assert states.device == META and [layer.device for layer in cache.paged] == [CPU, META, META]
            longer = None if given is None else torch.cat([given, given.new_ones(2, 1)], 1)
            model.base_model(ids[:, :1], attention_mask=longer, **{CACHE: cache})
            assert cache.lengths is not None and cache.lengths.device == CPU
    assert decoded == [CPU, META, META] * 2
    whole, one, picked, other = steps
    assert not whole.copies and set(one.copies) == {("lengths", META)} == set(other.copies)
    assert set(picked.copies) == {("pick", META)}


def test_nothing_is_copied_on_one_device() -> None:
    model = planned_model(tiny_model("llama-gqa"), mixed_plan(shape_of(tiny_model("llama-gqa"))))
    assert spread_map(model) is None and not hasattr(model, "_hf_hook") and placement_of(model).devices == (CPU,)
    step = Step.begin(model.new_cache(), None, 2, 1, CPU)
    assert step.on("lengths", CPU) is step.lengths and not step.copies


def test_mixers_lie_with_their_layer() -> None:
    """Those that a model is made with, and those of a plan that it is switched to."""
    shape = shape_of(tiny_model("llama-gqa"))
    dense = spread(tiny_model("llama-gqa"), table("cpu", "meta", "meta"))
    plans = [uniform_plan(shape, LinearGroup(map=name)) for name in ("hedgehog", "elu", "taylor")]
    model = with_runtime_plan(dense, runtime_plan(plans[0]))
    for plan in (None, *plans[1:], plans[0]):
        if plan is not None:
            model.set_plan(runtime_plan(plan))
        for kinds, device in zip(model.base_model.compress_kinds, (CPU, META, META), strict=True):
            assert {weight.device for mixer in kinds.mixers for weight in mixer.parameters()} <= {device}
    assert all(next(kinds.only.parameters(), None) is not None for kinds in model.base_model.compress_kinds)


def test_layers_that_are_loaded_when_they_run_give_the_same(tmp_path: Path) -> None:
    """accelerate's hooks carry the weights of offloaded layers, and inputs to where they run."""
    dense = tiny_model("llama-gqa")
    one, other = (planned_model(dense, mixed_plan(shape_of(dense))) for _ in range(2))
    ids = random_ids(1, 90)
    expected = one.generate(ids, max_new_tokens=8, do_sample=False)
    logits = one(ids).logits
    parts = dict.fromkeys(table("cpu", "cpu", "cpu"), "cpu") | {"model.layers.1": "disk", "model.layers.2": "disk"}
    dispatch_model(other, parts, main_device="cpu", offload_dir=tmp_path, skip_keys=other._skip_keys_device_placement)
    assert next(other.model.layers[1].parameters()).is_meta and placement_of(other).devices == (CPU,)
    assert torch.equal(other(ids).logits, logits)
    assert torch.equal(other.generate(ids, max_new_tokens=8, do_sample=False), expected)


def test_a_model_is_spread_where_one_gpu_has_no_room() -> None:
    with torch.device("meta"):
        model = tiny_model("llama-gqa")
    needed = 4 * sum(weight.numel() for weight in model.parameters())

    def place(*free: int, always: bool = False) -> Any:
        return place_in(dict(enumerate(free)), torch.float32, model, "tiny", always=always)

    assert place(2 * needed, 2 * needed) == torch.device("cuda")
    for found in (place(int(1.2 * needed), int(1.2 * needed)), place(9 * needed, 9 * needed, always=True)):
        places = [found[f"model.layers.{number}"] for number in range(3)]
        assert set(found.values()) == {0, 1} and places == sorted(places)
    with pytest.raises(UserError, match="more memory than the GPUs of this machine have together"):
        place(needed // 4, needed // 4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_other_devices_are_taken_as_they_are() -> None:
    assert place_for("cpu", torch.float32, lambda: pytest.fail("the model is not needed"), "tiny") == CPU
    given, made = tiny_model("llama-gqa"), tiny_model("llama-gqa", seed=1)
    assert put_like(given, made) is made and not hasattr(made, "hf_device_map")
