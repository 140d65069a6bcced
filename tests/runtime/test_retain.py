"""Heads that keep tokens against one mask of all pairs: ragged batches, chunks, decoding, caps, bytes and gradients."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from compress.runtime.mixer import Kinds, LayerFacts
from compress.runtime.mixer_retain import RetainMixer
from compress.runtime.paged_cache import PagedCache
from compress.runtime.retain_reference import keep
from compress.runtime.retain_state import RetainState
from compress.runtime.step import Step
from compress.targets.retain import RetainGroup
from tests.runtime.test_linear_mixer import feed, tokens_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GROUPS, SHARE, DIM, HIDDEN, ROWS = 2, 2, 8, 4, 3
FACTS = LayerFacts(0, DIM, HIDDEN, SHARE, None)
PAGE_BYTES = 64 * (2 * DIM * 8 + 1)  # of a cache in float64, with a flag for every token
COUNTERS = GROUPS * 2 * 4  # of a sequence


def random_group(draw: random.Random, scorer: str) -> RetainGroup:
    """Small windows, so that most tokens leave them."""
    beta = draw.choice([0.0, 0.0, draw.randrange(1024) / 1024])
    cap = draw.choice([None, (draw.randrange(70), draw.choice([0.0, draw.randrange(1025) / 1024]))])
    level = draw.uniform(*{"value_norm": (0.7, 1.3), "key_norm": (-1.3, -0.7), "ridge": (-1.0, 1.0)}[scorer])
    return RetainGroup(
        sink=draw.choice([0, 0, 4, 70]),
        alpha=draw.randrange(-60 if beta else 1, 150),
        beta=beta,
        scorer=scorer,
        threshold=draw.choice([None, level, level, level, 1e30]),
        share=0.5,
        cap=cap,
    )


def scores_of(mixer: RetainMixer, number: int, sequence: list[torch.Tensor]) -> torch.Tensor:
    """What the scorer says of the tokens of one sequence and group, from its formula."""
    key, value, hidden = sequence[1][number], sequence[2][number], sequence[3]
    norms = {"key_norm": -key.norm(dim=-1).log(), "value_norm": value.norm(dim=-1).log()}
    if (name := mixer.groups[0]["scorer"]) in norms:
        return norms[name]
    weight, scalars, bias = (parameter[number].double() for parameter in mixer.parameters())
    place = torch.arange(1, len(key) + 1, device=key.device, dtype=torch.float64).log()
    beside = scalars[0] * place - scalars[1] * norms["key_norm"] + scalars[2] * norms["value_norm"]
    return hidden @ weight + beside + bias


def naive_kept(group: RetainGroup, score: torch.Tensor) -> list[bool]:
    """Which tokens of one sequence and group are kept, from the rule as it is written."""
    sink, count, kept = -(-group.sink // 64) * 64, 0, []
    for j, one in enumerate(score.tolist()):
        most = j + 1 if group.cap is None else group.cap[0] + int(group.cap[1] * (j + 1))
        chosen = j >= sink and (group.threshold is None or one >= group.threshold) and count < most
        count += chosen
        kept.append(chosen or j < sink)
    return kept


def first_of(group: RetainGroup, t: int) -> int:
    """First key in the window of the query at t."""
    asked = t // 64 * 64
    return max(0, asked + 1 - max(1, int((group.alpha + group.beta * (asked + 1)) // 1))) // 64 * 64


NO_SCORES: tuple[Any, Any] = (None, None)


def naive(
    mixer: RetainMixer, sequence: list[torch.Tensor], scores: tuple[Any, Any] = NO_SCORES
) -> tuple[torch.Tensor, int]:
    """Outputs `[H, T, D]` of one sequence of tokens alone, and the pages that it holds at the end."""
    (query, key, value, _), (cap, extra) = sequence, scores
    tokens, outputs, pages = query.shape[1], [], 0
    at = torch.arange(tokens, device=query.device)
    for number, entry in enumerate(mixer.groups):
        group = RetainGroup.model_validate(entry)
        kept = naive_kept(group, scores_of(mixer, number, sequence))
        first = torch.tensor([first_of(group, t) for t in range(tokens)], device=query.device)
        flags = torch.tensor(kept, device=query.device, dtype=torch.bool)
        seen = (at <= at[:, None]) & (flags | (at >= first[:, None]))
        for head in range(number * SHARE, (number + 1) * SHARE):
            logits = query[head] @ key[number].T * DIM**-0.5
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            mass = logits.exp() * seen
            total = mass.sum(-1, keepdim=True) + (0 if extra is None else extra[head].exp())
            outputs.append(mass @ value[number] / total)
        if tokens:
            start = first_of(group, tokens - 1)
            pages += -(-sum(kept[:start]) // 64) + -(-tokens // 64) - start // 64
    return torch.stack(outputs), pages


def inputs(columns: int, seed: int, draw: random.Random) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Query, key, value and hidden states of three sequences, and which columns are tokens; the others hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(ROWS, columns, dtype=torch.bool)
    mask[1, : draw.randrange(columns)] = False
    if draw.random() < 0.5:
        mask[2, draw.randrange(1, columns) :] = False
    else:
        mask[2] = torch.rand(columns, generator=generator) < 0.8
    shapes = [(ROWS, heads, columns, DIM) for heads in (GROUPS * SHARE, GROUPS, GROUPS)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    made = [x.masked_fill(~mask[:, None, :, None], torch.nan).to(DEVICE) for x in made]
    hidden = torch.randn(ROWS, columns, HIDDEN, generator=generator, dtype=torch.float64)
    made.append(hidden.masked_fill(~mask[..., None], torch.nan).to(DEVICE))
    return made, mask.to(DEVICE)


def kinds_of(groups: list[RetainGroup]) -> tuple[Kinds, RetainMixer]:
    """The mixer of a layer, with parameters of which none is where it starts."""
    kinds = Kinds([group.model_dump(mode="json") for group in groups], FACTS)
    assert isinstance(kinds.only, RetainMixer)
    generator = torch.Generator().manual_seed(1)
    for parameter in kinds.only.to(DEVICE).parameters():
        parameter.requires_grad_(False).copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return kinds, kinds.only


def cuts_of(draw: random.Random, columns: int) -> list[int]:
    """Chunks of any sizes, some of them single tokens, across the start of a page where there is one."""
    cuts = {0, columns, *(draw.randrange(columns + 1) for _ in range(draw.randrange(4)))}
    if draw.random() < 0.5:
        start = draw.choice([max(0, 64 * draw.randrange(1, 6) - 1), draw.randrange(columns)])
        cuts |= {min(columns, start + step) for step in range(4)}
    return sorted(cuts)


@pytest.mark.parametrize("part", range(10))
def test_every_way_to_the_end_is_the_mask_of_all_pairs(part: int) -> None:
    for seed in range(20 * part, 20 * (part + 1)):
        draw = random.Random(seed)
        scorer = draw.choice(["value_norm", "key_norm", "ridge"])
        groups, columns = [random_group(draw, scorer) for _ in range(GROUPS)], draw.randrange(1, 400)
        made, mask = inputs(columns, seed, draw)
        (kinds, mixer), cuts = kinds_of(groups), cuts_of(draw, columns)
        reserve = draw.choice([None, columns, columns + 70])
        cache = PagedCache([kinds], reserve) if draw.random() < 0.8 else None
        cuts = cuts if cache is not None else [0, columns]
        with torch.no_grad():
            found, pages = feed(kinds, cache, made, mask, cuts), 0
            for row in range(ROWS):
                expected, held = naive(mixer, tokens_of(made, mask, row))
                torch.testing.assert_close(found[row][:, mask[row]], expected, rtol=1e-8, atol=1e-9)
                assert bool((found[row][:, ~mask[row]] == 0).all())
                pages += held
        if cache is not None:
            assert cache.held_bytes() == pages * PAGE_BYTES + ROWS * COUNTERS, (seed, groups)
            if reserve is None:
                assert cache.allocated_bytes() == cache.held_bytes()


def test_of_equal_scores_those_at_the_threshold_are_kept() -> None:
    """Until a cap is met. Thresholds that a preparation measures are scores of tokens, so ties are no accident."""
    draw = random.Random(0)
    for cap in (None, (0, 0.25), (7, 0.0), (3, 0.125), (0, 1.0), (0, 0.0)):
        for sink in (0, 64):
            group = RetainGroup(sink=sink, alpha=1, scorer="value_norm", threshold=0.0, share=0.5, cap=cap)
            score = torch.tensor([draw.choice([-1.0, 0.0, 0.0, 1.0]) for _ in range(150)])
            most = torch.tensor([[1 << 40, 0] if cap is None else [cap[0], int(cap[1] * 1024)]])
            given = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1), torch.tensor([sink]), most
            kept, count = keep(score[None, None], torch.arange(150)[None], *given)
            expected = naive_kept(group, score)
            assert kept[0, 0].tolist() == expected and int(count) == sum(expected[sink:])


# Half of the tokens behind the sinks are kept, in the second group no more than every fourth.
HALF = [
    RetainGroup(sink=4, alpha=20, scorer="value_norm", threshold=1.0, share=0.5),
    RetainGroup(sink=0, alpha=1, beta=0.125, scorer="value_norm", threshold=0.9, share=0.25, cap=(3, 0.25)),
]
COLUMNS = 330


@pytest.fixture(scope="module")
def case() -> tuple[list[torch.Tensor], torch.Tensor]:
    return inputs(COLUMNS, 0, random.Random(1))


@pytest.mark.parametrize("turn", [0, 200])  # a pass without a cache, and a turn behind what is cached
def test_gradients_are_those_of_the_mask(turn: int, case: tuple[list[torch.Tensor], torch.Tensor]) -> None:
    made, mask = case
    scores: Any = (2.0, torch.linspace(-1, 1, GROUPS * SHARE, dtype=torch.float64, device=DEVICE))
    (kinds, mixer), leaves = kinds_of(HALF), [x.clone().requires_grad_() for x in made]
    cache = PagedCache([kinds]) if turn else None
    with torch.no_grad():
        if cache is not None:
            feed(kinds, cache, made, mask, [0, turn], scores)
    found = feed(kinds, cache, leaves, mask, [turn, COLUMNS], scores)
    expected = loss = torch.zeros((), dtype=torch.float64, device=DEVICE)
    generator = torch.Generator().manual_seed(5)
    for row in range(ROWS):
        late = mask[row, turn:]
        part = naive(mixer, tokens_of(leaves, mask, row), scores)[0][:, int(mask[row, :turn].sum()) :]
        torch.testing.assert_close(found[row][:, late], part, rtol=1e-8, atol=1e-9)
        weight = torch.randn(part.shape, generator=generator, dtype=torch.float64).to(DEVICE)
        expected, loss = expected + (part * weight).sum(), loss + (found[row][:, late] * weight).sum()
    wanted, got = (torch.autograd.grad(one, leaves[:3]) for one in (expected, loss))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a[:, :, turn:], b[:, :, turn:], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(("way", "reserve"), [("reordered", None), ("reordered", COLUMNS), ("filled", COLUMNS)])
def test_sequences_are_copied_with_their_lists(
    way: str, reserve: int | None, case: tuple[list[torch.Tensor], torch.Tensor]
) -> None:
    made, mask = case
    (kinds, mixer), order, turn, pages = kinds_of(HALF), torch.tensor([2, 0, 0, 1], device=DEVICE), 260, 0
    cache = PagedCache([kinds], reserve)
    with torch.no_grad():
        if way == "reordered":
            feed(kinds, cache, made, mask, [0, 130, turn])
            cache.batch_select_indices(order)
        else:  # put together of single sequences
            for row, one in enumerate(order.tolist()):
                single = PagedCache([kinds], reserve)
                feed(kinds, single, [x[one : one + 1] for x in made], mask[one : one + 1], [0, turn])
                cache.paged[0].fill(row, single.paged[0], len(order))
            lengths = mask[order, :turn].sum(1)
            cache.lengths, cache.width = lengths.int(), torch.tensor([turn], dtype=torch.int32, device=DEVICE)
            cache.paged[0].count(lengths.tolist(), turn)
        again = [x[order] for x in made]
        found = feed(kinds, cache, again, mask[order], [turn, *range(turn + 1, turn + 9), COLUMNS])
        for row, one in enumerate(order.tolist()):
            expected, held = naive(mixer, tokens_of(made, mask, one))
            late = mask[one, turn:]
            expected = expected[:, int(mask[one, :turn].sum()) :]
            torch.testing.assert_close(found[row][:, late], expected, rtol=1e-8, atol=1e-9)
            pages += held
    assert cache.held_bytes() == pages * PAGE_BYTES + len(order) * COUNTERS
    assert reserve is not None or cache.allocated_bytes() == cache.held_bytes()


class _NoWaiting(TorchDispatchMode):
    """Refuses what has to know numbers of the device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"), name
        if name in ("index", "index_put_", "index_put"):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), name
        return function(*args, **kwargs or {})


