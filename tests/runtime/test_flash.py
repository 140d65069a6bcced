"""The block lists given to FlashAttention-4: exact tiles for random rules and lengths."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.runtime.flash import blocks_of, refusal
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
