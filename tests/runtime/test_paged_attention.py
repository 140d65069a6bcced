"""Every implementation over the paged cache against a naive masked softmax, for random spans, chunks and padding."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.runtime.attention import plan_attention
from compress.runtime.impl import IMPLS, choose_impl
from compress.runtime.mixer import Kinds, LayerFacts
from compress.runtime.mixer_span import SpanMixer
from compress.runtime.paged_cache import PagedCache
from compress.runtime.pages import PagedState, Pages
from compress.runtime.reference import Rows, prefill
from compress.runtime.score_functions import ScoreFunction
from compress.runtime.span import BETA_UNIT, PAGE, Span
from compress.runtime.step import Step

HEAD_DIM = 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("on_the_gpu_where_there_is_one")


spans = st.builds(
    Span,
    sink=st.sampled_from([0, 1, 4, 63, 64, 65, 130]),
    alpha=st.integers(-100, 250),
    beta=st.integers(0, BETA_UNIT).map(lambda units: units / BETA_UNIT),
    granule=st.sampled_from([1, PAGE]),
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

    def __init__(self, rule: list[Span]) -> None:
        self.compress_kinds = kinds_of(rule)


def kinds_of(rule: list[Span], group_size: int = 1) -> Kinds:
    """The mixer of a layer with a window group for every span."""
    groups = [{"target": "window", "sink": span.sink, "alpha": span.alpha, "beta": span.beta} for span in rule]
    kinds = Kinds(groups, LayerFacts(0, HEAD_DIM, 4 * HEAD_DIM, group_size, None))
    assert isinstance(kinds.only, SpanMixer)
    kinds.only.rules = tuple(rule)  # a window group has no granule
    kinds.only.fixed = list(rule)
    return kinds


def state_of(cache: PagedCache) -> PagedState:
    """The pages of a cache's one layer."""
    (state,) = cache.paged[0].states
    assert isinstance(state, PagedState)
    return state


def attend(rule: list[Span], qkv: Any, cache: PagedCache, valid: torch.Tensor | None = None, impl: str = "reference"):
    """One forward pass of a single layer over new columns; `[B, H, T, D]`."""
    query, key, value = qkv
    step = Step.begin(cache, valid, query.shape[0], query.shape[2], query.device)
    step.impl = impl
    key, value = cache.update(key, value, 0)
    out, _ = plan_attention(Module(rule), query, key, value, None, compress_step=step)
    step.end()
    return out.transpose(1, 2)


def run(
    rule: list[Span],
    qkv: Any,
    cuts: list[int],
    mask: torch.Tensor | None = None,
    impl: str = "reference",
    max_length: int | None = None,
) -> tuple[torch.Tensor, PagedCache]:
    """Feed the columns in the given chunks through the attention function and its cache; `[B, H, N, D]`."""
    cache = PagedCache([kinds_of(rule)], max_length)
    out = []
    for start, stop in pairwise([0, *cuts, qkv[0].shape[2]]):
        valid = None if mask is None or mask[:, start:stop].all() else mask[:, start:stop]
        out.append(attend(rule, [tensor[:, :, start:stop] for tensor in qkv], cache, valid, impl))
    return torch.cat(out, dim=2), cache


def random_qkv(batch: int, groups: int, share: int, length: int, seed: int) -> Any:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    make = lambda heads: torch.randn(batch, heads, length, HEAD_DIM, generator=generator) * 1.5  # noqa: E731
    return make(groups * share), make(groups), make(groups)


IMPL_NAMES = ["reference", "triton"]  # `flash` is `triton` but for long prompts on Hopper
EXAMPLES, TOKENS = {"reference": 60, "triton": 3}, {"reference": 330, "triton": 170}  # the interpreter is slow


def each_impl(test: Any) -> None:
    """Run a property once for every implementation, with as many examples as it can afford."""
    for impl in IMPL_NAMES:
        settings(max_examples=EXAMPLES[impl], deadline=None, derandomize=True)(given(st.data(), st.just(impl))(test))()


def test_one_shot_chunked_and_decoded_are_one_function() -> None:
    each_impl(one_shot_chunked_and_decoded)


