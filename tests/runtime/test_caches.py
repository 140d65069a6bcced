"""Caches that a caller brings and keeps: each class of transformers is filled in place, or refused by its name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers import cache_utils as caches

from compress.models.planned import planned_model
from compress.plan import uniform_plan
from compress.runtime.paged_cache import PagedCache
from compress.targets.full import FullGroup
from tests.tiny import mixed_plan, random_ids, shape_of, tiny_model

PROMPT, STEPS = 100, 6
FAMILIES = ["llama-gqa", "qwen2-part-sliding", "mistral-sliding"]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    dense = tiny_model(request.param)
    return planned_model(dense, mixed_plan(shape_of(dense)))


@pytest.fixture(scope="module")
def llama() -> Any:
    dense = tiny_model("llama-gqa")
    return planned_model(dense, mixed_plan(shape_of(dense)))


@torch.no_grad()
def greedy(model: Any, cache: Any, *, mask: bool, by: str = "past_key_values") -> list[int]:
    """A loop as people write it: their own cache object, passed again at every step and never read back."""
    tokens, said = random_ids(1, PROMPT), []
    for step in range(STEPS):
        masks = {"attention_mask": torch.ones(1, PROMPT + step)} if mask else {}
        said.append(int(model(tokens, **masks, **{by: cache}).logits[0, -1].argmax()))
        tokens = torch.tensor([said[-1:]])
    return said


def wanted(model: Any) -> list[int]:
    made = model.generate(random_ids(1, PROMPT), max_new_tokens=STEPS, do_sample=False, use_cache=False)
    return made[0, PROMPT:].tolist()


FILLED: dict[str, Any] = {
    "dynamic": lambda config: DynamicCache(),
    "dynamic of a configuration": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=PROMPT + STEPS),
    "the model's own": None,
}


@pytest.mark.parametrize("kind", FILLED)
@pytest.mark.parametrize("mask", [False, True])
def test_a_cache_that_the_caller_keeps_is_filled_in_place(model: Any, kind: str, mask: bool) -> None:
    make = FILLED[kind]
    cache = model.new_cache() if make is None else make(model.config)
    held = cache
    assert greedy(model, cache, mask=mask) == wanted(model)
    assert held is cache and cache.get_seq_length() == PROMPT + STEPS - 1 and cache.held_bytes() > 0


@pytest.mark.parametrize("kind", FILLED)
def test_generate_fills_the_cache_that_it_is_given(model: Any, kind: str) -> None:
    make = FILLED[kind]
    cache = model.new_cache() if make is None else make(model.config)
    said = model.generate(random_ids(1, PROMPT), past_key_values=cache, max_new_tokens=STEPS, do_sample=False)
    assert said[0, PROMPT:].tolist() == wanted(model)
    assert cache.get_seq_length() == PROMPT + STEPS - 1


def test_a_static_cache_becomes_one_that_is_reserved(llama: Any) -> None:
    cache = StaticCache(config=llama.config, max_cache_len=40)
    cache.early_initialization(1, 2, 12, torch.float32, torch.device("cpu"))
    llama(random_ids(1, 30), past_key_values=cache)
    assert isinstance(cache, PagedCache) and cache.max_length == 40
    before = copy.deepcopy(cache)
    with pytest.raises(ValueError, match="reserved for 40 tokens, and a sequence comes to 41"):
        llama(random_ids(1, 11), past_key_values=cache)
    again = llama(random_ids(1, 10), past_key_values=cache).logits  # what was refused has left nothing
    assert torch.equal(again, llama(random_ids(1, 10), past_key_values=before).logits)


class Counting(DynamicCache):
    """A cache of a caller's own class, whose `update` would not be called."""


def without_init(kind: Any) -> Any:
    """An object of a class whose packages are not installed here."""
    made = kind.__new__(kind)
    made.layers, made.offloading = [], False
    return made


