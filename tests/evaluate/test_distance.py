"""Recall by distance: what a window of keys shows of the evidence is inside it, all else beyond, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.errors import UserError
from compress.evaluate.measures.distance import Distance, DistanceResult, Recalled
from tests.data.language import byte_tokenizer
from tests.evaluate.test_recall import TEXT

LENGTH, WINDOW = 500, 128
MEASURE = Distance(lengths=(LENGTH,), window=WINDOW, count=5, texts=4, pairs=8)


def looking_back(window: int) -> Any:
    """In place of `logits_in_slices`: a model that writes what stood behind the same token before, in its window."""

    def logits(model: Any, ids: torch.Tensor, positions: range) -> Iterator[tuple[range, torch.Tensor]]:
        rows = torch.zeros(len(positions), 512)
        for row, place in enumerate(positions):
            seen = [k for k in range(max(0, place + 1 - window), place) if ids[k] == ids[place]]
            rows[row, int(ids[seen[-1] + 1]) if seen else 0] = 1.0
        yield positions, rows

    return logits


@pytest.mark.parametrize("window", [64, WINDOW, LENGTH])
def test_words_are_inside_a_window_that_shows_key_and_value(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.evaluate.measures.distance.logits_in_slices", looking_back(window))
    model, steps = torch.nn.Linear(1, 1), list[tuple[int, int]]()
    model.get_input_embeddings = lambda: model  # type: ignore[assignment]
    texts = MEASURE._texts(0, LENGTH, byte_tokenizer())
    subject: Any = SimpleNamespace(model=model)
    result: Any = MEASURE._words(LENGTH, texts, subject, lambda done, total: steps.append((done, total)))
    assert len(result.items) == 4 * 8 and steps[-1] == (4, 4)
    assert all(item.correct == (item.near <= window) and item.near == item.far + 2 for item in result.items)
    inside, beyond = (next(c for c in result.cells() if c.label == f"words {w} {WINDOW}") for w in ("inside", "beyond"))
    assert inside.value == (1.0 if window >= WINDOW else inside.value) and beyond.value == float(window == LENGTH)


def test_pass_keys_lie_where_a_window_shows_all_or_nothing_of_them() -> None:
    near, far = MEASURE._keys(0, LENGTH, byte_tokenizer(), TEXT, None)
    assert len(near.prompts) == len(far.prompts) == 5
    for group, shown in ((near, True), (far, False)):
        for prompt in group.prompts:
            (start, end), length = prompt.evidence[0], len(prompt.tokens)
            last = length + prompt.budget - 1  # the query that the last token of the answer is written at
            assert (start >= last + 1 - WINDOW) == shown
            assert (end <= length - WINDOW - 64) == (not shown) and start >= 64
    with pytest.raises(UserError, match="do not fit into the window"):
        MEASURE.model_copy(update={"window": 20})._keys(0, LENGTH, byte_tokenizer(), TEXT, None)
    with pytest.raises(UserError, match="no place beyond the window"):
        MEASURE.model_copy(update={"window": 400})._keys(0, LENGTH, byte_tokenizer(), TEXT, None)


def test_cells_tell_what_is_inside_and_beyond_by_distance() -> None:
    items = [
        Recalled(near=near, far=near - 10, correct=right) for near, right in ((128, True), (129, False), (60, True))
    ]
    items += [
        Recalled(near=far + 10, far=far, correct=right) for far, right in ((192, True), (191, False), (490, False))
    ]
    cells = DistanceResult(task="words", length=LENGTH, window=WINDOW, items=items).cells()
    found = [(cell.label, cell.count, cell.value) for cell in cells if cell.part is None]
    assert found == [("words inside 128", 2, 1.0), ("words beyond 128", 2, 0.5)]
    assert [(cell.part.low, cell.part.high, cell.count) for cell in cells if cell.part is not None] == [(192, 500, 2)]
