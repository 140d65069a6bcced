"""Score functions against the naive formulas in float64: one pass, chunks, decoding, padding, gradients, numerics."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import compress.runtime.mixer_score  # noqa: F401  (registers the mixer)
from compress.models.outputs import Alternatives, facts_of
from compress.models.planned import planned_model
from compress.plan import uniform_plan
from compress.runtime.attention import plan_attention
from compress.runtime.families import FAMILIES
from compress.runtime.mixer import Kinds, LayerFacts
from compress.runtime.paged_cache import PagedCache
from compress.runtime.score_functions import ScoreFunction
from compress.runtime.step import Step
from compress.targets.full import FullGroup
from compress.targets.score import ScoreGroup
from tests.tiny import random_ids, shape_of, tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("on_the_gpu_where_there_is_one")
DIM, SHARE, LENGTH = 16, 2, 150
GROUPS = (
    ScoreGroup(score="sigmoid"),
    ScoreGroup(score="lssar", power=15, sink=4, alpha=40, beta=0.0),
    ScoreGroup(score="sigmoid", bias="constant", reference=64, sink=3, alpha=20, beta=0.25),
    ScoreGroup(score="ssmax", reference=50, sink=0, alpha=7, beta=0.5),
    ScoreGroup(score="lssa", sink=70, alpha=5, beta=0.25),
    ScoreGroup(score="sigmoid", sink=65, alpha=30, beta=0.0),
)


def layer(groups: Any = GROUPS, seed: int = 0) -> Kinds:
    """The mixer of a layer, with parameters that are not the first ones."""
    kinds = Kinds([group.model_dump() for group in groups], LayerFacts(0, DIM, DIM, SHARE, None))
    generator = torch.Generator(DEVICE).manual_seed(seed)
    with torch.no_grad():
        for weight in parameters(kinds):
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
    return kinds


def parameters(kinds: Kinds) -> list[torch.nn.Parameter]:
    """Of all mixers."""
    return [weight for mixer in kinds.mixers for weight in mixer.parameters()]


def random_qkv(batch: int = 2, length: int = LENGTH, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    heads = (len(GROUPS) * SHARE, len(GROUPS), len(GROUPS))
    return [torch.randn(batch, number, length, DIM, generator=generator) * 1.5 for number in heads]


def naive(kinds: Kinds, qkv: Any, groups: Any = GROUPS) -> torch.Tensor:
    """`[B, H, T, D]` from the table of formulas, on N x N scores in float64."""
    query, key, value = (tensor.double() for tensor in qkv)
    owners = {
        number: (mixer, own)
        for mixer, row in zip(kinds.mixers, kinds.members, strict=True)
        for own, number in enumerate(row)
    }
    position, outs = torch.arange(query.shape[2]), []
    for head in range(query.shape[1]):
        number, place = divmod(head, SHARE)
        group = groups[number]
        mixer: Any = owners[number][0]
        own = owners[number][1]
        seen = group.span().visible(position[:, None], position)
        n = seen.sum(1, keepdim=True).double()
        temperature = mixer.log_temperature[own, place].double().exp()
        q, k, v = query[:, head], key[:, number], value[:, number]
        dot = q @ k.transpose(-1, -2)
        if group.score == "sigmoid":
            off = n.log() if group.bias == "position" else math.log(group.reference)
            weights = 1 / (1 + torch.exp(off - mixer.bias[own, place] - temperature * dot / DIM**0.5)) * seen
        elif group.score == "ssmax":
            factor = temperature / math.log(group.reference)
            weights = torch.exp(factor * n.log() * dot / DIM**0.5) * seen
            weights = weights / weights.sum(-1, keepdim=True)
        else:
            cosine = dot / (q.norm(dim=-1)[:, :, None] * k.norm(dim=-1)[:, None] + 1e-8)
            weights = torch.log1p(torch.exp(temperature * math.log(DIM) * n.log() * cosine)) * seen
            weights = weights / weights.sum(-1, keepdim=True)
            if group.score == "lssar":
                weights = torch.relu(n * weights - (n > 3).double()).pow(group.power) * seen
                weights = weights / weights.sum(-1, keepdim=True)
        outs.append(weights @ v)
    return torch.stack(outs, dim=1)


def attended(kinds: Kinds, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: Step) -> torch.Tensor:
    """A pass of the layer, `[B, H, T, D]`."""
    module: Any = SimpleNamespace(compress_kinds=kinds, layer_idx=0)
    return plan_attention(module, query, key, value, None, compress_step=step)[0].transpose(1, 2)


def run(
    kinds: Kinds, qkv: Any, cuts: Any = (), mask: torch.Tensor | None = None, impl: str = "reference", **options: Any
) -> torch.Tensor:
    """Feed the columns in chunks through the attention function and its cache, `[B, H, T, D]`."""
    cache, outs = PagedCache([kinds], **options), []
    length = qkv[0].shape[2]
    with torch.no_grad():
        for start, stop in pairwise((0, *cuts, length)):
            query, key, value = (tensor[:, :, start:stop] for tensor in qkv)
            valid = None if mask is None or bool(mask[:, start:stop].all()) else mask[:, start:stop]
            step = Step.begin(cache, valid, len(query), stop - start, query.device)
            step.impl = impl
            key, value = cache.update(key, value, 0)
            outs.append(attended(kinds, query, key, value, step))
            step.end()
    return torch.cat(outs, dim=2)


CUTS = ((), (64, 65, 130), (90, *range(LENGTH - 4, LENGTH)))


@pytest.mark.parametrize("max_length", [None, LENGTH])
def test_every_way_to_the_end_is_the_naive_formula(max_length: int | None) -> None:
    kinds, qkv = layer(), random_qkv()
    expected = naive(kinds, qkv).float()
    for cuts in CUTS:
        torch.testing.assert_close(run(kinds, qkv, cuts, max_length=max_length), expected, rtol=1e-4, atol=1e-5)


KERNELS = (GROUPS[2], GROUPS[4], GROUPS[0])  # the functions that have one: a sigmoid with either bias, and LSSA


def test_the_kernels_are_the_naive_formula() -> None:
    kinds, qkv = layer(KERNELS), [tensor[:, : tensor.shape[1] // 2] for tensor in random_qkv(1, 79)]
    found = run(kinds, qkv, (66, 78), impl="triton", max_length=90)
    torch.testing.assert_close(found, naive(kinds, qkv, KERNELS).float(), rtol=1e-4, atol=1e-5)


def test_the_gradients_of_the_kernels_are_those_of_the_reference() -> None:
    kinds, slopes = layer(KERNELS), []
    for impl in ("reference", "triton"):
        qkv = [tensor[:, : tensor.shape[1] // 2].clone() for tensor in random_qkv(2, 37)]
        if impl == "triton":
            for tensor in qkv:
                tensor[1, :, :4] = tensor[1, :, 33:] = math.nan
        query, key, value = (tensor.requires_grad_() for tensor in qkv)
        leaves = [query, key, value, *parameters(kinds)]
        valid = torch.ones(2, 37, dtype=torch.bool)
        valid[1, :4] = valid[1, 33:] = False
        step = Step.begin(None, valid, 2, 37, query.device)
        step.impl = impl
        out = attended(kinds, query, key, value, step)
        weight = torch.randn(out.shape, generator=torch.Generator(DEVICE).manual_seed(5))
        slopes.append((out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)))
    for expected, found in zip(*slopes, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_padding_changes_nothing() -> None:
    kinds, qkv = layer(), random_qkv(3)
    mask = torch.ones(3, LENGTH, dtype=torch.bool)
    mask[0, :37] = mask[1, 101:] = mask[2, 1::3] = False
    poisoned = [tensor.masked_fill(~mask[:, None, :, None], math.nan) for tensor in qkv]
    out = run(kinds, poisoned, (60, LENGTH - 1), mask)
    for row in range(3):
        alone = naive(kinds, [tensor[row : row + 1, :, mask[row]] for tensor in qkv]).float()
        torch.testing.assert_close(out[row : row + 1, :, mask[row]], alone, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_naive_formula() -> None:
    kinds, qkv = layer(), [tensor.requires_grad_() for tensor in random_qkv(1, 61)]
    query, key, value = qkv
    leaves = [*qkv, *parameters(kinds)]
    weight = torch.randn(1, len(GROUPS) * SHARE, 61, DIM, generator=torch.Generator(DEVICE).manual_seed(5))
    expected = torch.autograd.grad((naive(kinds, qkv) * weight).sum(), leaves)
    step = Step.begin(None, None, 1, 61, weight.device)
    out = attended(kinds, query, key, value, step)
    for found, known in zip(torch.autograd.grad((out * weight).sum(), leaves), expected, strict=True):
        torch.testing.assert_close(found, known, rtol=2e-3, atol=2e-4)


def test_ssmax_is_the_dense_head_at_its_reference_length() -> None:
    dense = tiny_model("llama-gqa")
    shape, ids = shape_of(dense), random_ids(1, 100)
    plans = [ScoreGroup(score="ssmax", reference=100), FullGroup()]
    with torch.no_grad():
        new, old = (
            run_layer(planned_model(dense, uniform_plan(shape, group)).to(DEVICE), ids.to(DEVICE)) for group in plans
        )
    torch.testing.assert_close(new[:, -1], old[:, -1], rtol=1e-5, atol=1e-5)
    assert float((new[:, 50] - old[:, 50]).abs().max()) > 1e-3  # and elsewhere another function


def test_what_needs_no_training_is_priced_as_it_starts() -> None:
    query, key, value = (tensor[:, :heads] for tensor, heads in zip(random_qkv(1, 90), (4, 2, 2), strict=True))
    alternatives = Alternatives(facts_of(0, query, key, None), [[ScoreGroup(score="ssmax", reference=90)] * 2])
    (change,) = alternatives.changes(query, key, value, 0.25)
    assert float(change[:, :, -1].abs().max()) < 1e-5 < 1e-3 < float(change[:, :, 40].abs().max())


def run_layer(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What the first layer's attention gives, `[B, T, hidden size]`."""
    kept: list[torch.Tensor] = []
    hook = model.model.layers[0].self_attn.register_forward_hook(lambda *given: kept.append(given[2][0]))
    model(ids)
    hook.remove()
    return kept[0]


