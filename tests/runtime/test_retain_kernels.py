"""The kernels of heads that keep tokens, against one mask of all pairs in float64: ragged, chunked, paged, poisoned."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from compress.runtime.paged_cache import PagedCache
from compress.targets.retain import RetainGroup
from tests.runtime.test_linear_mixer import feed, tokens_of
from tests.runtime.test_retain import (
    COUNTERS,
    HALF,
    ROWS,
    inputs,
    kinds_of,
    naive,
    random_group,
)  # fmt: skip

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}
PAGE_BYTES = 64 * (2 * 8 * 4 + 1)  # of a cache in float32, with a flag for every token


def float32(made: list[torch.Tensor]) -> list[torch.Tensor]:
    """What kernels take, of numbers that float64 has too, so that thresholds part them alike."""
    return [x.float() for x in made]


def check(groups: list[RetainGroup], seed: int, columns: int, reserve: int | None, cuts: list[int] | None) -> None:
    """Every way to the end by the kernels is the mask of all pairs, and holds the bytes of the rule."""
    draw = random.Random(seed)
    made, mask = inputs(columns, seed, draw)
    made, mask = float32([x[1:] for x in made]), mask[1:]  # the padded ones
    (kinds, mixer), scores = kinds_of(groups), (3.0, torch.linspace(-1, 1, 4, device=DEVICE))
    given: Any = scores if seed % 3 == 0 else (None, None)
    cache = PagedCache([kinds], reserve) if cuts is not None else None
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(parameter.bfloat16())
        found, pages = feed(kinds, cache, made, mask, cuts or [0, columns], given, "triton"), 0
        exact = [x.double() for x in made]
        for row in range(ROWS - 1):
            wide: Any = (given[0], None if given[1] is None else given[1].double())
            expected, held = naive(mixer, tokens_of(exact, mask, row), wide)
            torch.testing.assert_close(found[row][:, mask[row]].double(), expected, **CLOSE)
            assert bool((found[row][:, ~mask[row]] == 0).all())
            pages += held
    if cache is not None:
        assert cache.held_bytes() == pages * PAGE_BYTES + (ROWS - 1) * COUNTERS
        assert reserve is not None or cache.allocated_bytes() == cache.held_bytes()


@pytest.mark.parametrize(
    ("seed", "reserve", "cuts"),
    [
        (3, None, [0, 100, 193, 195]),  # from cached windows, from the chunk, and behind a list
        (4, 194, [0, 191, 192, 193]),  # steps into a page
    ],
)
def test_chunks_and_steps_are_the_mask_of_all_pairs(seed: int, reserve: int | None, cuts: list[int]) -> None:
    check(HALF, seed, cuts[-1], reserve, cuts)


def test_one_pass_without_a_cache_is_the_mask_of_all_pairs() -> None:
    check([random_group(random.Random(seed), "ridge") for seed in (6, 5)], 2, 140, None, None)
