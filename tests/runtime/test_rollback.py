"""Tokens that are taken back from the cache: within the slack it is as if they had never been given."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.models.planned import planned_model
from compress.plan import uniform_plan
from compress.runtime.impl import IMPLS
from compress.runtime.paged_cache import PagedCache
from compress.runtime.pages import Pages
from compress.runtime.reference import Rows
from compress.runtime.span import PAGE, Span
from compress.targets.aaren import AarenGroup
from compress.targets.linear import LinearGroup
from compress.targets.retain import RetainGroup
from compress.targets.window import WindowGroup
from tests.runtime.test_paged_attention import DEVICE, HEAD_DIM, attend, kinds_of, naive, random_qkv, spans, state_of
from tests.tiny import attach_as_they_start, mixed_plan, random_ids, shape_of, tiny_model

PAGE_BYTES = PAGE * 2 * HEAD_DIM * 4
pytestmark = pytest.mark.usefixtures("on_the_gpu_where_there_is_one")


def test_passes_and_what_is_taken_back_between_them_are_one_function() -> None:
    settings(max_examples=15, deadline=None, derandomize=True)(given(st.data())(passes_and_what_is_taken_back))()


def passes_and_what_is_taken_back(data: st.DataObject) -> None:
    rule = data.draw(st.lists(spans, min_size=2, max_size=2))
    slack = data.draw(st.sampled_from([1, 20, 64, 100]))
    reserve = data.draw(st.sampled_from([None, 400]))
    source = random_qkv(2, 2, 1, 500, data.draw(st.integers(0, 99)))
    cache, kept = PagedCache([kinds_of(rule)], reserve, slack), list[int]()
    given_columns = peak = 0
    for _ in range(8):
        low = max(0, peak - slack)
        if len(kept) > low and data.draw(st.booleans()):
            count = data.draw(st.integers(1, len(kept) - low))
            cache.crop(-count)
            kept = kept[:-count]
        count = data.draw(st.sampled_from([1, 1, 7, 64, 70]))
        if given_columns + count > 400:
            break
        new = list(range(given_columns, given_columns + count))
        out = attend(rule, [x[:, :, new] for x in source], cache)
        given_columns, kept, peak = given_columns + count, kept + new, max(peak, len(kept) + count)
        expected = naive([x[:, :, kept] for x in source], rule)[:, :, -count:]
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        state = state_of(cache)
        low = max(0, peak - slack)
        pages = 2 * sum(span.page_count(len(kept), low) for span in rule)
        assert cache.held_bytes() == pages * PAGE_BYTES
        assert pages <= 2 * sum(span.page_count(len(kept), len(kept) - slack) for span in rule)
        assert state.keys is not None and state.values is not None
        if reserve is None:
            state.keys[state._free] = float("nan")  # what is freed may hold anything
            state.values[state._free] = float("nan")
        else:
            reserved = 2 * sum(sum(span.reserved_pages(reserve, slack)) for span in rule)
            assert cache.allocated_bytes() == reserved * PAGE_BYTES


def test_all_of_the_slack_can_be_taken_back_at_every_length() -> None:
    """Where a page leaves the window with the first token that stays, too; one token more is refused there."""
    rule, slack = [Span(0, 40, 0.0)], 20
    source, refused = random_qkv(1, 1, 1, 200, 3), 0
    for length in range(120, 180):
        cache, short = PagedCache([kinds_of(rule)], slack=slack), PagedCache([kinds_of(rule)], slack=slack)
        for one in (cache, short):
            attend(rule, [x[:, :, :length] for x in source], one)
        cache.crop(-slack)
        again = attend(rule, [x[:, :, length - slack : length] for x in source], cache)
        expected = naive([x[:, :, :length] for x in source], rule)[:, :, -slack:]
        torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)
        try:
            short.crop(-slack - 1)
        except ValueError:
            refused += 1
    assert refused == 1


@pytest.mark.parametrize("slack", [0, 33, 70])
def test_the_kernel_stores_what_the_reference_stores(slack: int) -> None:
    rule = [Span(4, 20, 0.0), Span(0, -30, 0.5)]
    _, key, value = random_qkv(1, 2, 1, 200, 0)
    cache = PagedCache([kinds_of(rule)], slack=slack)
    attend(rule, [x[:, :, :190] for x in (key, key, value)], cache)
    pages = state_of(cache).pages()
    found = []
    for impl in ("reference", "triton"):
        written = Pages(pages.keys.clone(), pages.values.clone(), pages.table)
        IMPLS[impl].store(key, value, written, Rows((0,), (0,), (190,)), rule, slack)
        found.append((written.keys, written.values))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(found[0][0][pages.table[0, 0, 2], :62], key[0, 0, 128:190])


def test_pages_of_a_span_stay_for_the_slack() -> None:
    """By the rule itself: what is held is what any query from `low` on sees."""
    for span in (Span(4, 100, 0.0), Span(130, -70, 0.5), Span(0, 9, 0.0, PAGE), Span(0, -40, 1.0), Span()):
        for slack in (0, 1, 63, 64, 150):
            for length in (1, 64, 65, 200, 329, 700):
                low = max(1, length - slack)
                wanted = set().union(*(span.pages(u) for u in range(low, length + 1)))
                held = span.pages(length, length - slack)
                assert set(held) >= wanted and span.page_count(length, length - slack) == len(held)
                assert len(held) <= len(span.pages(length)) + -(-slack // PAGE)
                until = span.same_pages_until(length, length - slack, slack)
                assert span.pages(until, until - slack) == held
                assert span.pages(until + 1, until + 1 - slack) != held or until > 2**30


@pytest.fixture(scope="module")
def dense() -> Any:
    return tiny_model("llama-gqa").to(DEVICE)


@pytest.fixture(scope="module")
def model(dense: Any) -> Any:
    return planned_model(dense, mixed_plan(shape_of(dense)))


@torch.no_grad()
@pytest.mark.parametrize("max_length", [None, 260])
def test_what_is_taken_back_from_a_padded_batch_leaves_nothing(model: Any, max_length: int | None) -> None:
    ids, mask = random_ids(2, 250).to(DEVICE), torch.ones(2, 250, dtype=torch.long)
    mask[0, :30] = 0
    mask[1, 205:212] = 0  # some of what is taken back is no token
    cache = model.new_cache(max_length, slack=20)
    model(ids[:, :200], attention_mask=mask[:, :200], past_key_values=cache)
    for start, stop, back in ((200, 210, 7), (203, 221, 17), (204, 205, 0)):
        model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
        before = copy.deepcopy(cache)
        cache.crop(-back)
        assert cache.get_seq_length() == stop - back
        if back:  # as transformers said it before 5.24
            before.crop(stop - back)
            assert before.lengths.tolist() == cache.lengths.tolist()
    assert cache.lengths.tolist() == mask[:, :205].sum(1).tolist()
    now = torch.cat([mask[:, :205], torch.ones(2, 45, dtype=torch.long)], dim=1)
    rest = model(ids[:, 205:], attention_mask=now, past_key_values=cache).logits
    whole = model(ids, attention_mask=now, use_cache=False).logits
    torch.testing.assert_close(rest, whole[:, 205:], rtol=1e-4, atol=1e-4)
    if max_length is None:
        assert cache.allocated_bytes() <= cache.held_bytes() + 2 * 6 * PAGE * 2 * 12 * 4


@torch.no_grad()
def test_masks_of_ones_alone_may_come_in_chunks_behind_a_step_and_be_taken_back(model: Any) -> None:
    ids, cache = random_ids(1, 150).to(DEVICE), model.new_cache(150, slack=20)
    for stop, back in ((90, 0), (91, 0), (110, 0), (120, 15), (125, 20), (150, 0)):
        start = cache.get_seq_length()
        rest = model(ids[:, start:stop], attention_mask=torch.ones(1, stop), past_key_values=cache).logits
        cache.crop(-back)
        assert cache.lengths.tolist() == [stop - back]
    whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(rest, whole[:, 105:], rtol=1e-4, atol=1e-4)


def test_without_slack_what_is_still_there_can_be_taken_back(model: Any) -> None:
    ids, cache = random_ids(1, 300).to(DEVICE), model.new_cache()
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
        cache.crop(-30)
        cache.crop(0)
        cache.crop(11)  # more than there are
        rest = model(ids[:, 10:], past_key_values=cache).logits
        torch.testing.assert_close(rest, model(ids, use_cache=False).logits[:, 10:], rtol=1e-4, atol=1e-4)
        before = copy.deepcopy(cache)
        with pytest.raises(
            ValueError, match=r"crop: 200 tokens cannot be taken back from the `\w+` groups of layer 0: of.*slack=...\)"
        ):
            cache.crop(-200)
        with pytest.raises(ValueError, match="301 tokens cannot be taken back from a cache of 300"):
            cache.crop(-301)
        more = [model(ids[:, :5], past_key_values=each).logits for each in (cache, before)]
        assert torch.equal(*more)  # what was refused has left nothing
    assert not cache.is_croppable and model.new_cache(slack=1).is_croppable
    assert PagedCache([kinds_of([Span()] * 2)]).is_croppable  # what no window hides stays by itself


ONE_WAY = {
    "linear": LinearGroup(),
    "aaren": AarenGroup(),
    "retain": RetainGroup(sink=4, alpha=64, beta=0.0, scorer="key_norm", threshold=None, cap=(8.0, 0.0)),
}


@pytest.mark.parametrize("name", ONE_WAY)
def test_states_that_cannot_go_back_are_refused_by_name(dense: Any, name: str) -> None:
    groups = (WindowGroup(sink=4, alpha=64, beta=0.0), ONE_WAY[name])
    dense = copy.deepcopy(dense)
    attach_as_they_start(dense, groups)
    planned = planned_model(dense, mixed_plan(shape_of(dense), groups))
    with pytest.raises(
        ValueError, match=rf"no token can be taken back from the `{name}` groups of layer 0: .*would need"
    ):
        planned.new_cache(slack=8)
    ids = random_ids(1, 20).to(DEVICE)
    for target, assistant in ((planned, dense), (dense, planned)):
        with pytest.raises(ValueError, match=f"assisted decoding takes tokens back .*`{name}` groups"):
            target.generate(ids, assistant_model=assistant, max_new_tokens=4)
    cache = planned.new_cache()
    planned(ids, past_key_values=cache)
    with pytest.raises(ValueError, match=f"cannot be taken back from the `{name}` groups") as caught:
        cache.crop(-1)
    assert "slack" not in str(caught.value)  # which is refused as well


def test_a_reserved_cache_takes_back_what_it_was_made_for(model: Any) -> None:
    with pytest.raises(ValueError, match="expected 0 or more tokens, got -1"):
        model.new_cache(slack=-1)
    cache = model.new_cache(max_length=60, slack=4)
    model(random_ids(1, 50).to(DEVICE), past_key_values=cache)
    cache.hold(3)
    with pytest.raises(ValueError, match="reserved for taking 4 tokens back, and 5 were asked for"):
        cache.hold(5)


@torch.no_grad()
@pytest.mark.parametrize("asked", [-3, 50])
def test_steps_that_only_the_device_has_counted_are_taken_back(model: Any, asked: int) -> None:
    ids, cache = random_ids(1, 60).to(DEVICE), model.new_cache(60, slack=10)
    model(ids[:, :50], past_key_values=cache)
    for start in range(50, 53):
        model(ids[:, start : start + 1], past_key_values=cache)
    for layer in cache.paged:  # replays of a CUDA graph leave the host where it was
        layer.count([50], 50)
    cache.crop(asked)
    assert cache.get_seq_length() == 50 and cache.lengths.tolist() == [50]
    rest = model(ids[:, 50:], past_key_values=cache).logits
    torch.testing.assert_close(rest, model(ids, use_cache=False).logits[:, 50:], rtol=1e-4, atol=1e-4)


def test_windows_by_the_length_of_the_input_are_not_assisted(dense: Any) -> None:
    by_length = planned_model(
        dense, uniform_plan(shape_of(dense), WindowGroup(sink=4, alpha=30, beta=0.25, rule="length"))
    )
    with pytest.raises(ValueError, match=r"checks several tokens in a pass, .*`rule: length`"):
        by_length.generate(random_ids(1, 20).to(DEVICE), prompt_lookup_num_tokens=3, max_new_tokens=4)


@pytest.mark.parametrize("static", [{}, {"cache_implementation": "static"}], ids=["growing", "reserved"])
def test_assisted_text_is_the_greedy_text(dense: Any, model: Any, static: dict[str, Any]) -> None:
    ids = random_ids(1, 150).to(DEVICE)
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}
    for target in (model,) if static else (model, dense):
        expected = target.generate(ids, **options)
        for assistant in (model, dense):
            # Drafts become longer.
            assistant.generation_config.update(num_assistant_tokens=3, num_assistant_tokens_schedule="heuristic")
            found = target.generate(ids, assistant_model=assistant, **options, **static)
            assert torch.equal(found, expected)
    twice = torch.cat([ids, ids[:, :40]], dim=1)  # something to look up
    expected = model.generate(twice, **options)
    assert torch.equal(model.generate(twice, prompt_lookup_num_tokens=5, **options, **static), expected)
    if not static:
        assert torch.equal(model.generate(ids, assistant_early_exit=1, **options), model.generate(ids, **options))
        cache = model.new_cache(slack=2)
        model.generate(twice, prompt_lookup_num_tokens=5, past_key_values=cache, **options)
        assert cache.slack == 5
