"""Parts of one softmax: kept log-sum-exps, and joining what was computed apart, against one softmax in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.runtime import merge
from compress.runtime.impl import IMPLS
from compress.runtime.pages import PagedState
from compress.runtime.reference import Rows
from compress.runtime.scores import Scores
from compress.runtime.span import PAGE, Span

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPANS = (Span(0, 9, 0.25, PAGE), Span(4, 20, 0.25))
EMPTY = float("-inf")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers in float64 that every device draws alike."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def whole(query: Any, key: Any, value: Any, spans: Any, scores: Scores | None = None) -> tuple[Any, Any]:
    """Output `[B, H, T, DV]` and log-sum-exp `[B, H, T]` from an explicit matrix of all scores."""
    share, t = query.shape[1] // key.shape[1], torch.arange(query.shape[2], device=DEVICE)
    key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    logits = logits if scores is None or scores.cap is None else scores.cap * torch.tanh(logits / scores.cap)
    seen = torch.stack([span.visible(t[:, None], t) for span in spans]).repeat_interleave(share, 0)
    weights = logits.exp() * seen
    total = weights.sum(-1)
    if scores is not None and scores.extra is not None:
        total = total + scores.extra.exp()[:, None]
    return weights @ value / total[..., None], total.log()


@pytest.mark.parametrize(("impl", "scores"), [("reference", False), ("reference", True), ("triton", True)])
def test_prefill_keeps_the_log_sum_exp_and_its_gradients(impl: str, scores: bool) -> None:
    share, length, first, last = 2, 131, 17, 40
    rows = Rows((0, 0), (0, first), (length, last - first))
    exact = [drawn(2, heads, length, 24, seed=heads) for heads in (len(SPANS) * share, len(SPANS), len(SPANS))]
    exact += [drawn(len(SPANS) * share)]
    weight, slope = drawn(2, len(SPANS) * share, length, 24, seed=5), drawn(2, len(SPANS) * share, length, seed=6)
    dtype = torch.float64 if impl == "reference" else torch.float32
    leaves = [x.to(dtype) for x in exact]
    for x in leaves[:3]:
        x[1, :, :first] = x[1, :, last:] = torch.nan
    for x in leaves + exact:
        x.requires_grad_()
    given = Scores(3.0, leaves[3]) if scores else None
    out, lse = IMPLS[impl].prefill(*leaves[:3], SPANS, rows=rows, scores=given, keep_lse=True)
    assert bool((lse[1, :, :first] == EMPTY).all() & (lse[1, :, last:] == EMPTY).all() & (out[1, :, :first] == 0).all())
    loss = (out * weight).sum() + (lse * slope)[0].sum() + (lse * slope)[1, :, first:last].sum()
    found = torch.autograd.grad(loss, leaves[: 4 if scores else 3])
    expected_loss = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for row, (start, stop) in enumerate(((0, length), (first, last))):
        part: Any = [x[row : row + 1, :, start:stop] for x in exact[:3]]
        expected = whole(part[0], part[1], part[2], SPANS, Scores(3.0, exact[3]) if scores else None)
        torch.testing.assert_close(out[row, :, start:stop].double(), expected[0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse[row, :, start:stop].double(), expected[1][0], rtol=1e-5, atol=1e-5)
        expected_loss = expected_loss + (expected[0][0] * weight[row, :, start:stop]).sum()
        expected_loss = expected_loss + (expected[1][0] * slope[row, :, start:stop]).sum()
    wanted = torch.autograd.grad(expected_loss, exact[: 4 if scores else 3])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_decode_keeps_it(impl: str) -> None:
    lengths, share = [200, 0, 64, 129], 2
    query, key, value = (drawn(4, heads, 200, 16, seed=heads).float() for heads in (len(SPANS) * share, 2, 2))
    state = PagedState(SPANS)
    state.begin(key, value)
    state.advance(lengths)
    store, decode = IMPLS[impl].store, IMPLS[impl].decode
    store(key, value, state.pages(), Rows((0,) * 4, (0,) * 4, tuple(lengths)), SPANS)
    of = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    last = torch.stack([query[row, :, max(0, length - 1)] for row, length in enumerate(lengths)])
    extra = drawn(len(SPANS) * share)
    for given in (None, Scores(None, extra.float())):
        out, lse = decode(last, state.pages(), of, SPANS, keep_lse=True, scores=given)
        torch.testing.assert_close(out, decode(last, state.pages(), of, SPANS, scores=given), rtol=1e-5, atol=1e-6)
        for row, length in enumerate(lengths):
            if length == 0:
                assert bool((out[row] == 0).all()) and bool((lse[row] == EMPTY).all())
                continue
            part: Any = [x[row : row + 1, :, :length].double() for x in (query, key, value)]
            doubled = None if given is None else Scores(None, extra)
            expected = whole(part[0], part[1], part[2], SPANS, doubled)
            torch.testing.assert_close(out[row].double(), expected[0][0, :, -1], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(lse[row].double(), expected[1][0, :, -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_softmax_is_the_join_of_its_parts(impl: str) -> None:
    full, near = Span(), Span(0, 70, 0.0, PAGE)
    length = 200
    query, key, value = (drawn(1, heads, length, 16, seed=heads).float() for heads in (2, 1, 1))
    prefill = IMPLS[impl].prefill
    expected = prefill(query, key, value, [full], keep_lse=True)
    out, lse = prefill(query, key, value, [near], keep_lse=True)
    # What the window hides, by itself: the keys before the boundary of every page of queries.
    rest, rest_lse = torch.zeros_like(out), torch.full_like(lse, EMPTY)
    for t in range(length):
        if (stop := near.boundary(t)) > 0:
            logits = query[..., t, :] @ key[0, 0, :stop].T / 4
            rest[..., t, :], rest_lse[..., t] = logits.softmax(-1) @ value[0, 0, :stop], logits.logsumexp(-1)
    for joined in (merge.join(out, lse, rest, rest_lse), merge.join(rest, rest_lse, out, lse)):
        for a, b in zip(joined, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    den = rest_lse.exp()
    found = merge.merge(out, lse, rest * den[..., None], merge.log_mass(den), torch.zeros(2, 1))
    torch.testing.assert_close(found, expected[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(found[..., :64, :], out[..., :64, :])


def test_a_merge_is_the_direct_sum_with_a_gain() -> None:
    out, num = drawn(3, 5, 8), drawn(3, 5, 8, seed=1)
    lse, den, gain = drawn(3, 5, seed=2), drawn(3, 5, seed=3).exp(), drawn(3, 1, seed=4)
    inputs = [x.requires_grad_() for x in (out, lse, num, den, gain)]
    mass, other = lse.exp()[..., None], gain.exp()[..., None]
    direct = (mass * out + other * num) / (mass + other * den[..., None])
    found = merge.merge(out, lse, num, merge.log_mass(den), gain)
    torch.testing.assert_close(found, direct)
    weight = drawn(3, 5, 8, seed=7)
    expected = torch.autograd.grad((direct * weight).sum(), inputs)
    for a, b in zip(torch.autograd.grad((found * weight).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_empty_side_leaves_the_other_as_it_is(dtype: torch.dtype) -> None:
    out, num = drawn(4, 6).to(dtype), drawn(4, 6, seed=1).float()
    lse = torch.tensor([0.5, -300.0, EMPTY, EMPTY], device=DEVICE)
    den = torch.tensor([0.0, 0.0, 2.0, 0.0], device=DEVICE)
    out = out * torch.tensor([1, 1, 0, 0], device=DEVICE)[:, None].to(dtype)
    num = num * (den > 0)[:, None]
    gain = torch.tensor(90.0, device=DEVICE)
    inputs = [x.requires_grad_() for x in (out, lse, num, den, gain)]
    found = merge.merge(out, lse, num, merge.log_mass(den), gain)
    assert found.dtype == dtype and torch.equal(found[:2], out[:2]) and bool((found[3] == 0).all())
    torch.testing.assert_close(found[2], (num[2] / 2).to(dtype))
    joined, total = merge.join(out.float(), lse, num, merge.log_mass(den) + gain)
    assert total[:2].tolist() == lse[:2].tolist() and total[3] == EMPTY and total[2] > 90
    loss = found.float().square().sum() + joined.square().sum() + total.masked_fill(total == EMPTY, 0).square().sum()
    grads = torch.autograd.grad(loss, inputs)
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert bool((grads[2][[0, 1, 3]] == 0).all()) and bool((grads[0][2:] == 0).all())


def test_a_join_holds_far_apart_parts_and_is_associative() -> None:
    means = drawn(3, 200, 4).float()
    masses = (drawn(3, 200, seed=1) * 1e4).float()
    weights = masses.double().softmax(0)
    exact = (weights[..., None] * means.double()).sum(0)
    a, b, c = zip(means, masses, strict=True)
    for found in (merge.join(*merge.join(*a, *b), *c), merge.join(*a, *merge.join(*b, *c))):
        torch.testing.assert_close(found[0].double(), exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1].double(), masses.double().logsumexp(0), rtol=1e-6, atol=1e-6)
