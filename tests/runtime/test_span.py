"""The span rule: what it sees, that its edge never moves back, and which pages it holds."""

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.runtime.span import BETA_UNIT, FULL, PAGE, Span, native_windows, span_of

spans = st.builds(
    Span,
    sink=st.integers(0, 200),
    alpha=st.integers(-300, 500),
    beta=st.integers(0, BETA_UNIT).map(lambda units: units / BETA_UNIT),
    granule=st.sampled_from([1, PAGE]),
)


def row_of(span: Span, t: int, length: int) -> list[bool]:
    """What the query at t sees of `length` keys, as the rule's docstring states it, in exact rational arithmetic."""
    from fractions import Fraction
    from math import floor

    unit = span.granule
    asked = t // unit * unit
    window = max(1, floor(span.alpha + Fraction(span.beta) * (asked + 1)))
    # A key is in sight where the first query of the granule sees a key at or before the end of the key's granule.
    return [
        j <= t and (j // unit < -(-span.sink // unit) or asked - (j // unit * unit + unit - 1) < window)
        for j in range(length)
    ]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(spans, st.integers(1, 300))
def test_mask_is_the_stated_rule(span: Span, length: int) -> None:
    positions = torch.arange(length)
    mask = span.visible(positions[:, None], positions[None, :])
    expected = torch.tensor([row_of(span, t, length) for t in range(length)])
    assert torch.equal(mask, expected)
    assert mask.diagonal().all()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(spans, st.integers(1, 300))
def test_sees_all_is_the_causal_mask(span: Span, length: int) -> None:
    t = torch.arange(length)
    assert span.sees_all(length) == torch.equal(span.visible(t[:, None], t[None, :]), t[None, :] <= t[:, None])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(spans, st.integers(0, 100_000))
def test_first_visible_key_never_moves_back(span: Span, t: int) -> None:
    assert span.first(t) <= span.first(t + 1) <= span.first(t) + span.granule
    assert span.length(t + 1) <= span.length(t) + 1
    assert int(span.first(torch.tensor(t))) == span.first(t)
    assert int(span.boundary(torch.tensor(t))) == span.boundary(t) == max(span.first(t), span.sink)
    if span.first(t + 1) != span.first(t):
        assert (t + 1) % span.granule == span.first(t + 1) % span.granule == 0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(spans, st.integers(1, 3000))
def test_pages_are_those_with_a_token_in_sight(span: Span, length: int) -> None:
    tokens = torch.arange(length)
    in_sight = span.visible(torch.tensor(length - 1), tokens)
    expected = sorted({int(j) // PAGE for j in tokens[in_sight]})
    assert span.pages(length) == expected
    assert span.page_count(length) == len(expected)


def naive_pages(sink: int, alpha: int, units: int, length: int) -> torch.Tensor:
    """The mask `[T, T]` of a rule by pages, from the words of the rule and pages of queries and keys alone."""
    pages = -(-length // PAGE)
    seen = torch.zeros(pages, pages, dtype=torch.bool)
    for page in range(pages):
        t = page * PAGE
        window = max(1, alpha + (t + 1) * units // 1024)
        oldest = min(j for j in range(t + 1) if t - j < window)
        for other in range(page + 1):
            seen[page, other] = other * PAGE < sink or other >= oldest // PAGE
    return seen.repeat_interleave(PAGE, 0).repeat_interleave(PAGE, 1)[:length, :length].tril()


def test_a_rule_by_pages_hides_what_its_cache_has_freed() -> None:
    draw = random.Random(0)
    for _ in range(200):
        sink, alpha, units = draw.choice([0, 1, 4, 64, 100]), draw.randint(-300, 300), draw.randint(0, 1024)
        length = draw.randint(1, 600)
        span = Span(sink, alpha, units / 1024, PAGE)
        t = torch.arange(length)
        mask = naive_pages(sink, alpha, units, length)
        assert torch.equal(span.visible(t[:, None], t), mask)
        assert span.sees_all(length) == torch.equal(mask, torch.ones_like(mask).tril())
        plain = Span(sink, alpha, units / 1024)
        sinks, ring = span.reserved_pages(length)
        assert ring <= max(1, plain.reserved_pages(length)[1])
        # However the tokens come, what was summed and what is held are all keys, each once, and whole pages.
        cuts = sorted(draw.sample(range(1, length), min(length - 1, draw.randint(0, 5))))
        done = span.boundary(0)
        assert done == span.sink
        for start, stop in pairwise([0, *cuts, length]):
            held = set(span.pages(start)) if start else set()
            boundary = span.boundary(stop - 1)
            assert boundary % PAGE == 0 and done <= boundary
            fresh = range(done // PAGE, boundary // PAGE)
            assert all(page in held for page in fresh if page * PAGE < start)
            if stop == start + 1:
                assert len(fresh) <= 1 and (not fresh or start % PAGE == 0)
            done = boundary
            hidden = torch.zeros(stop, dtype=torch.bool)
            hidden[min(span.sink, stop) : done] = True
            assert torch.equal(~mask[stop - 1, :stop], hidden)
            assert {*span.pages(stop)} == {int(j) // PAGE for j in (~hidden).nonzero()}
            assert len([page for page in span.pages(stop) if page >= sinks]) <= ring


def test_full_and_streaming_are_special_cases() -> None:
    assert FULL.is_full and FULL.page_count(130) == 3
    assert Span(4, 256, 0.0).pages(2048) == [0, 28, 29, 30, 31]
    assert Span(0, 10, 1.0).is_full and not Span(0, -10, 1.0).is_full


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ((-1, 0, 0.0), "sink: expected a whole number of tokens >= 0, got -1"),
        ((0, 0, 1.5), "beta: expected 0 <= beta <= 1, got 1.5"),
        ((0, 0, 0.1), "the nearest is 0.099609375"),
        ((0, 0.5, 0.0), "alpha: expected a whole number"),
        ((0, 0, 0.0, 32), "granule: expected 1 or 64 tokens, got 32"),
    ],
)
def test_impossible_parameters_are_refused(parameters: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Span(*parameters)


def test_a_full_group_keeps_the_architectures_own_window() -> None:
    assert span_of({"target": "full"}, None) == FULL
    assert span_of({"target": "full"}, 50) == Span(0, 50, 0.0)
    assert span_of({"target": "window", "sink": 4, "alpha": 8, "beta": 0.5}, 50) == Span(4, 8, 0.5)
    with pytest.raises(ValueError, match="the target 'pruned' has no span"):
        span_of({"target": "pruned"}, None)


def test_native_windows_reads_both_forms() -> None:
    class Config:
        sliding_window = 50
        layer_types: list[str] | None = None

    assert native_windows(Config(), 2) == [50, 50]
    Config.layer_types = ["full_attention", "sliding_attention"]
    assert native_windows(Config(), 2) == [None, 50]


def test_a_window_longer_than_the_model_has_positions_is_none() -> None:
    config = transformers.Phi3Config(sliding_window=4096, max_position_embeddings=4096)
    assert native_windows(config, 2) == [None, None]
    config.sliding_window = 4095
    assert native_windows(config, 2) == [4095, 4095]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(-300, 300), st.integers(0, BETA_UNIT), st.integers(0, 400), st.sampled_from([1, PAGE]))
def test_last_query_is_the_inverse_of_first(alpha: int, units: int, j: int, granule: int) -> None:
    span = Span(0, alpha, units / BETA_UNIT, granule)
    last = span.last_query(j)
    assert last >= j
    end = min(last, j + 5000)
    assert all(span.first(t) <= j for t in (j, (j + end) // 2, end))
    if last == end:
        assert span.first(last + 1) > j
    assert int(span.last_query(torch.tensor(j))) == last


@settings(max_examples=200, deadline=None, derandomize=True)
@given(spans, st.integers(1, 700))
def test_pages_stay_until_the_length_that_is_said(span: Span, length: int) -> None:
    until = span.same_pages_until(length)
    assert until >= length
    assert all(span.pages(other) == span.pages(length) for other in range(length, until + 1))
    sinks, ring = span.reserved_pages(length)
    for other in range(1, length + 1):
        sink_end, start, end = span.page_bounds(other)
        assert sink_end <= sinks and max(0, end - max(start, sinks)) <= ring