def test_a_reserved_step_waits_for_no_device(case: tuple[list[torch.Tensor], torch.Tensor]) -> None:
    """But for the attention and the store of the reference, whose kernels do not either."""
    made, mask = case
    kinds, mixer = kinds_of(HALF)
    cache = PagedCache([kinds], COLUMNS + 1)
    with torch.no_grad():
        feed(kinds, cache, made, mask, [0, COLUMNS - 1])
        state, stored = cache.paged[0].states[0], []
        assert isinstance(state, RetainState)
        before = state.tensors["listed"].clone()
        lengths = torch.tensor([COLUMNS, 0, 321], dtype=torch.int32, device=DEVICE)  # one more page leaves in the last
        step = Step(cache, None, None, lengths, None, 1)
        key, value = (x[:, :, :1].nan_to_num() for x in made[1:3])
        with _NoWaiting():
            kept, count = mixer.kept(key, value, state, step)
            state.leave(lengths, None)
            state.store_one(key[:, :, 0], value[:, :, 0], kept[:, :, 0], lengths, lambda *given: stored.append(given))
            state.pages()
        assert len(stored) == 1 and count.shape == (ROWS, GROUPS)
        assert not torch.equal(state.tensors["listed"], before)


def test_a_cache_is_assumed_to_keep_what_its_groups_expect(case: tuple[list[torch.Tensor], torch.Tensor]) -> None:
    made, mask = case
    kinds, _ = kinds_of(HALF)
    cache = PagedCache([kinds], 4096)
    with torch.no_grad():
        feed(kinds, cache, made, mask, [0, 100])
    cache.assume(4000)
    state = cache.paged[0].states[0]
    # The first window starts at page 61, the second at page 54; behind the sink every second and fourth token is kept.
    assert state.tensors["listed"].tolist() == [[64 + (61 * 64 - 64) // 2, 54 * 64 // 4]] * ROWS
    assert state.lengths == [4000] * ROWS and cache.get_seq_length() == 4000


def test_a_reserved_list_has_room_for_all_that_a_cap_lets_in_and_for_no_more() -> None:
    draw = random.Random(5)
    for _ in range(60):
        group = random_group(draw, "ridge").model_copy(update={"threshold": None})
        length = draw.choice([64, 65, 128, 129, 190, 257, 700])
        state = RetainState([group.span()], [group.cap], [group.share], length)
        hidden = first_of(group, length - 1)
        kept, sink = naive_kept(group, torch.zeros(length)), group.span().sink
        most = sum(kept[:hidden])
        assert state.most_listed(0, length) == most
        state.begin(*[torch.zeros(2, 1, 1, DIM, dtype=torch.float64)] * 2)
        listed, window = -(-most // 64), state.spans[0].reserved_pages(length)[1]
        assert state.allocated_bytes() == 2 * ((listed + window) * PAGE_BYTES + 2 * 4)
        assert state.pages().table.shape == (2, 1, listed + -(-length // 64))
        state.assume(length)
        expected = min(hidden, sink)
        expected += min(round(group.share * (hidden - expected)), most - expected)
        assert state.tensors["listed"].tolist() == [[expected]] * 2
        count = min(round(group.share * max(0, length - sink)), sum(kept[sink:]))
        assert state.tensors["count"].tolist() == [[count]] * 2
