"""States of linear attention: the chunked, recurrent and parallel forms are one function."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.runtime.linear_states import Rule, chunk_states, own_chunk, parallel, read, recurrent
from compress.runtime.span import PAGE

BATCH, GROUPS, SHARE, FEATURES, VALUES = 2, 2, 3, 7, 5
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def inputs(tokens: int, rule: Rule, decay: str, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Query, key and value in float64, decays and strengths of a kind."""
    torch.manual_seed(seed)
    query, key = torch.rand(BATCH, GROUPS * SHARE, tokens, FEATURES), torch.rand(BATCH, GROUPS, tokens, FEATURES)
    value = torch.randn(BATCH, GROUPS, tokens, VALUES)
    if rule == "delta":
        key = torch.nn.functional.normalize(key, dim=-1)
    log_decay = {"none": None, "fixed": -torch.rand(GROUPS), "token": -torch.rand(BATCH, GROUPS, tokens)}[decay]
    strength = torch.rand(BATCH, GROUPS, tokens) if rule == "delta" else None
    return tuple(x if x is None else x.double() for x in (query, key, value, log_decay, strength))  # type: ignore[misc]


def padded(x: torch.Tensor | None, tokens: int) -> torch.Tensor | None:
    """Filled up to `tokens` with NaN, where it has tokens at all."""
    if x is None or x.dim() < 3:
        return x
    shape = (*x.shape[:2], tokens - x.shape[2], *x.shape[3:])
    return torch.cat([x, x.new_full(shape, float("nan"))], dim=2)


@pytest.mark.parametrize("rule", ["add", "delta"])
@pytest.mark.parametrize("decay", ["none", "fixed", "token"])
def test_chunks_are_the_recurrence_are_the_matrix(rule: Rule, decay: str) -> None:
    tokens = 3 * PAGE - 25
    query, key, value, log_decay, strength = inputs(tokens, rule, decay)
    options: Any = {"rule": rule, "log_decay": log_decay, "strength": strength}
    expected, last = recurrent(query, key, value, **options)
    torch.testing.assert_close(parallel(query, key, value, **options), expected, **EXACT)
    count = torch.full((BATCH, GROUPS), tokens)
    options["count"] = count
    options |= {"log_decay": padded(log_decay, 3 * PAGE), "strength": padded(strength, 3 * PAGE)}
    key, value = (
        torch.cat([x, x.new_full((BATCH, GROUPS, 25, x.shape[-1]), float("nan"))], dim=2) for x in (key, value)
    )
    states = chunk_states(key, value, **options)
    torch.testing.assert_close(states[:, :, -1], last, **EXACT)
    chunk = torch.arange(3).expand(BATCH, GROUPS, 3)
    query = torch.nn.functional.pad(query, (0, 0, 0, 25))
    found = own_chunk(query, key, value, states, chunk, **options)[:, :, :tokens]
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("rule", ["add", "delta"])
def test_a_state_goes_on_where_it_was_and_ragged_counts_stop_it(rule: Rule) -> None:
    query, key, value, log_decay, strength = inputs(4 * PAGE, rule, "token", seed=1)
    options: Any = {"log_decay": log_decay} | ({} if strength is None else {"strength": strength})
    whole = chunk_states(key, value, rule=rule, **options)
    halves = [slice(0, 2 * PAGE), slice(2 * PAGE, None)]
    first = None
    for half, before in zip(halves, (0, 2), strict=True):
        part = {name: x[:, :, half] for name, x in options.items()}
        states = chunk_states(key[:, :, half], value[:, :, half], first, rule=rule, **part)
        torch.testing.assert_close(states, whole[:, :, before : before + 3], **EXACT)
        first = states[:, :, -1]
    count = torch.tensor([[0, 70], [200, 256]])
    states = chunk_states(key, value, count=count, rule=rule, **options)
    for row, group in ((0, 0), (0, 1), (1, 0), (1, 1)):
        here, tokens = (slice(row, row + 1), slice(group, group + 1)), int(count[row, group])
        alone = {name: x[here][:, :, :tokens] for name, x in options.items()}
        pick = query.unflatten(1, (GROUPS, SHARE))[here].flatten(1, 2)[:, :, :tokens]
        if tokens:
            last = recurrent(pick, key[here][:, :, :tokens], value[here][:, :, :tokens], rule=rule, **alone)[1]
            torch.testing.assert_close(states[here][:, :, -1], last, **EXACT)
        else:
            assert not states[here].any()


def test_queries_read_the_state_that_they_are_told_to() -> None:
    query, key, value, *_ = inputs(4 * PAGE, "add", "none", seed=2)
    states = chunk_states(key, value)
    chunk = torch.randint(0, 5, (BATCH, GROUPS, 4))
    found = read(query, states, chunk)
    for row in range(BATCH):
        for head in range(GROUPS * SHARE):
            for page in range(4):
                own = slice(page * PAGE, (page + 1) * PAGE)
                state = states[row, head // SHARE, chunk[row, head // SHARE, page]]
                torch.testing.assert_close(found[row, head, own], query[row, head, own] @ state, **EXACT)


@pytest.mark.parametrize("rule", ["add", "delta"])
def test_states_are_float32_and_gradients_reach_everything(rule: Rule) -> None:
    query, key, value, log_decay, strength = inputs(2 * PAGE, rule, "token", seed=3)
    low = [None if x is None else x.bfloat16() for x in (query, key, value, log_decay, strength)]
    options: Any = {"rule": rule, "log_decay": low[3], "strength": low[4]}
    assert chunk_states(low[1], low[2], **options).dtype == torch.float32
    exact = [x.requires_grad_() for x in (key, value, log_decay, *(() if strength is None else (strength,)))]
    torch.autograd.gradcheck(
        lambda k, v, d, *b: chunk_states(
            k[:1, :1], v[:1, :1], rule=rule, log_decay=d[:1, :1], strength=b[0][:1, :1] if b else None
        )[:, :, 1:].sum((2, 3)),
        exact,
        fast_mode=True,
    )


@pytest.mark.parametrize("rule", ["add", "delta"])
def test_a_float32_state_keeps_up_with_float64_over_8192_decoded_tokens(rule: Rule) -> None:
    """Page by page, as decoding takes keys in; a bfloat16 normaliser is far off after 2,048 tokens."""
    torch.manual_seed(4)
    features, tokens = 16, 8192
    key = torch.randn(1, 1, tokens, features, dtype=torch.float64).softmax(-1)
    key = key if rule == "add" else torch.nn.functional.normalize(key, dim=-1)
    value, query = torch.randn(1, 1, tokens, 8, dtype=torch.float64), torch.rand(1, 1, 1, features)
    exact, state, low = chunk_states(key, value, rule=rule)[:, :, -1], None, torch.zeros(features, dtype=torch.bfloat16)
    for page in range(tokens // PAGE):
        kept = slice(page * PAGE, (page + 1) * PAGE)
        state = chunk_states(key[:, :, kept].float(), value[:, :, kept].float(), state, rule=rule)[:, :, 1]
    assert state is not None and state.dtype == torch.float32
    found, expected = query @ state, query.double() @ exact
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    for one in key[0, 0].bfloat16():
        low += one
    if rule == "add":
        assert float(low.sum()) < 0.5 * float(exact[0, 0, :, -1].sum())