def test_reweighting_neither_overflows_nor_loses_a_flat_row() -> None:
    function = ScoreFunction(name="lssar", power=15)
    seen = torch.ones(1, 1, 4096, dtype=torch.bool)
    # One key has the row: x is 4095, and 4095^15 is 10^54.
    logits = torch.full((1, 1, 1, 4096), -50.0)
    logits[..., 7] = 30.0
    weights = function.weights(logits.requires_grad_(), seen)
    assert float(weights.detach()[..., 7]) == 1
    (slope,) = torch.autograd.grad(weights.square().sum(), logits)
    assert bool(torch.isfinite(slope).all())
    # All keys alike: every x is 0 but for rounding, and the weights stay those of LSSA.
    flat = torch.full((1, 1, 1, 4096), 1.7).requires_grad_()
    weights = function.weights(flat, seen)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 4096))
    (slope,) = torch.autograd.grad(weights[..., 0].sum(), flat)
    assert bool(torch.isfinite(slope).all()) and bool(slope.any())
    # A row of up to three keys keeps all of them.
    assert bool((function.weights(torch.randn(1, 1, 1, 3), seen[..., :3]) > 0).all())


def test_a_plan_says_what_a_score_needs() -> None:
    with pytest.raises(ValidationError, match="reference"):
        ScoreGroup(score="ssmax")
    with pytest.raises(ValidationError, match="reference"):
        ScoreGroup(score="sigmoid", bias="constant")
    refusals = {name: ScoreGroup.refusal(family) for name, family in FAMILIES.items()}
    assert {name for name, why in refusals.items() if why} == {"gemma2", "gpt_oss"}
    assert ScoreGroup(score="lssar", alpha=64, beta=0.0).words() == "LSSAR scores, sink 0, window 64"
