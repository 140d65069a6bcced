"""Reference attention over the paged cache against a naive masked softmax, for random spans, chunks and padding."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.runtime.attention import IMPLS, Step, plan_attention
from compress.runtime.paged_cache import PagedCache, PagedLayer
from compress.runtime.reference import decode, prefill
from compress.runtime.span import BETA_UNIT, PAGE, Span

HEAD_DIM = 8

spans = st.builds(
    Span,
    sink=st.sampled_from([0, 1, 4, 63, 64, 65, 130]),
    alpha=st.integers(-100, 250),
    beta=st.integers(0, BETA_UNIT).map(lambda units: units / BETA_UNIT),
)


def naive(qkv: Any, rule: list[Span]) -> torch.Tensor:
    """Softmax over an explicit N x N mask, `[B, H, N, D]`."""
    query, key, value = qkv
    share = query.shape[1] // key.shape[1]
    positions = torch.arange(query.shape[2])
    out = []
    for head in range(query.shape[1]):
        mask = rule[head // share].visible(positions[:, None], positions[None, :])
        scores = query[:, head] @ key[:, head // share].transpose(-1, -2) / query.shape[-1] ** 0.5
        out.append(scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value[:, head // share])
    return torch.stack(out, dim=1)


class Module:
    """What the attention function reads of an attention module."""

    layer_idx = 0

    class config:
        compress_impl = "reference"

    def __init__(self, rule: list[Span]) -> None:
        self.compress_spans = rule


def run(
    rule: list[Span],
    qkv: Any,
    cuts: list[int],
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, PagedCache]:
    """Feed the columns in the given chunks through the attention function and its cache; `[B, H, N, D]`."""
    cache = PagedCache([rule])
    out = []
    edges = [0, *cuts, qkv[0].shape[2]]
    for start, stop in pairwise(edges):
        query, key, value = (tensor[:, :, start:stop] for tensor in qkv)
        valid = None if mask is None or mask[:, start:stop].all() else mask[:, start:stop]
        key, value = cache.update(key, value, 0)
        part, _ = plan_attention(
            Module(rule),
            query,
            key,
            value,
            None,
            compress_step=Step(cache, None if valid is None or valid.all() else valid),
        )
        out.append(part.transpose(1, 2))
    return torch.cat(out, dim=2), cache


def random_qkv(batch: int, groups: int, share: int, length: int, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    make = lambda heads: torch.randn(batch, heads, length, HEAD_DIM, generator=generator) * 1.5  # noqa: E731
    return make(groups * share), make(groups), make(groups)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_one_shot_chunked_and_decoded_are_one_function(data: st.DataObject) -> None:
    groups, share = data.draw(st.sampled_from([(1, 1), (2, 2), (3, 1), (2, 3)]))
    rule = data.draw(st.lists(spans, min_size=groups, max_size=groups))
    length = data.draw(st.integers(1, 330))
    batch = data.draw(st.integers(1, 2))
    qkv = random_qkv(batch, groups, share, length, data.draw(st.integers(0, 99)))
    expected = naive(qkv, rule)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, length - 1)), max_size=4)) - {length})
    tail = list(range(max(1, length - 5), length))  # the last tokens one by one, as in decoding
    for chunks in ([], cuts, sorted({*cuts, *tail})):
        out, cache = run(rule, qkv, chunks)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        layer = cache.paged[0]
        held = sum(span.page_count(length) for span in rule) * batch
        page = PAGE * 2 * HEAD_DIM * 4
        assert layer.held_bytes() == held * page
        assert held * page <= layer.allocated_bytes() <= (held + 2 * groups * batch) * page


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_padding_on_either_side_changes_nothing(data: st.DataObject) -> None:
    groups, share = 2, 2
    rule = data.draw(st.lists(spans, min_size=groups, max_size=groups))
    length = data.draw(st.integers(2, 260))
    qkv = random_qkv(3, groups, share, length, data.draw(st.integers(0, 99)))
    mask = torch.ones(3, length, dtype=torch.bool)
    left, right = data.draw(st.integers(0, length - 1)), data.draw(st.integers(0, length - 1))
    mask[0, :left] = False
    mask[1, length - right :] = False
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4)))
    poisoned: Any = tuple(tensor.masked_fill(~mask[:, None, :, None], float("nan")) for tensor in qkv)
    out, cache = run(rule, poisoned, cuts, mask)
    for row in range(3):
        alone: Any = tuple(tensor[row : row + 1, :, mask[row]] for tensor in qkv)
        torch.testing.assert_close(out[row : row + 1, :, mask[row]], naive(alone, rule), rtol=1e-4, atol=1e-5)
    assert cache.paged[0].lengths == mask.sum(1).tolist()


def test_decode_ignores_what_lies_in_unused_slots() -> None:
    rule = [Span(4, 100, 0.0), Span()]
    qkv = random_qkv(1, 2, 2, 150, seed=3)
    layer = PagedLayer(rule)
    layer.update(qkv[1], qkv[2])
    layer.append(qkv[1], qkv[2], [0])
    assert layer.keys is not None and layer.values is not None
    places, numbers = layer.table()
    arguments = (torch.tensor([150]), rule)
    clean = decode(qkv[0][:, :, -1], layer.keys, layer.values, places, numbers, *arguments)
    torch.testing.assert_close(clean, naive(qkv, rule)[:, :, -1], rtol=1e-4, atol=1e-5)
    keys, values = layer.keys.clone(), layer.values.clone()
    slots = (numbers[..., None] * PAGE + torch.arange(PAGE)).flatten(2)[0]
    for group, span in enumerate(rule):
        hidden = ~span.visible(torch.tensor(149), slots[group])
        where = (places[0, group][:, None] * PAGE + torch.arange(PAGE)).flatten()[hidden & (slots[group] >= 0)]
        keys.view(-1, HEAD_DIM)[where] = float("nan")
        values.view(-1, HEAD_DIM)[where] = float("nan")
    poisoned = decode(qkv[0][:, :, -1], keys, values, places, numbers, *arguments)
    assert torch.equal(poisoned, clean)


def test_gradients_are_those_of_the_masked_softmax() -> None:
    rule = [Span(4, 20, 0.25), Span()]
    qkv: Any = [tensor.double().requires_grad_() for tensor in random_qkv(2, 2, 2, 77, seed=5)]
    weight = torch.randn(2, 4, 77, HEAD_DIM, dtype=torch.double)
    expected = torch.autograd.grad((naive(qkv, rule) * weight).sum(), qkv)
    found = torch.autograd.grad((prefill(qkv[0], qkv[1], qkv[2], rule) * weight).sum(), qkv)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_window_frees_its_pages_and_the_pool_does_not_grow() -> None:
    layer = PagedLayer([Span(4, 256, 0.0)])
    token = torch.randn(1, 1, 1, HEAD_DIM)
    sizes = []
    for _ in range(1500):
        layer.update(token, token)
        layer.append_one(token, token, [0])
        sizes.append(layer.allocated_bytes())
    page = PAGE * 2 * HEAD_DIM * 4
    assert max(sizes) <= 6 * page  # one sink page, 256 tokens over at most five pages
    assert len(layer.tables[0][0]) == layer.spans[0].page_count(1500)


def test_sequences_can_be_selected_repeated_and_reordered() -> None:
    rule = [Span(4, 40, 0.0), Span()]
    qkv = random_qkv(3, 2, 1, 200, seed=7)
    _, cache = run(rule, qkv, [])
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    order = [2, 0, 0]
    more = random_qkv(3, 2, 1, 1, seed=8)
    key, value = cache.update(more[1], more[2], 0)
    out, _ = plan_attention(Module(rule), more[0], key, value, None, compress_step=Step(cache))
    whole: Any = [torch.cat([old[order], new], dim=2) for old, new in zip(qkv, more, strict=True)]
    torch.testing.assert_close(out.transpose(1, 2), naive(whole, rule)[:, :, -1:], rtol=1e-4, atol=1e-5)
    cache.batch_select_indices(torch.tensor([True, False, True]))
    assert cache.paged[0].lengths == [201, 201]
    cache.batch_repeat_interleave(2)
    assert cache.paged[0].lengths == [201] * 4
    assert cache.held_bytes() == cache.allocated_bytes()


def test_what_a_paged_cache_cannot_do_it_refuses() -> None:
    cache = PagedCache([[Span()]])
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.paged[0].crop(-1)
    with pytest.raises(ValueError, match="cannot be offloaded"):
        cache.paged[0].offload()
    with pytest.raises(RuntimeError, match="only inside a model"):
        query, key, value = random_qkv(1, 1, 1, 2, 0)
        plan_attention(Module([Span()]), query, key, value, None)
    token = torch.randn(2, 1, 1, HEAD_DIM)
    cache.update(token, token, 0)
    with pytest.raises(ValueError, match="batch size: expected 2 as cached, got 1"):
        cache.update(token[:1], token[:1], 0)
    assert set(IMPLS) == {"reference"}
