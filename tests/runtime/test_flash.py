"""What is asked of FlashAttention-4: exact tiles for random rules and lengths, and the launches of a mixed layer."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.runtime import flash
from compress.runtime.flash import BLOCK, Launch, attend, blocks_of, launches_of, refusal
from compress.runtime.reference import prefill
from compress.runtime.span import BETA_UNIT, Span

spans = st.builds(
    Span,
    sink=st.sampled_from([0, 1, 15, 16, 17, 40]),
    alpha=st.integers(-60, 150),
    beta=st.integers(0, BETA_UNIT).map(lambda units: units / BETA_UNIT),
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.lists(spans, min_size=1, max_size=3), st.integers(1, 200))
def test_tiles_are_those_of_the_mask(rule: list[Span], length: int) -> None:
    block = 16
    tiles = -(-length // block)
    found = blocks_of(rule, length, torch.device("cpu"), block)
    t = torch.arange(tiles * block)
    for group, span in enumerate(rule):
        seen = span.visible(t[:, None], t[None, :])[:length]
        for tile in range(tiles):
            rows = seen[tile * block : (tile + 1) * block].view(-1, tiles, block).transpose(0, 1).flatten(1)
            part = found.part[group, tile, : found.part_count[group, tile]].tolist()
            full = found.full[group, tile, : found.full_count[group, tile]].tolist()
            assert len({*part, *full}) == len(part) + len(full)
            assert {n for n in range(tiles) if rows[n].any()} <= {*part, *full}
            assert all(rows[n].all() for n in full)
            # A tile that no query sees is loaded only where one edge of the window passes between its rows.
            assert sum(not rows[n].any() for n in part) == 0


def test_a_machine_without_it_says_so() -> None:
    assert "Hopper" in str(refusal(torch.device("cpu"), torch.bfloat16, 128))


def test_launches() -> None:
    rule, other = Span(64, 256, 0.0), Span(64, 0, 0.25)
    mixed = (rule, Span(), Span(0, 5000, 0.0), other, Span(0, 300, 0.0), Span(0, 300, 0.0), Span())
    assert launches_of(mixed, 4096) == (
        Launch(0, 4, rules=(rule, None, None, other)),
        Launch(1, 3),
        Launch(4, 6, window=300),
        Launch(6, 7),
    )


class Lists:
    """Stands for the package's own container."""

    def __init__(self, part_count: Any, part: Any, full_count: Any, full: Any, block_size: Any) -> None:
        self.lists = ((part_count, part), (full_count, full))
        self.mask_block_idx, self.full_block_idx = part, full


def dense(query: Any, key: Any, value: Any, *, softmax_scale: float, out: torch.Tensor, **options: Any) -> None:
    """What the package's forward function computes, `[B, T, H, D]`: its causal, its local and its listed kernel."""
    length, share = query.shape[1], query.shape[2] // key.shape[2]
    t = torch.arange(length)
    seen = (t[None, :] <= t[:, None]).expand(query.shape[2], -1, -1).clone()
    if "window_size_left" in options:
        assert options["window_size_right"] == 0
        seen &= t[:, None] - t[None, :] <= options["window_size_left"]
    elif "block_sparse_tensors" in options:
        first, sink = options["aux_tensors"]
        visited = torch.zeros_like(seen)
        for head in range(query.shape[2]):
            for count, numbers in options["block_sparse_tensors"].lists:
                for row, many in enumerate(count[0, head].tolist()):
                    for column in numbers[0, head, row, :many].tolist():
                        visited[head, row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK] = True
            seen[head] &= (t[None, :] < sink[head]) | (t[None, :] >= first[head, :length, None])
        seen &= visited
    else:
        assert options == {"causal": True}
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    scores = q @ k.repeat_interleave(share, 1).transpose(-1, -2) * softmax_scale
    found = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(share, 1)
    out.copy_(found.transpose(1, 2))


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (3, 0, 4, 1, 2)])
def test_launches_make_one_layer(order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "_interface", lambda: (dense, Lists, None))
    rules = [Span(), Span(), Span(0, 150, 0.0), Span(70, 20, 0.25), Span(0, 30, 0.125)]
    spans = [rules[number] for number in order]
    query = torch.randn(2, 10, 333, 16)
    key, value = torch.randn(2, 2, 5, 333, 16)
    found = attend(query, key, value, spans, 0.25)
    torch.testing.assert_close(found, prefill(query, key, value, spans, scale=0.25))
