"""The prefix scan of a fixed query against softmax over every prefix, in any chunks, and its memory and drift."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.models.planned import planned_model
from compress.plan import make_plan, uniform_plan
from compress.profile.heads.query_constancy import QueryConstancy
from compress.profile.key import Key
from compress.profile.run import run_profile
from compress.runtime.attention import plan_attention
from compress.runtime.mixer import Kinds, LayerFacts
from compress.runtime.mixer_aaren import AarenMixer
from compress.runtime.paged_cache import PagedCache
from compress.runtime.step import Step
from compress.targets.aaren import AarenGroup
from tests.profile.common import documents
from tests.tiny import random_ids, shape_of, tiny_loaded, tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GROUPS, SHARE, DIM, LENGTH = 2, 3, 16, 150


def layer(scale: float = 2.0) -> Kinds:
    """Two groups of three query heads, with queries that are not zero."""
    kinds = Kinds([AarenGroup().model_dump()] * GROUPS, LayerFacts(0, DIM, DIM, SHARE, None))
    mixer: Any = kinds.mixers[0].to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        mixer.query.copy_(torch.randn(mixer.query.shape, generator=generator) * scale)
    return kinds


def keys_values(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries that may be anything, keys and values."""
    generator = torch.Generator().manual_seed(length)
    key, value = (torch.randn(batch, GROUPS, length, DIM, generator=generator).to(DEVICE) for _ in range(2))
    return key.new_full((batch, GROUPS * SHARE, length, DIM), math.nan), key, value


def naive(kinds: Kinds, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`[B, H, T, D]`: softmax over all prefixes, in float64."""
    mixer: Any = kinds.mixers[0]
    query = mixer.query.double().flatten(0, 1)
    key, value = (tensor.double().repeat_interleave(SHARE, dim=1) for tensor in (key, value))
    scores = torch.einsum("hd,bhtd->bht", query, key) / DIM**0.5
    length = key.shape[2]
    hidden = torch.ones(length, length, dtype=torch.bool, device=key.device).triu(1)
    return scores[:, :, None].expand(-1, -1, length, -1).masked_fill(hidden, -math.inf).softmax(-1) @ value


def run(kinds: Kinds, qkv: Any, cuts: Any = (), mask: torch.Tensor | None = None) -> tuple[torch.Tensor, PagedCache]:
    cache, outs = PagedCache([kinds]), []
    module: Any = SimpleNamespace(compress_kinds=kinds, layer_idx=0)
    with torch.no_grad():
        for start, stop in pairwise((0, *cuts, qkv[1].shape[2])):
            query, key, value = (tensor[:, :, start:stop] for tensor in qkv)
            valid = None if mask is None or bool(mask[:, start:stop].all()) else mask[:, start:stop]
            step = Step.begin(cache, valid, len(query), stop - start, query.device)
            cache.update(key, value, 0)
            outs.append(plan_attention(module, query, key, value, None, compress_step=step)[0].transpose(1, 2))
            step.end()
    return torch.cat(outs, dim=2), cache


@pytest.mark.parametrize("scale", [2.0, 60.0])
@pytest.mark.parametrize("cuts", [(), (1, 64, 129), (90, *range(LENGTH - 5, LENGTH))])
def test_every_way_to_the_end_is_the_softmax_over_prefixes(cuts: Any, scale: float) -> None:
    kinds, qkv = layer(scale), keys_values(2, LENGTH)
    torch.testing.assert_close(run(kinds, qkv, cuts)[0], naive(kinds, *qkv[1:]).float(), rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing() -> None:
    kinds, qkv = layer(), keys_values(3, LENGTH)
    mask = torch.ones(3, LENGTH, dtype=torch.bool, device=DEVICE)
    mask[0, :70] = mask[1, 101:] = mask[2, 1::3] = False
    poisoned = [tensor.masked_fill(~mask[:, None, :, None], math.nan) for tensor in qkv]
    out, _ = run(kinds, poisoned, (66, LENGTH - 1), mask)
    for row in range(3):
        alone = naive(kinds, *(tensor[row : row + 1, :, mask[row]] for tensor in qkv[1:])).float()
        torch.testing.assert_close(out[row : row + 1, :, mask[row]], alone, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_softmax() -> None:
    kinds, (query, *rest) = layer(), keys_values(1, 133)
    mixer: Any = kinds.mixers[0]
    leaves = [tensor.requires_grad_() for tensor in rest] + [mixer.query]
    step = Step.begin(None, None, 1, 133, query.device)
    out = mixer.prefill(query, leaves[0], leaves[1], None, step, scale=None, dropout=0.0).transpose(1, 2)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    expected = torch.autograd.grad((naive(kinds, leaves[0], leaves[1]) * weight).sum(), leaves)
    for found, known in zip(torch.autograd.grad((out * weight).sum(), leaves), expected, strict=True):
        torch.testing.assert_close(found, known, rtol=1e-4, atol=1e-5)


def test_a_long_sequence_takes_no_more_memory_and_does_not_drift() -> None:
    kinds, qkv = layer(), keys_values(1, 9000)
    out, cache = run(kinds, qkv, range(8000, 9000, 1))
    assert cache.allocated_bytes() == cache.held_bytes() == 4 * GROUPS * SHARE * (DIM + 2)
    mixer: Any = kinds.mixers[0]
    scores = torch.einsum("gnd,bgtd->bgnt", mixer.query.double(), qkv[1].double()) / DIM**0.5
    last = torch.einsum("bgnt,bgtd->bgnd", scores.softmax(-1), qkv[2].double()).flatten(1, 2)
    torch.testing.assert_close(out[:, :, -1], last.float(), rtol=1e-5, atol=1e-6)


def test_a_head_whose_query_is_constant_is_converted_exactly(tmp_path: Path) -> None:
    loaded = tiny_loaded("gpt2")  # without RoPE, which would turn its queries
    shape = shape_of(loaded.model)
    with torch.no_grad():
        for block in loaded.model.transformer.h:
            block.attn.c_attn.weight[:, :48].zero_()
            block.attn.c_attn.bias[:48].normal_(std=3)
    profile = run_profile(loaded, documents(), [QueryConstancy()], tmp_path, seed=0)
    torch.testing.assert_close(profile.tensor(Key("query_constancy", length=70)), torch.ones(3, 4))
    means = profile.tensor(Key("query_constancy", "mean", 70))
    plan = make_plan(shape, [[AarenGroup.of(query) for query in layer] for layer in means])
    ids = random_ids(2, 140)
    with torch.no_grad():
        found = planned_model(loaded.model, plan)(ids).logits
        torch.testing.assert_close(found, loaded.model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_plan_may_name_the_queries() -> None:
    dense = tiny_model("llama-gqa")
    shape = shape_of(dense)
    rows = tuple(tuple(0.1 * (row + number) for number in range(12)) for row in range(2))
    mixer = planned_model(dense, uniform_plan(shape, AarenGroup(query=rows))).model.layers[1].self_attn.mixers["aaren"]
    assert isinstance(mixer, AarenMixer) and torch.equal(mixer.query[1], torch.tensor(rows))
    mean = planned_model(dense, uniform_plan(shape, AarenGroup()))
    with torch.no_grad():
        assert bool(torch.isfinite(mean(random_ids(1, 70)).logits).all())
    with pytest.raises(ValueError, match=r"expected `query` of \(2, 12\) numbers"):
        planned_model(dense, uniform_plan(shape, AarenGroup(query=rows[:1])))
