"""What a unit, or a whole plan, costs for an input of one length: integers that add up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from operator import attrgetter


@dataclass(frozen=True)
class Cost:
    """What one sequence of some length costs; costs of the units of a model add up to that of the model.

    Attributes:
        held_bytes: of the cache that holds the sequence.
        read_bytes: of the cache that a decode step at the end of the sequence reads.
        keys: that the last query sees, one for each head group that it sees it in.
        flops: of scores and weighted values in a prefill of the sequence: 4 x head_dim for every query head and every
            visible pair of query and key. Projections are counted by `parameters`.
        parameters: of the decoder layers; 0 where they were not counted.
        state_bytes: of `held_bytes`, those of states, which do not grow with the length.
        heads: query heads that a token computes.
        spread_bytes: standard deviation of `held_bytes` over texts, where these are a mean over texts. Those of several
            units add up to what the whole deviates by at most, which it does where all units do so on the same texts.
        over_bytes: how many more than `held_bytes` are held at most, whatever the text.
    """

    held_bytes: int = 0
    read_bytes: int = 0
    keys: int = 0
    flops: int = 0
    parameters: int = 0
    state_bytes: int = 0
    heads: int = 0
    spread_bytes: int = 0
    over_bytes: int = 0

    @property
    def varies(self) -> bool:
        """Whether what is held depends on the text."""
        return self.spread_bytes > 0 or self.over_bytes > 0

    @property
    def most_bytes(self) -> int:
        """Bytes that are held at most, whatever the text."""
        return self.held_bytes + self.over_bytes

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(mine + theirs for mine, theirs in zip(_values(self), _values(other), strict=True)))

    def __mul__(self, units: int) -> Cost:
        """The cost of so many equal units."""
        return Cost(*(value * units for value in _values(self)))

    @staticmethod
    def total(costs: Iterable[Cost]) -> Cost:
        """The sum of costs; of none, nothing."""
        return Cost(*map(sum, zip(_values(Cost()), *map(_values, costs), strict=True)))


# All numbers of a cost in their order; `dataclasses.astuple` copies each, and a search adds up millions.
_values = attrgetter(*(field.name for field in fields(Cost)))
