"""The span rule of a head group in blocks of an engine's cache: which it holds, and which cached prefix serves it.

Plain Python on integers; `first` takes integer tensors as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

BETA_UNIT = 1024


@dataclass(frozen=True, order=True)
class Rule:
    """What the query at position t (from 0) sees: key j <= t when

        j < sink   or   j >= first(t),     first(t) = t + 1 - max(1, alpha + floor(beta_units (t + 1) / 1024)).

    The same as `compress/runtime/span.py`, which checkpoints carry: `first` never moves back, so that what is freed is
    never needed again.

    Args:
        sink: tokens at the start that stay visible.
        alpha: fixed part of the window in tokens.
        beta_units: share of the position added to the window, in 1/1024.
        granule: tokens by which the edge of the window moves: 1, or 64; the sink is a multiple of it.
    """

    sink: int
    alpha: int
    beta_units: int
    granule: int = 1

    @property
    def is_full(self) -> bool:
        """Whether every query sees every earlier key."""
        return self.beta_units == BETA_UNIT and -self.alpha < self.granule

    @property
    def is_plain(self) -> bool:
        """Whether it is a window of one length and no more, which vLLM's own attention and cache know."""
        return self.sink == 0 and self.beta_units == 0 and self.granule == 1

    @property
    def is_rswa(self) -> bool:
        """Whether it is sinks and a window of one length, which some masks of vLLM (R-SWA) can say."""
        return self.beta_units == 0 and self.granule == 1

    def first(self, t: Any) -> Any:
        """The first key of the window of the query at position t; an int or an integer tensor, as t is."""
        t = t & -self.granule
        window = self.alpha + (t + 1) * self.beta_units // BETA_UNIT
        window = window + (1 - window) * (window < 1)
        first = t + 1 - window
        return (first * (first > 0)) & -self.granule

    def gap(self, tokens: int, block: int) -> tuple[int, int]:
        """The blocks of `block` tokens that no query from position `tokens` on sees, from the first to before the last.

        The two are equal where there are none.
        """
        start = _blocks(self.sink, block)
        return start, max(start, self.first(tokens) // block)

    def held(self, tokens: int, block: int) -> list[int]:
        """Numbers of the blocks that a cache of `tokens` tokens holds, ascending."""
        start, end = self.gap(tokens, block)
        return [number for number in range(_blocks(tokens, block)) if not start <= number < end]

    def most_blocks(self, in_flight: int, max_length: int, block: int) -> int:
        """The most blocks that a request holds, with `in_flight` tokens in the making, up to `max_length` tokens."""
        window = max_length - self.first(max_length)
        there = _blocks(min(window + in_flight, max_length), block) + 1
        return min(_blocks(self.sink, block) + there, _blocks(max_length, block))

    def hit(self, present: Callable[[int], bool], blocks: int, block: int, step: int = 1, beyond: int = 0) -> int:
        """The longest prefix in blocks that can be taken from a cache: all that the next query sees of it is there.

        Blocks of the sink have to be there and those of the window; the ones between are freed and do not matter.

        Args:
            present: whether the cache has the block of a number.
            blocks: the longest prefix that is asked for, in blocks of `block` tokens.
            step: the length in tokens has to be a multiple of it.
            beyond: blocks behind the prefix that have to be there as well (draft models compute the last one again).
        """
        sinks = min(_blocks(self.sink, block), blocks)
        whole = next((number for number in range(sinks) if not present(number)), sinks)
        end = blocks - beyond
        while end > 0:
            if whole < min(sinks, end):
                end = whole
                continue
            start = max(self.first(end * block) // block, min(whole, end))
            lacking = next((number for number in range(end + beyond - 1, start - 1, -1) if not present(number)), None)
            if lacking is not None:
                end = lacking - beyond  # every prefix between needs that block, too
            elif end * block % step:
                end -= 1
            else:
                return end
        return 0


def _blocks(tokens: int, block: int) -> int:
    return -(-tokens // block)
