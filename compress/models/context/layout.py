"""Which tokens of a sequence each process holds, and which of the others' a group's queries see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from compress.runtime.shard import View
from compress.runtime.span import BETA_UNIT, PAGE, Span


@dataclass(frozen=True)
class Layout:
    """A sequence over `world` processes, from both ends: rank r has segments r and 2 * world - 1 - r of 2 * world.

    With causal attention a late token costs more than an early one, and so all processes have the same to do.

    Args:
        length: tokens of the sequence, a multiple of `multiple(world)`.
    """

    length: int
    world: int

    @staticmethod
    def multiple(world: int) -> int:
        """What the length has to be a multiple of: segments are whole pages."""
        return 2 * world * PAGE

    @property
    def size(self) -> int:
        """Tokens of a segment."""
        return self.length // (2 * self.world)

    def numbers(self, rank: int) -> tuple[int, int]:
        """The segments of a process, in the order of its columns."""
        return rank, 2 * self.world - 1 - rank

    def owner(self, number: int) -> int:
        """The process that has a segment."""
        return min(number, 2 * self.world - 1 - number)

    def segment(self, number: int) -> tuple[int, int]:
        """Start and stop of a segment."""
        return number * self.size, (number + 1) * self.size

    def positions(self, rank: int) -> torch.Tensor:
        """Position of every column of a process, `[T]`."""
        return torch.cat([torch.arange(*self.segment(number)) for number in self.numbers(rank)])


def view_of(spans: Sequence[Span], start: int, stop: int) -> View:
    """What queries at `start` to `stop` of groups with these spans see, as a shorter sequence (`runtime.shard.View`).

    With the gap a multiple of what beta counts in, the span at a column is the one at its position: for d tokens less,
    floor(alpha + beta * (t + 1)) is floor(alpha + beta * d + beta * (t - d + 1)) where beta * d is whole.
    """
    sink = max(span.sink for span in spans)
    first = min(span.first(max(start - 1, 0)) for span in spans)
    period = math.lcm(PAGE, *(BETA_UNIT // math.gcd(span.beta_units, BETA_UNIT) for span in spans))
    shift = max(0, first - sink) // period * period
    if shift == 0:
        return View(start, stop, 0, 0, tuple(spans))
    moved = [
        Span(span.sink, span.alpha + shift * span.beta_units // BETA_UNIT, span.beta, span.granule) for span in spans
    ]
    return View(start, stop, sink, shift, tuple(moved))


@dataclass(frozen=True)
class Exchange:
    """The rows that a process sends and gets, where a row is what one token has in one head group.

    Rows of a process are numbered group by group, column by column; what it gets lies behind them, and then one row of
    zeros.

    Attributes:
        sent: for every process the rows that it gets from this one, none twice.
        got: how many rows come from every process.
        views: of each segment here, and for each of them the rows that its columns are, `[G * columns]`.
    """

    sent: tuple[torch.Tensor, ...]
    got: tuple[int, ...]
    views: tuple[tuple[View, torch.Tensor], ...]


@lru_cache(maxsize=256)
def exchange_of(layout: Layout, rank: int, spans: tuple[Span, ...], device: torch.device) -> Exchange:
    """What a process has to send and get so that its queries of G groups with these spans see all that they are to."""
    wanted = [_wanted(layout, other, spans) for other in range(layout.world)]  # [G, length] each
    owners = torch.tensor([layout.owner(number) for number in range(2 * layout.world)])
    owners = owners.repeat_interleave(layout.size)
    column = torch.empty(layout.length, dtype=torch.long)
    for other in range(layout.world):
        positions = layout.positions(other)
        column[positions] = torch.arange(len(positions))
    own, groups = 2 * layout.size, len(spans)
    sent = []
    for other in range(layout.world):
        group, position = (wanted[other] & (owners == rank)).nonzero(as_tuple=True)
        rows = group * own + column[position]
        sent.append(rows if other != rank else rows[:0])
    place = torch.full((groups, layout.length), -1, dtype=torch.long)
    here = owners == rank
    place[:, here] = torch.arange(groups)[:, None] * own + column[here]
    got, behind = [], groups * own
    for other in range(layout.world):
        group, position = (wanted[rank] & (owners == other)).nonzero(as_tuple=True)
        count = len(group) if other != rank else 0
        if count:
            place[group, position] = behind + torch.arange(count)
        got.append(count)
        behind += count
    views = []
    for number in layout.numbers(rank):
        start, stop = layout.segment(number)
        view = view_of(spans, start, stop)
        seen = place.masked_fill(~_seen(spans, start, stop, layout.length), -1)
        rows = torch.cat([seen[:, : view.sink], seen[:, view.sink + view.shift : stop]], dim=1)
        views.append((view, torch.where(rows < 0, behind, rows).flatten().to(device)))
    return Exchange(tuple(rows.to(device) for rows in sent), tuple(got), tuple(views))


def _wanted(layout: Layout, rank: int, spans: tuple[Span, ...]) -> torch.Tensor:
    """Which tokens a process needs of each group, `[G, length]`."""
    found = [_seen(spans, *layout.segment(number), layout.length) for number in layout.numbers(rank)]
    return torch.stack(found).any(0)


def _seen(spans: tuple[Span, ...], start: int, stop: int, length: int) -> torch.Tensor:
    """Which tokens the queries of a segment see at all, or the one before them does, `[G, length]`."""
    position = torch.arange(length)
    rows = [(position < span.sink) | (position >= span.first(max(start - 1, 0))) for span in spans]
    return torch.stack(rows) & (position < stop)
