"""Scorers of cached tokens: each against its formula, and none of them asks about another token."""

from __future__ import annotations

import pytest
import torch

from compress.runtime import scorer_key_norm, scorer_value_norm
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
    by_key, by_value = (SCORERS[name](GROUPS, HIDDEN, DIM) for name in ("key_norm", "value_norm"))
    expected = key.double().square().sum(-1).log() / 2
    torch.testing.assert_close(by_key(None, key, value, positions).double(), -expected)
    expected = value.double().square().sum(-1).log() / 2
    torch.testing.assert_close(by_value(None, key, value, positions).double(), expected)
    assert bool(by_key(None, key * 0, value, positions).isfinite().all())


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