def one_shot_chunked_and_decoded(data: st.DataObject, impl: str) -> None:
    groups, share = data.draw(st.sampled_from([(1, 1), (2, 2), (3, 1), (2, 3)]))
    rule = data.draw(st.lists(spans, min_size=groups, max_size=groups))
    length = data.draw(st.integers(1, TOKENS[impl]))
    batch = data.draw(st.integers(1, 2))
    reserve = data.draw(st.sampled_from([None, length, length + 70]))
    qkv = random_qkv(batch, groups, share, length, data.draw(st.integers(0, 99)))
    expected = naive(qkv, rule)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, length - 1)), max_size=4)) - {length})
    tail = list(range(max(1, length - 5), length))  # the last tokens one by one, as in decoding
    for chunks in ([], cuts, sorted({*cuts, *tail})):
        out, cache = run(rule, qkv, chunks, impl=impl, max_length=reserve)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        layer = cache.paged[0]
        page = PAGE * 2 * HEAD_DIM * 4
        held = sum(span.page_count(length) for span in rule) * batch
        assert layer.held_bytes() == held * page
        if reserve is None:
            assert held * page <= layer.allocated_bytes() <= (held + 2 * groups * batch) * page
        else:
            reserved = sum(sum(span.reserved_pages(reserve)) for span in rule) * batch
            assert layer.allocated_bytes() == reserved * page


def test_padding_on_either_side_changes_nothing() -> None:
    each_impl(padding_on_either_side)


def padding_on_either_side(data: st.DataObject, impl: str) -> None:
    groups, share = 2, 2
    rule = data.draw(st.lists(spans, min_size=groups, max_size=groups))
    length = data.draw(st.integers(2, TOKENS[impl]))
    reserve = data.draw(st.sampled_from([None, length]))
    qkv = random_qkv(4, groups, share, length, data.draw(st.integers(0, 99)))
    mask = torch.ones(4, length, dtype=torch.bool)
    left, right = data.draw(st.integers(0, length - 1)), data.draw(st.integers(0, length - 1))
    mask[0, :left] = False
    mask[1, length - right :] = False
    mask[3, 1::3] = False  # padding between tokens
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4)))
    poisoned: Any = tuple(tensor.masked_fill(~mask[:, None, :, None], float("nan")) for tensor in qkv)
    out, cache = run(rule, poisoned, cuts, mask, impl, reserve)
    for row in range(4):
        alone: Any = tuple(tensor[row : row + 1, :, mask[row]] for tensor in qkv)
        torch.testing.assert_close(out[row : row + 1, :, mask[row]], naive(alone, rule), rtol=1e-4, atol=1e-5)
    cache.synchronize()
    assert cache.paged[0].lengths == mask.sum(1).tolist() and cache.get_seq_length() == length
    assert cache.lengths is not None and cache.lengths.tolist() == mask.sum(1).tolist()


@pytest.mark.parametrize("impl", IMPL_NAMES)
def test_decode_ignores_what_lies_in_unused_slots(impl: str) -> None:
    rule = [Span(4, 100, 0.0), Span()]
    qkv = random_qkv(1, 2, 2, 150, seed=3)
    _, cache = run(rule, qkv, [])
    pages, lengths = state_of(cache).pages(), torch.tensor([150], dtype=torch.int32)
    clean = IMPLS[impl].decode(qkv[0][:, :, -1], pages, lengths, rule)
    torch.testing.assert_close(clean, naive(qkv, rule)[:, :, -1], rtol=1e-4, atol=1e-5)
    keys, values = pages.keys.clone(), pages.values.clone()
    for group, span in enumerate(rule):
        for number in span.pages(150):
            slots = number * PAGE + torch.arange(PAGE)
            hidden = ~span.visible(torch.tensor(149), slots)
            keys[pages.table[0, group, number], hidden] = float("nan")
            values[pages.table[0, group, number], hidden] = float("nan")
    poisoned = IMPLS[impl].decode(qkv[0][:, :, -1], Pages(keys, values, pages.table), lengths, rule)
    assert torch.equal(poisoned, clean)


