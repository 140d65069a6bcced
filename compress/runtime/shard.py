"""What mixers ask for where several processes hold the tokens of one sequence, each some segments of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from .span import Span


@dataclass(frozen=True)
class View:
    """What the queries of a segment of a sequence see, laid out as a shorter sequence that ends where the segment does.

    Its columns are the first tokens, as many as the groups have sinks, and then those from some position on without a
    gap. What a group does not see of them is zero. Columns are positions of the shorter sequence, for which the groups
    have spans of their own: they see there just what they see of the whole.

    Attributes:
        start, stop: positions of the segment in the whole sequence.
        sink: columns before the gap.
        shift: tokens in the gap.
        spans: of the groups, in the shorter sequence.
    """

    start: int
    stop: int
    sink: int
    shift: int
    spans: tuple[Span, ...]

    @property
    def before(self) -> int:
        """Columns before those of the segment."""
        return self.start - self.shift

    @property
    def columns(self) -> int:
        """All columns."""
        return self.stop - self.shift


class Shard(Protocol):
    """The tokens of a sequence that this process holds, and how it gets what it needs of the others.

    Whatever exchanges something is called by all processes of the sequence in the same order, and is differentiable:
    gradients go back to the tokens that they are of.

    Attributes:
        length: tokens of the whole sequence.
        segments: start and stop of each segment that is here; their tokens are the columns of a pass, one segment after
            the other.
        numbers: which of all segments of the sequence they are, in its order.
    """

    @property
    def length(self) -> int: ...

    @property
    def segments(self) -> tuple[tuple[int, int], ...]: ...

    @property
    def numbers(self) -> tuple[int, ...]: ...

    def positions(self, device: torch.device) -> torch.Tensor:
        """Position in the sequence of every column, `[T]`."""

    def split(self, x: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
        """The columns of each segment, on the axis `dim`."""

    def views(self, x: torch.Tensor, spans: tuple[Span, ...]) -> list[tuple[View, torch.Tensor]]:
        """For every segment what its queries see of `x` `[B, G, T, D]` of all tokens: a view, and `[B, G, columns, D]`.

        What the query before the segment's first one sees is there, too, which linear heads start from.
        """

    def everywhere(self, x: torch.Tensor) -> torch.Tensor:
        """What all segments have, in the order of the sequence: `[segments here, ...]` to `[segments, ...]`."""
