"""Tokens drawn by blocks of the vocabulary are those of the whole distribution function, summed in float64."""

from __future__ import annotations

import pytest
import torch

from compress.data.draw import WIDTH, draw


@pytest.mark.parametrize("words", [3 * WIDTH, 2 * WIDTH + 37, 50])
@pytest.mark.parametrize(("temperature", "dtype"), [(1.0, torch.float32), (0.7, torch.bfloat16), (0.02, torch.float32)])
def test_tokens_are_those_of_the_distribution_function(words: int, temperature: float, dtype: torch.dtype) -> None:
    rows = 400
    logits = (4 * torch.randn(rows, words)).to(dtype)
    banned = torch.tensor([0, words // 2, words - 1])
    logits[::3, words // 2] = 60.0  # what would be the most likely one
    noise = torch.rand(rows, 1)
    noise[:4, 0] = torch.tensor([0.0, 1 - 2**-24, 0.5, 2**-24])
    exact = logits.double()
    exact[:, banned] = -torch.inf
    ends = (exact / temperature).softmax(-1).cumsum(-1)
    found = draw(logits, banned, noise, temperature)
    assert bool(found.finite) and torch.equal(found.likely, exact.argmax(-1))
    token = found.token[:, None]
    after, before = ends.gather(1, token), ends.gather(1, (token - 1).clamp(min=0)).masked_fill(token == 0, 0.0)
    assert bool((before - 1e-6 <= noise).all()) and bool((noise <= after + 1e-6).all())
    assert bool((after > before).all()), "a token without probability was drawn"
    assert not torch.isin(found.token, banned).any()
    if temperature == 1:
        assert len(found.token.unique()) > 20


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_not_finite_is_told_also_where_it_is_banned(bad: float) -> None:
    logits = torch.randn(5, 300)
    logits[3, 7] = bad
    assert not draw(logits, torch.tensor([7]), torch.rand(5, 1)).finite


@torch.no_grad()
def test_what_is_much_less_likely_than_the_likeliest_is_not_drawn() -> None:
    logits = torch.randn(2000, 300)
    exact = (logits.double() / 0.9).softmax(-1)
    kept = exact >= 0.2 * exact.amax(-1, keepdim=True)
    found = draw(logits.clone(), torch.tensor([], dtype=torch.long), torch.rand(2000, 1), 0.9, 0.2)
    assert bool(kept.gather(1, found.token[:, None]).all())
    share = (torch.where(kept, exact, 0) / exact.where(kept, 0).sum(-1, keepdim=True)).gather(1, found.likely[:, None])
    drawn = (found.token == found.likely).double().mean()
    assert abs(drawn - share.mean()) < 0.04  # its standard error is about .01


def test_some_rows_may_not_draw_some_tokens() -> None:
    logits, rows = torch.randn(400, 50), torch.arange(400) % 2 == 0
    logits[:, [3, 9]] += 30
    found = draw(logits, torch.tensor([0]), torch.rand(400, 1), early=(rows, torch.tensor([3, 9])))
    ends = torch.isin(torch.stack([found.token, found.likely]), torch.tensor([3, 9]))
    assert bool(found.finite) and not ends[:, rows].any() and ends[1, ~rows].all()
