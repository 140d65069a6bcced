"""Scorers of cached tokens: each against its formula, and none of them asks about another token."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch

from compress.runtime import mixer_retain, scorer_key_norm, scorer_value_norm
from compress.runtime.scorers import SCORERS

BATCH, GROUPS, TOKENS, DIM, HIDDEN = 2, 3, 11, 8, 6
OF_KEYS_AND_VALUES = {"key_norm": scorer_key_norm.KeyNorm, "value_norm": scorer_value_norm.ValueNorm}


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(BATCH, TOKENS, HIDDEN, generator=generator)
    key, value = (torch.randn(BATCH, GROUPS, TOKENS, DIM, generator=generator) for _ in range(2))
    return hidden, key, value, torch.arange(TOKENS).expand(BATCH, -1)


def test_norms_are_their_formulas() -> None:
    _, key, value, positions = inputs()
    assert {name: SCORERS[name] for name in OF_KEYS_AND_VALUES} == OF_KEYS_AND_VALUES
    assert set(SCORERS.values()) >= set(mixer_retain.KNOWN)
    by_key, by_value = (SCORERS[name](GROUPS, HIDDEN, DIM) for name in ("key_norm", "value_norm"))
    expected = key.double().square().sum(-1).log() / 2
    torch.testing.assert_close(by_key(None, key, value, positions).double(), -expected)
    expected = value.double().square().sum(-1).log() / 2
    torch.testing.assert_close(by_value(None, key, value, positions).double(), expected)
    assert bool(by_key(None, key * 0, value, positions).isfinite().all())


def drawn(name: str) -> dict[str, torch.Tensor]:
    """A scorer's parameters, of which none is where it starts, and what it says of the inputs as `scores`."""
    scorer, generator = SCORERS[name](GROUPS, HIDDEN, DIM), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in scorer.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
        found = scorer(*inputs())
    return {"scores": found.double(), **{key: weight.double() for key, weight in scorer.state_dict().items()}}


def linear(given: dict[str, torch.Tensor], b: int, g: int, t: int, prefix: str = "") -> torch.Tensor:
    hidden, key, value, _ = (x.double() for x in inputs())
    scalars = torch.stack([torch.tensor(t + 1.0), key[b, g, t].norm(), value[b, g, t].norm()]).double().log()
    weight, beside, bias = (given[f"{prefix}{name}"][g] for name in ("weight", "scalars", "bias"))
    return weight @ hidden[b, t] + beside @ scalars + bias


def two_layers(given: dict[str, torch.Tensor], b: int, g: int, t: int) -> torch.Tensor:
    x = given["into"][g] @ inputs()[0][b, t].double() + given["into_bias"][g]
    middle = x * (1 + torch.erf(x / math.sqrt(2))) / 2
    return linear(given, b, g, t, "linear.") + given["out"][g] @ middle


def gate(given: dict[str, torch.Tensor], b: int, g: int, t: int) -> torch.Tensor:
    """The share of a token's own key beside the learned ones, the mean over its four queries."""

    def normed(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean() + 1e-6).sqrt() * factor

    x, shares = inputs()[0][b, t].double(), []
    own = normed(given["key"][g] @ x, given["key_norm"][g])
    for q in range(4):
        query = normed(given["query"][g, q] @ x + given["query_bias"][g, q], given["query_norm"][g])
        mine = torch.exp(query @ own / 4 + given["bias"][g, q])
        shares.append(mine / (mine + torch.exp(given["bases"][g] @ query / 4).sum()))
    return torch.stack(shares).mean().log() + given["offset"][g]


@pytest.mark.parametrize(("name", "formula"), [("ridge", linear), ("mlp", two_layers), ("gate", gate)])
def test_trained_scorers_are_their_formulas(name: str, formula: Any) -> None:
    given = drawn(name)
    places = product(range(BATCH), range(GROUPS), (0, 5, TOKENS - 1))
    expected = {(b, g, t): formula(given, b, g, t) for b, g, t in places}
    for place, score in expected.items():
        torch.testing.assert_close(given["scores"][place], score, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OF_KEYS_AND_VALUES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_token_is_judged_alone(name: str, dtype: torch.dtype) -> None:
    hidden, key, value, positions = inputs()
    scorer = SCORERS[name](GROUPS, HIDDEN, DIM)
    key, value = key.to(dtype), value.to(dtype)
    whole = scorer(hidden, key, value, positions)
    assert whole.shape == (BATCH, GROUPS, TOKENS) and whole.dtype == torch.float32
    for t in range(TOKENS):
        at = slice(t, t + 1)
        alone = scorer(hidden[:, at], key[:, :, at], value[:, :, at], positions[:, at])
        torch.testing.assert_close(alone, whole[:, :, at])
    assert scorer.flops(HIDDEN, DIM) > 0
    assert sum(weight.numel() for weight in scorer.parameters()) == GROUPS * scorer.parameter_count(HIDDEN, DIM)
