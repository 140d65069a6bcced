"""The kernels of heads that keep tokens, against one mask of all pairs in float64: ragged, chunked, paged, poisoned."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from compress.runtime.paged_cache import PagedCache
from compress.runtime.retain_reference import keep as reference_keep
from compress.runtime.scorer_gate import Gate
from compress.runtime.scorer_key_norm import KeyNorm
from compress.runtime.scorer_mlp import Mlp
from compress.runtime.scorer_ridge import Ridge
from compress.runtime.scorer_value_norm import ValueNorm
from compress.runtime.scorers import Scorer
from compress.runtime.triton_scorers import keep, scores
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


def test_tokens_are_kept_as_the_reference_keeps_them() -> None:
    positions = torch.arange(100).repeat(2, 1) + torch.tensor([[0], [40]])
    positions[1, :7] = positions[1, 80:] = -1  # no tokens
    # In halves, so that some are the thresholds themselves.
    found, count = (2 * torch.randn(2, 3, 100)).round() / 2, torch.tensor([[0, 0, 0], [30, 4, 2]], dtype=torch.int32)
    found[1, :, :7] = torch.nan
    rules = torch.tensor([-0.5, 0.0, -torch.inf]), torch.tensor([0, 64, 0])
    caps = torch.tensor([[1 << 40, 0], [4, 100], [2, 300]])
    given = [x.to(DEVICE) for x in (found, positions, count, *rules, caps)]
    kept, counts = keep(*given)
    wanted, expected = reference_keep(*given)
    assert torch.equal(kept[0], wanted[0]) and torch.equal(kept[1, :, 7:80], wanted[1, :, 7:80])
    assert torch.equal(counts, expected) and not bool(kept[1, :, :7].any() or kept[1, :, 80:].any())


@pytest.mark.parametrize("made", [Ridge, Mlp, KeyNorm, ValueNorm])
def test_scorers_say_what_their_modules_say(made: type[Scorer]) -> None:
    scorer, positions = made(2, 40, 8).to(DEVICE), torch.arange(70, device=DEVICE)[None].repeat(2, 1)
    for parameter in scorer.parameters():
        parameter.requires_grad_(False).copy_(0.3 * torch.randn(parameter.shape))
    hidden = torch.randn(2, 70, 40, device=DEVICE)
    key, value = torch.randn(2, 2, 70, 2, 8, device=DEVICE).transpose(2, 3)
    expected = scorer.double()(hidden.double(), key.double(), value.double(), positions)
    positions[1, 50:] = -1
    hidden[1, 50:] = key[1, :, 50:] = torch.nan
    found = scores(scorer.float(), hidden, key, value, positions)
    assert found is not None
    torch.testing.assert_close(found[0].double(), expected[0].double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1, :, :50].double(), expected[1, :, :50].double(), rtol=1e-5, atol=1e-5)


def test_a_step_keeps_a_token_whose_score_is_the_threshold() -> None:
    """Values of length 1 have the score 0; of those of length 1/2 none is kept."""
    entry = RetainGroup(sink=0, alpha=1, scorer="value_norm", threshold=0.0, share=0.5)
    kinds, _ = kinds_of([entry, entry])
    made = [x[:1].float() for x in inputs(65, 1, random.Random(1))[0]]
    made[2].zero_()[..., 3] = torch.where(torch.arange(65) % 3 == 1, 0.5, 1.0)
    cache, tokens = PagedCache([kinds], 65), torch.ones(1, 65, dtype=torch.bool, device=DEVICE)
    with torch.no_grad():
        feed(kinds, cache, made, tokens, [0, 62, 63, 64, 65], impl="triton")  # a page leaves in the last step
    found = cache.paged[0].states[0].tensors
    assert found["listed"].tolist() == [[43, 43]] and found["count"].tolist() == [[43, 43]]


@pytest.mark.parametrize("made", [Mlp, Gate])  # one whose hidden units have a launch of their own, one without kernels
def test_a_step_takes_in_what_a_pass_takes_in(made: type[Scorer]) -> None:
    """The same tokens are kept and counted by one launch a step as by a pass of them all."""
    entry = RetainGroup(sink=0, alpha=1, scorer=made.__name__.lower(), threshold=0.0, share=0.5, cap=(3, 0.25))
    kinds, mixer = kinds_of([entry, entry.model_copy(update={"cap": None})])
    columns = [x[:1].float() for x in inputs(67, 1, random.Random(1))[0]]
    tokens = torch.ones(1, 67, dtype=torch.bool, device=DEVICE)
    mixer.float().thresholds = (-0.5, -0.5) if made is Mlp else (-3.0, -3.0)
    ends = []
    with torch.no_grad():
        for cuts in ([0, 67], [0, 63, 64, 65, 66, 67]):  # a page leaves in the step from 64 to 65
            cache = PagedCache([kinds], 67)
            out = feed(kinds, cache, columns, tokens, cuts, impl="triton")[:, :, -1]
            ends.append({"out": out, **cache.paged[0].states[0].tensors})
    assert 0 < int(ends[0]["listed"].sum()) < 2 * 64
    for name, found in ends[1].items():
        torch.testing.assert_close(found, ends[0][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("seed", "reserve", "cuts"),
    [
        (3, None, [0, 100, 193, 195]),  # from cached windows, from the chunk, and behind a list
        (4, 194, [0, 191, 192, 193]),  # steps into a page
    ],
)
def test_chunks_and_steps_are_the_mask_of_all_pairs(seed: int, reserve: int | None, cuts: list[int]) -> None:
    check(HALF, seed, cuts[-1], reserve, cuts)


def test_one_pass_without_a_cache_is_the_mask_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.Tensor.new_empty

    def poisoned(*arguments: Any, **options: Any) -> torch.Tensor:
        made = empty(*arguments, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    check([random_group(random.Random(seed), "ridge") for seed in (6, 5)], 2, 140, None, None)
