"""Capped scores and extra logits: every implementation against a naive softmax, in prefill, chunks and decoding."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.runtime.attention import plan_attention
from compress.runtime.impl import IMPLS
from compress.runtime.mixer import Kinds, LayerFacts, Mixer, register
from compress.runtime.paged_cache import PagedCache
from compress.runtime.reference import Rows
from compress.runtime.scores import Scores
from compress.runtime.span import Span
from compress.runtime.step import Step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPANS = (Span(), Span(4, 30, 0.0), Span(0, 7, 0.25))
LENGTH, SHARE, DIM = 150, 2, 16
CASES = {"capped": (2.0, False), "extra": (None, True), "both": (2.0, True)}


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys, values, and a logit for every query head."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    heads = (len(SPANS) * SHARE, len(SPANS), len(SPANS))
    query, key, value = (torch.randn(2, h, LENGTH, DIM, generator=generator, device=DEVICE) * 1.5 for h in heads)
    return query, key, value, torch.randn(heads[0], generator=generator, device=DEVICE) * 2


def naive(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: Scores) -> torch.Tensor:
    """`[B, H, T, D]` from explicit N x N weights."""
    position, out = torch.arange(query.shape[2], device=DEVICE), []
    for head in range(query.shape[1]):
        group = head // SHARE
        logits = query[:, head] @ key[:, group].transpose(-1, -2) / DIM**0.5
        logits = logits if scores.cap is None else scores.cap * torch.tanh(logits / scores.cap)
        weights = logits.exp() * SPANS[group].visible(position[:, None], position[None, :])
        more = 0 if scores.extra is None else scores.extra[head].exp()
        out.append(weights / (weights.sum(-1, keepdim=True) + more) @ value[:, group])
    return torch.stack(out, dim=1)


@pytest.mark.parametrize(("impl", "case"), [("reference", "capped"), ("reference", "extra"), ("triton", "both")])
def test_every_way_to_the_end_is_the_naive_softmax(impl: str, case: str) -> None:
    query, key, value, extra = inputs()
    scores = Scores(CASES[case][0], extra if CASES[case][1] else None)
    expected = naive(query, key, value, scores)
    groups = [{"target": "window", "sink": span.sink, "alpha": span.alpha, "beta": span.beta} for span in SPANS]
    kinds = Kinds(groups, LayerFacts(0, DIM, DIM, SHARE, None))
    module: Any = SimpleNamespace(compress_kinds=kinds, layer_idx=0)
    for cuts in ((0, LENGTH), (0, 90, *range(LENGTH - 3, LENGTH + 1))):
        cache, parts = PagedCache([kinds], None), []
        for start, stop in pairwise(cuts):
            step = Step.begin(cache, None, 2, stop - start, query.device)
            step.impl = impl
            q, k, v = (x[:, :, start:stop] for x in (query, key, value))
            k, v = cache.update(k, v, 0)
            parts.append(
                plan_attention(module, q, k, v, None, compress_step=step, softcap=scores.cap, s_aux=scores.extra)[
                    0
                ].transpose(1, 2)
            )
            step.end()
        torch.testing.assert_close(torch.cat(parts, dim=2), expected, rtol=1e-4, atol=1e-5)


def test_kernel_gradients_are_those_of_the_reference() -> None:
    rows, slopes = Rows((0, 0), (0, 40), (70, 23)), []
    weight = torch.randn(2, len(SPANS) * SHARE, 70, DIM, device=DEVICE)
    for impl in ("reference", "triton"):
        *own, extra = inputs()
        leaves = [x[:, :, :70].clone().requires_grad_() for x in own] + [extra.clone().requires_grad_()]
        out = IMPLS[impl].prefill(*leaves[:3], SPANS, rows=rows, scores=Scores(2.0, leaves[3]))
        slopes.append((out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)))
    for expected, found in zip(*slopes, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_mixer_that_knows_no_scores_refuses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.runtime.mixer.MIXERS", {})
    register("plain")(type("Plain", (Mixer,), {}))
    kinds = Kinds([{"target": "plain"}], LayerFacts(0, DIM, DIM, 1, None))
    query = torch.zeros(1, 1, 2, DIM)
    step = Step.begin(None, None, 1, 2, query.device)
    module: Any = SimpleNamespace(compress_kinds=kinds, layer_idx=0)
    with pytest.raises(ValueError, match=r"caps its scores or has an extra logit .* the target 'plain' do not"):
        plan_attention(module, query, query, query, None, compress_step=step, softcap=2.0)
