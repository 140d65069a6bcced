"""Sliding perplexity equals a direct computation, token for token and bucket for bucket."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from compress.errors import UserError
from compress.evaluate.measures.perplexity import Perplexity, bucket_edges, perplexity
from compress.models.planned import planned_model
from compress.plan import uniform_plan
from compress.targets.full import FullGroup
from tests.tiny import random_ids, shape_of, tiny_model

TEXT = random_ids(1, 3000).flatten().tolist()


def direct(model: Any, start: int, length: int) -> torch.Tensor:
    """-ln p of every token of a window but its first, float64."""
    tokens = torch.tensor([TEXT[start : start + length]])
    with torch.inference_mode():
        logits = model(tokens).logits.double().log_softmax(-1)
    return -logits[0, :-1].gather(1, tokens[0, 1:, None]).flatten()


def test_windows_side_by_side() -> None:
    model = tiny_model("llama-gqa")
    steps: list[tuple[int, int]] = []
    result = perplexity(model, TEXT, Perplexity(length=600, windows=3), progress=lambda *step: steps.append(step))
    losses = [direct(model, start, 600) for start in (0, 600, 1200)]
    expected = torch.cat(losses)
    assert result.tokens == 3 * 599 == len(expected)
    assert result.nll == pytest.approx(float(expected.sum()), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(float(expected.mean())), rel=1e-6)
    assert result.window_nll == pytest.approx([float(loss.sum()) for loss in losses], rel=1e-6)
    assert [(b.start, b.end, b.tokens) for b in result.buckets] == [(0, 256, 765), (256, 512, 768), (512, 600, 264)]
    middle = torch.cat([loss[255:511] for loss in losses])
    assert result.buckets[1].perplexity == pytest.approx(math.exp(float(middle.mean())), rel=1e-6)
    assert sum(bucket.nll for bucket in result.buckets) == pytest.approx(result.nll)
    assert steps == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("family", ["granite", "cohere"])
def test_what_a_model_does_to_its_logits_is_done(family: str) -> None:
    """These divide or multiply them by a number of their configuration."""
    dense = tiny_model(family)
    for model in (dense, planned_model(dense, uniform_plan(shape_of(dense), FullGroup()))):
        result = perplexity(model, TEXT, Perplexity(length=300, windows=1))
        assert result.nll == pytest.approx(float(direct(dense, 0, 300).sum()), rel=1e-5)


def test_overlapping_windows_score_each_token_once_with_the_most_context() -> None:
    model = tiny_model("qwen3")
    result = perplexity(model, TEXT, Perplexity(length=300, windows=3, stride=100), edges=[0, 200, 300])
    expected = torch.cat([direct(model, 0, 300), direct(model, 100, 300)[199:], direct(model, 200, 300)[199:]])
    assert result.tokens == 499 == len(expected)
    assert result.nll == pytest.approx(float(expected.sum()), rel=1e-6)
    assert [bucket.tokens for bucket in result.buckets] == [199, 300]


def test_bucket_edges() -> None:
    assert bucket_edges(100) == [0, 100]
    assert bucket_edges(256) == [0, 256]
    assert bucket_edges(2048) == [0, 256, 512, 1024, 2048]
    assert bucket_edges(3000) == [0, 256, 512, 1024, 2048, 3000]


def test_only_a_slice_of_logits_exists_at_once() -> None:
    model = tiny_model("llama-gqa")
    rows = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[-2]))
    perplexity(model, TEXT, Perplexity(length=700, windows=1))
    assert rows == [256, 256, 187]


def test_what_does_not_fit_is_refused() -> None:
    model = tiny_model("llama-gqa")
    with pytest.raises(UserError) as error:
        perplexity(model, TEXT[:500], Perplexity(length=300, windows=2))
    assert "at least 600 tokens" in str(error.value)
    assert "500 tokens" in str(error.value)
    with pytest.raises(UserError, match="context"):
        perplexity(model, TEXT, Perplexity(length=2000, windows=1))
    with pytest.raises(ValidationError) as invalid:
        Perplexity(length=300, stride=301)
    assert invalid.value.errors()[0]["loc"] == ("stride",)


def test_nan_is_an_error() -> None:
    model = tiny_model("llama-gqa")
    model.lm_head.weight.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="window 0"):
        perplexity(model, TEXT, Perplexity(length=100, windows=1))
