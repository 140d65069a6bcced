"""Heads that keep tokens against one mask of all pairs: ragged batches, chunks, decoding, caps, bytes and gradients."""

from __future__ import annotations

import random

import pytest
import torch

from compress.runtime.mixer import Kinds, LayerFacts
from compress.runtime.mixer_retain import RetainMixer
from compress.runtime.paged_cache import PagedCache
from compress.targets.retain import RetainGroup
from tests.runtime.test_linear_mixer import feed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GROUPS, SHARE, DIM, HIDDEN, ROWS = 2, 2, 8, 4, 3
FACTS = LayerFacts(0, DIM, HIDDEN, SHARE, None)
PAGE_BYTES = 64 * (2 * DIM * 8 + 1)  # of a cache in float64, with a flag for every token
COUNTERS = ROWS * GROUPS * 2 * 4


def random_group(draw: random.Random, scorer: str) -> RetainGroup:
    """Small windows, so that most tokens leave them."""
    beta = draw.choice([0.0, 0.0, draw.randrange(1024) / 1024])
    cap = draw.choice([None, (draw.randrange(70), draw.choice([0.0, draw.randrange(1025) / 1024]))])
    level = draw.uniform(0.7, 1.3) * (1 if scorer == "value_norm" else -1)
    return RetainGroup(
        sink=draw.choice([0, 0, 4, 70]),
        alpha=draw.randrange(-60 if beta else 1, 150),
        beta=beta,
        scorer=scorer,
        threshold=draw.choice([-1e30, level, level, level, 1e30]),
        share=0.5,
        cap=cap,
    )


def naive_kept(group: RetainGroup, key: torch.Tensor, value: torch.Tensor) -> list[bool]:
    """Which tokens are kept, from the rule as it is written: `[T, D]` of one sequence and group."""
    score = value.norm(dim=-1).log() if group.scorer == "value_norm" else -key.norm(dim=-1).log()
    sink, count, kept = -(-group.sink // 64) * 64, 0, []
    for j, one in enumerate(score.tolist()):
        most = j + 1 if group.cap is None else group.cap[0] + int(group.cap[1] * (j + 1))
        chosen = j >= sink and one >= group.threshold and count < most
        count += chosen
        kept.append(chosen or j < sink)
    return kept


def first_of(group: RetainGroup, t: int) -> int:
    """First key in the window of the query at t."""
    asked = t // 64 * 64
    return max(0, asked + 1 - max(1, int((group.alpha + group.beta * (asked + 1)) // 1))) // 64 * 64


def naive(groups: list[RetainGroup], sequence: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Outputs `[H, T, D]` of one sequence of tokens alone, and the pages that it holds at the end."""
    query, key, value = sequence
    tokens, outputs, pages = query.shape[1], [], 0
    at = torch.arange(tokens, device=query.device)
    for number, group in enumerate(groups):
        kept = naive_kept(group, key[number], value[number])
        first = torch.tensor([first_of(group, t) for t in range(tokens)], device=query.device)
        flags = torch.tensor(kept, device=query.device, dtype=torch.bool)
        seen = (at <= at[:, None]) & (flags | (at >= first[:, None]))
        for head in range(number * SHARE, (number + 1) * SHARE):
            logits = (query[head] @ key[number].T * DIM**-0.5).masked_fill(~seen, float("-inf"))
            outputs.append(logits.softmax(-1) @ value[number])
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
    made.append(torch.full((ROWS, columns, HIDDEN), torch.nan, dtype=torch.float64, device=DEVICE))
    return made, mask.to(DEVICE)


def kinds_of(groups: list[RetainGroup]) -> Kinds:
    kinds = Kinds([group.model_dump(mode="json") for group in groups], FACTS)
    assert isinstance(kinds.only, RetainMixer)
    return kinds


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
        scorer = draw.choice(["value_norm", "key_norm"])
        groups, columns = [random_group(draw, scorer) for _ in range(GROUPS)], draw.randrange(1, 400)
        made, mask = inputs(columns, seed, draw)
        kinds, cuts = kinds_of(groups), cuts_of(draw, columns)
        reserve = draw.choice([None, columns, columns + 70])
        cache = PagedCache([kinds], reserve) if draw.random() < 0.8 else None
        cuts = cuts if cache is not None else [0, columns]
        with torch.no_grad():
            found, pages = feed(kinds, cache, made, mask, cuts), 0
            for row in range(ROWS):
                expected, held = naive(groups, [x[row][:, mask[row]] for x in made[:3]])
                torch.testing.assert_close(found[row][:, mask[row]], expected, rtol=1e-8, atol=1e-9)
                assert bool((found[row][:, ~mask[row]] == 0).all())
                pages += held
        if cache is not None:
            assert cache.held_bytes() == pages * PAGE_BYTES + COUNTERS, (seed, groups)
            if reserve is None:
                assert cache.allocated_bytes() == cache.held_bytes()