@pytest.mark.parametrize(("share", "length", "dim"), [(1, 77, 8), (2, 130, 24), (7, 33, 16)])
def test_kernel_gradients_are_those_of_the_reference(share: int, length: int, dim: int) -> None:
    rule = [Span(4, 20, 0.25), Span(), Span(70, -5, 0.5), Span(0, 9, 0.0, PAGE)]
    rows = Rows((0, 0), (0, 5), (length, length - 12))  # the second sequence is padded on both sides
    generator = torch.Generator(DEVICE).manual_seed(length)
    make = lambda heads: torch.randn(2, heads, length, dim, generator=generator)  # noqa: E731
    qkv = [make(len(rule) * share), make(len(rule)), make(len(rule))]
    weight = torch.randn(2, len(rule) * share, length, dim, generator=generator)
    found = []
    for impl in ("reference", "triton"):
        leaves = [tensor.clone() for tensor in qkv]
        if impl == "triton":
            for tensor in leaves:
                tensor[1, :, :5] = tensor[1, :, length - 7 :] = float("nan")
        for tensor in leaves:
            tensor.requires_grad_()
        out = IMPLS[impl].prefill(*leaves, rule, rows=rows)
        found.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    for expected, tensor in zip(*found, strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_the_masked_softmax() -> None:
    rule = [Span(4, 20, 0.25), Span()]
    qkv: Any = [tensor.double().requires_grad_() for tensor in random_qkv(2, 2, 2, 77, seed=5)]
    weight = torch.randn(2, 4, 77, HEAD_DIM, dtype=torch.double)
    expected = torch.autograd.grad((naive(qkv, rule) * weight).sum(), qkv)
    found = torch.autograd.grad((prefill(qkv[0], qkv[1], qkv[2], rule) * weight).sum(), qkv)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_window_frees_its_pages_and_the_pool_does_not_grow() -> None:
    rule = [Span(4, 256, 0.0)]
    cache = PagedCache([kinds_of(rule)])
    layer = cache.paged[0]
    token = torch.randn(1, 1, 1, HEAD_DIM)
    sizes = []
    for _ in range(1500):
        attend(rule, [token] * 3, cache)
        sizes.append(layer.allocated_bytes())
    page = PAGE * 2 * HEAD_DIM * 4
    assert max(sizes) <= 6 * page  # one sink page, 256 tokens over at most five pages
    assert len(state_of(cache).tables[0][0]) == rule[0].page_count(1500)


@pytest.mark.parametrize("max_length", [None, 200])
def test_a_page_is_there_until_the_step_that_hides_it_has_begun(max_length: int | None) -> None:
    rule = [Span(4, 40, 0.0, PAGE), Span(0, 1, 0.0, PAGE), Span(0, -30, 0.5, PAGE)]
    qkv = random_qkv(2, 3, 1, 200, seed=6)
    mask = torch.ones(2, 200, dtype=torch.bool)
    mask[1, :9] = False
    out, cache = run(rule, [x[:, :, :125] for x in qkv], [], mask[:, :125], max_length=max_length)
    outputs, left = [out], []
    for column in range(125, 200):
        state = state_of(cache)
        pages = state.pages()
        for row, length in enumerate(state.lengths):
            for group, span in enumerate(rule):
                old, new = span.boundary(length - 1), span.boundary(length)
                if new > old:  # what is hidden from the next token on, a whole page
                    assert new - old == PAGE and length % PAGE == 0
                    place, start = pages.table[row, group, old // PAGE], old + 9 * row
                    assert torch.equal(pages.keys[place], qkv[1][row, group, start : start + PAGE])
                    assert torch.equal(pages.values[place], qkv[2][row, group, start : start + PAGE])
                    left.append((row, group, old))
        outputs.append(attend(rule, [x[:, :, column : column + 1] for x in qkv], cache, impl="reference"))
    assert left == [(0, 1, 64), (0, 2, 0), (1, 1, 64), (1, 2, 0), (0, 0, 64), (0, 1, 128)]
    found = torch.cat(outputs, dim=2)
    for row in range(2):
        alone: Any = tuple(x[row : row + 1, :, mask[row]] for x in qkv)
        torch.testing.assert_close(found[row : row + 1, :, mask[row]], naive(alone, rule), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("max_length", [None, 256])
def test_sequences_can_be_selected_repeated_and_reordered(max_length: int | None) -> None:
    rule = [Span(4, 40, 0.0), Span()]
    qkv = random_qkv(3, 2, 1, 200, seed=7)
    _, cache = run(rule, qkv, [], max_length=max_length)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    order = [2, 0, 0]
    more = random_qkv(3, 2, 1, 1, seed=8)
    out = attend(rule, more, cache)
    whole: Any = [torch.cat([old[order], new], dim=2) for old, new in zip(qkv, more, strict=True)]
    torch.testing.assert_close(out, naive(whole, rule)[:, :, -1:], rtol=1e-4, atol=1e-5)
    cache.batch_select_indices(torch.tensor([True, False, True]))
    assert cache.paged[0].lengths == [201, 201]
    cache.batch_repeat_interleave(2)
    assert cache.paged[0].lengths == [201] * 4
    assert max_length is not None or cache.held_bytes() == cache.allocated_bytes()


def test_what_a_paged_cache_cannot_do_it_refuses() -> None:
    cache = PagedCache([kinds_of([Span()])])
    with pytest.raises(ValueError, match="cannot be offloaded"):
        cache.paged[0].offload()
    with pytest.raises(RuntimeError, match="only inside a model"):
        query, key, value = random_qkv(1, 1, 1, 2, 0)
        plan_attention(Module([Span()]), query, key, value, None)
    token = torch.randn(2, 1, 1, HEAD_DIM)
    cache.update(token, token, 0)
    with pytest.raises(ValueError, match="batch size: expected 2 as cached, got 1"):
        cache.update(token[:1], token[:1], 0)
    assert set(IMPLS) == {"reference", "triton", "fla", "flash"}


@pytest.mark.parametrize("impl", IMPL_NAMES)
def test_a_step_before_any_token_gives_nothing(impl: str) -> None:
    query, key, _ = random_qkv(2, 1, 2, 1, seed=0)
    state = PagedState([Span()])
    state.begin(key, key)
    lengths = torch.zeros(2, dtype=torch.int32)
    out, lse = IMPLS[impl].decode(query[:, :, 0], state.pages(), lengths, [Span()], keep_lse=True)
    assert bool((out == 0).all()) and bool((lse == float("-inf")).all())
    reweighted = ScoreFunction(name="lssar", power=3)
    out = IMPLS[impl].decode(query[:, :, 0], state.pages(), lengths, [Span()], scores=reweighted)
    assert out.shape == (2, 2, HEAD_DIM) and bool((out == 0).all())


def test_a_reserved_cache_says_when_it_is_full() -> None:
    qkv = random_qkv(1, 1, 1, 20, seed=0)
    with pytest.raises(ValueError, match="reserved for 10 tokens, and a sequence comes to 20"):
        run([Span()], qkv, [], max_length=10)


def test_the_interpreter_is_not_taken_by_itself() -> None:
    query = torch.zeros(1, 1, 1, 8, device="cpu")
    assert choose_impl("auto", query) is IMPLS["reference"]
    assert choose_impl("triton", query.to(DEVICE)) is IMPLS["triton"]
    with pytest.raises(ValueError, match="head size 256, and this one is 512"):
        choose_impl("triton", torch.zeros(1, 1, 1, 512, device=DEVICE))
    with pytest.raises(ValueError, match="flash was asked for, but"):
        choose_impl("flash", query)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_a_pass_in_inference_mode_leaves_nothing_that_gradients_refuse(impl: str) -> None:
    spans = [Span(7, 19, 0.25), Span(2, 23, 0.0)]  # of no other test, so that the tables of the rules are made here
    query, key, value = torch.randn(1, 4, 40, 16), torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16)
    with torch.inference_mode():
        before = IMPLS[impl].prefill(query, key, value, spans)
    query.requires_grad_()
    out = IMPLS[impl].prefill(query, key, value, spans)
    out.sum().backward()
    assert torch.equal(out.detach(), before)
    assert query.grad is not None and bool(query.grad.isfinite().all())