REFUSED = {
    "an offloaded DynamicCache": lambda config: DynamicCache(config=config, offloading=True),
    "an offloaded StaticCache": lambda config: StaticCache(config=config, max_cache_len=50, offloading=True),
    "a QuantizedCache": lambda config: without_init(caches.QuantizedCache),
    "an EncoderDecoderCache": lambda config: EncoderDecoderCache(DynamicCache(), DynamicCache()),
    "a Counting": lambda config: Counting(),
    "a Cache": lambda config: caches.Cache(layer_class_to_replicate=caches.DynamicLayer),
    "a tuple": lambda config: tuple((torch.zeros(1, 2, 3, 4),) * 2 for _ in range(3)),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("by", ["forward", "generate"])
def test_a_cache_that_cannot_be_filled_is_refused_by_name(llama: Any, name: str, by: str) -> None:
    cache = REFUSED[name](llama.config)
    call = llama if by == "forward" else llama.generate
    with pytest.raises(ValueError, match=rf"cannot fill {name}; leave it out, or pass model.new_cache\(\)"):
        call(random_ids(1, 10), past_key_values=cache)


def test_every_cache_of_transformers_is_taken_or_refused(llama: Any) -> None:
    kinds = [kind for kind in vars(caches).values() if isinstance(kind, type) and issubclass(kind, caches.Cache)]
    assert len(kinds) >= 5
    for kind in kinds:
        cache = without_init(kind)
        taken = kind in (DynamicCache, StaticCache)
        if taken:
            llama(random_ids(1, 10), past_key_values=cache)
            assert cache.get_seq_length() == 10
        else:
            with pytest.raises(ValueError, match=f"cannot fill an? {kind.__name__}"):
                llama(random_ids(1, 10), past_key_values=cache)


def test_a_cache_of_another_plan_or_another_checkpoint_is_refused(llama: Any) -> None:
    dense = tiny_model("llama-gqa")
    other = planned_model(dense, uniform_plan(shape_of(dense), FullGroup()))
    with pytest.raises(ValueError, match="made for another plan"):
        llama(random_ids(1, 10), past_key_values=other.new_cache())
    foreign = type("PagedCache", (caches.Cache,), {"paged": []})
    with pytest.raises(ValueError, match="a PagedCache of another checkpoint"):
        llama(random_ids(1, 10), past_key_values=without_init(foreign))
    cache = copy.deepcopy(llama).new_cache()  # the plan is the same
    assert llama(random_ids(1, 10), past_key_values=cache).past_key_values is cache


def test_the_dense_model_refuses_the_plans_cache() -> None:
    dense = tiny_model("llama-gqa")
    model = planned_model(dense, mixed_plan(shape_of(dense)))
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="runs the model dense; pass a DynamicCache"):
        model(random_ids(1, 10), past_key_values=model.new_cache())
    assert greedy(model, DynamicCache(), mask=True) == wanted(dense)
    model.set_attn_implementation("paged|eager")
    with pytest.raises(ValueError, match="continuous batching has pages of its own"):
        model(random_ids(1, 10))


def test_a_refused_pass_changes_nothing(llama: Any) -> None:
    ids = random_ids(2, 60)
    mask = torch.ones(2, 40)
    mask[0, :7] = 0
    cache = llama.new_cache()
    llama(ids[:, :40], attention_mask=mask, past_key_values=cache)
    later = torch.cat([mask, torch.ones(2, 20)], dim=1)
    holes = later.clone()
    holes[1, 50] = 0
    positions = torch.arange(20)[None].expand(2, -1).clone()
    positions[1, 10:] -= 10
    refused: list[tuple[torch.Tensor, dict[str, Any]]] = [
        (ids[:1, 40:], {"attention_mask": later[:1]}),
        (ids[:, 40:], {"attention_mask": torch.ones(2, 60)}),
        (ids[:, 40:], {"attention_mask": holes, "position_ids": positions}),
        (ids[:, 40:], {"attention_mask": holes, "seq_idx": torch.zeros(2, 20)}),
        (ids[:, 40:], {}),
        (ids[:, 40:], {"attention_mask": holes, "inputs_embeds": torch.zeros(2, 20, 48)}),
    ]
    before = copy.deepcopy(cache)
    for tokens, arguments in refused:
        with pytest.raises(ValueError):
            llama(tokens, past_key_values=cache, **arguments)
    found = llama(ids[:, 40:], attention_mask=later, past_key_values=cache).logits
    assert torch.equal(found, llama(ids[:, 40:], attention_mask=later, past_key_values=before).logits)
    fresh = DynamicCache()
    with pytest.raises(ValueError, match="packed"):
        llama(ids, position_ids=torch.arange(30).repeat(1, 2), past_key_values=fresh)
    assert type(fresh) is DynamicCache
    with pytest.raises(IndexError):  # no such token: an error of the embedding, before any layer
        llama(torch.full((1, 5), 10_000), past_key_values=fresh)
    assert torch.equal(llama(ids, past_key_values=fresh).logits, llama(ids, use_cache=False).logits)


def test_a_pass_that_failed_half_way_is_said(llama: Any) -> None:
    cache = llama.new_cache()

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = llama.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        llama(random_ids(1, 20), past_key_values=cache)
    hook.remove()
    with pytest.raises(ValueError, match="a part of a forward pass that ended in an error"):
        llama(random_ids(1, 20), past_key_values=cache)
    cache.reset()
    llama(random_ids(1, 20), past_key_values=cache)
