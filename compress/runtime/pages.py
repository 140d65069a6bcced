"""Keys and values in 64-token pages per head group, freed as soon as no later query can see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from .mixer import State
from .span import PAGE, AnySpan, Span
from .transfer import send


@dataclass(frozen=True)
class Pages:
    """What an implementation reads of a layer: the pools `[places, 64, D]` and where each page lies.

    Attributes:
        keys, values: the pools.
        table: `[B, G, numbers]` int32, the place of page number n (tokens 64 n to 64 n + 63); what it says of a
            page that is not held means nothing.
    """

    keys: torch.Tensor
    values: torch.Tensor
    table: torch.Tensor


class PagedState(State):
    """The pages of some head groups of a layer.

    One pool `[pages, 64, head_dim]` for keys and one for values serves all sequences and head groups. What is stored is
    detached: gradients flow through the new tokens of a forward pass, not through the cache.

    A growing state takes pages as they are needed: its pool is never larger than the most pages that were held at
    once, so its size is what the plan predicts (`Span.page_count`) up to the one page a group that a window needs
    when its start is not on a page boundary. A reserved one takes at its first use all that `max_length` tokens
    will need (`Span.reserved_pages`); its table is then constant, the pages of a window following each other
    in a ring, so that a decode step changes nothing but what lies on the device.

    With a slack a page is freed that many tokens later, so that as many can be taken back.

    Args:
        rules: which keys each group needs; those by length are resolved before the first token.
        max_length: tokens to reserve for; None grows.

    Attributes:
        pooled: names of the attributes that are pools `[pages, 64, ...]`; a subclass may keep more beside the keys.
    """

    pooled: tuple[str, ...] = ("keys", "values")
    one_way: ClassVar[str | None] = None

    def __init__(self, rules: Sequence[AnySpan], max_length: int | None = None) -> None:
        self.rules = tuple(rules)
        self.spans: tuple[Span, ...] = tuple(rule for rule in self.rules if isinstance(rule, Span))
        super().__init__(max_length)

    def reset(self) -> None:
        """Forget everything and free the pools."""
        super().reset()
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        for name in self.pooled:
            setattr(self, name, None)
        self.tables: list[list[list[int]]] = []  # [sequences][groups] -> pool pages in the order of Span.pages
        self._free: list[int] = []
        self._lows: list[int] = []  # per sequence, the least length that it can be taken back to, as of the last `crop`
        self._turns: list[int] = []  # per sequence, the length up to which its pages stay the same
        self._table: torch.Tensor | None = None

    def resolve(self, length: int) -> None:
        """Fix the windows of rules by length for an input of `length` tokens."""
        self.spans = tuple(rule.at_length(length) for rule in self.rules)

    def begin(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Empty pools for the sequences of `[B, G, T, D]`; a reserved state has all its pages from now on."""
        assert len(self.spans) == len(self.rules), "rules by length have to be resolved first"
        super().begin(key, value)
        batch, pages = key.shape[0], 0
        self.device = value.device
        if self.max_length is not None:
            self._table, pages = self._ring_table(batch, self.max_length)
        self.keys = key.new_zeros(pages, PAGE, key.shape[-1], dtype=value.dtype)
        self.values = value.new_zeros(pages, PAGE, value.shape[-1])
        self.tables = [[[] for _ in self.spans] for _ in range(batch)]
        self._lows, self._turns = [0] * batch, [0] * batch

    def _ring_table(self, batch: int, max_length: int) -> tuple[torch.Tensor, int]:
        """The constant table of a reserved state, and the pages of its pool, sequence by sequence."""
        numbers = torch.arange(-(-max_length // PAGE))
        rows, taken = [], 0
        for span in self.spans:
            sinks, ring = span.reserved_pages(max_length, self.slack)
            rows.append(taken + torch.where(numbers < sinks, numbers, sinks + (numbers - sinks) % max(ring, 1)))
            taken += sinks + ring
        first = torch.arange(batch)[:, None, None] * taken
        return (first + torch.stack(rows)).to(torch.int32).to(self.device), taken * batch

    def held_pages(self, row: int, group: int) -> list[int]:
        """Numbers (not pool places) of the pages that are held for one sequence and group."""
        return self.spans[group].pages(self.lengths[row], self.low(row))

    def hold(self, slack: int) -> None:
        """See `State.hold`; pages that are freed already stay so."""
        self._lows = [self.low(row) for row in range(len(self._lows))]
        super().hold(slack)

    def low(self, row: int) -> int:
        """The least length that a sequence can always be taken back to."""
        return max(self._lows[row], self.lengths[row] - self.slack)

    @property
    def is_croppable(self) -> bool:
        """See `State.is_croppable`; what no window hides can always be taken back."""
        return super().is_croppable or (self.one_way is None and all(rule.is_full for rule in self.rules))

    def crop_refusal(self, counts: Sequence[int]) -> str | None:
        """See `State.crop_refusal`; beyond the slack tokens can be taken back while no page is freed that is needed."""
        if self.one_way is not None or not self.tables:
            return self.one_way
        for row, count in enumerate(counts):
            length, low = self.lengths[row], self.low(row)
            after = length - count
            gone = (set(span.pages(after)).difference(span.pages(length, low)) for span in self.spans)
            if after < low and any(gone):
                return (
                    f"of what they would see again, pages are freed: these stay for {self.slack} tokens (`slack`). A "
                    "cache takes as many back as it is made for, model.new_cache(slack=...)"
                )
        return None

    def crop(self, counts: Sequence[int]) -> None:
        """See `State.crop`; pages of which no token is left are freed."""
        if not self.tables:  # a layer that no pass has reached
            return
        for row, count in enumerate(counts):
            if count:
                after = self.lengths[row] - count
                self._move(row, after, min(self.low(row), after))

    def advance(self, gains: Sequence[int]) -> None:
        """Bring the sequences to their new lengths: free the pages that leave a span, take those that enter."""
        for row, gain in enumerate(gains):
            new = self.lengths[row] + gain
            if self.max_length is None and new > self._turns[row]:
                self._move(row, new, self._lows[row])
            else:
                self.lengths[row] = new

    def assume(self, length: int) -> None:
        """See `State.assume`."""
        super().assume(length)
        self._lows = [0] * len(self._lows)

    def pages(self) -> Pages:
        """Pools and table as an implementation reads them."""
        assert self.keys is not None and self.values is not None
        if self._table is None:
            most = max((self.spans[0].page_bounds(length)[2] for length in self.lengths), default=0)
            table = torch.full((len(self.lengths), len(self.spans), most), -1, dtype=torch.int32)
            for row, groups in enumerate(self.tables):
                for group, places in enumerate(groups):
                    table[row, group, self.held_pages(row, group)] = torch.tensor(places, dtype=torch.int32)
            self._table = send(table, self.device)
        return Pages(self.keys, self.values, self._table)

    def pools(self) -> dict[str, torch.Tensor]:
        """All pools by their names; none before the first token."""
        return {name: pool for name in self.pooled if (pool := getattr(self, name)) is not None}

    def allocated_bytes(self) -> int:
        """Bytes of the pools as allocated, and of what is kept beside the pages."""
        return super().allocated_bytes() + sum(pool.untyped_storage().nbytes() for pool in self.pools().values())

    def held_bytes(self) -> int:
        """The same without the free list: the pages in use."""
        rows = [(length, self.low(row)) for row, length in enumerate(self.lengths)]
        used = sum(span.page_count(length, low) for span in self.spans for length, low in rows)
        return super().held_bytes() + used * self.page_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all pools."""
        return PAGE * sum(pool.shape[-1] * pool.itemsize for pool in self.pools().values())

    def store_last(self, pool: torch.Tensor, new: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor) -> None:
        """Keep what a pool has of the last token of every sequence, as in `reference.store_one`; waits for no device.

        Args:
            pool: `[places, 64, n]`.
            new: `[B, G, n]`.
            table: `[B, G, numbers]`, as of `Pages`.
            lengths: `[B]` tokens of each sequence, this one included; 0 where there is none.
        """
        if not table.shape[-1]:  # no sequence has a token yet
            return
        last = (lengths.long() - 1).clamp(min=0)[:, None, None]
        place = table.long().gather(2, (last // PAGE).expand(-1, new.shape[1], -1))[..., 0].clamp(min=0)
        slots = place * PAGE + last[..., 0] % PAGE
        flat, here = pool.view(-1, pool.shape[-1]), (lengths > 0)[:, None, None]
        if self.max_length is None:  # where a sequence has no page yet its place is another's
            kept = here.expand_as(new)[..., 0]
            flat[slots[kept]] = new[kept].to(flat.dtype)
        else:
            flat[slots] = torch.where(here, new.to(flat.dtype), flat[slots])

    def _move(self, row: int, new: int, low: int) -> None:
        """Bring one sequence to a length at which it holds other pages than before, and `_lows` to `low`."""
        held = [self.held_pages(row, group) for group in range(len(self.spans))]
        self.lengths[row], self._lows[row] = new, low
        if self.max_length is not None:
            return
        low = self.low(row)
        self._turns[row] = min(span.same_pages_until(new, low, self.slack) for span in self.spans)
        self._table = None
        entering: list[tuple[int, list[int], dict[int, int]]] = []
        missing = 0
        for group, before in enumerate(held):
            after = self.held_pages(row, group)
            staying = set(after)
            places = dict(zip(before, self.tables[row][group], strict=True))
            self._free += [place for number, place in places.items() if number not in staying]
            missing += sum(number not in places for number in after)
            entering.append((group, after, places))
        self._grow(missing - len(self._free))
        for group, after, places in entering:
            self.tables[row][group] = [places[number] if number in places else self._free.pop() for number in after]

    def _grow(self, count: int) -> None:
        """Add `count` pages to the pools; exactly as many as are missing, since an idle page is memory nobody saved."""
        if count <= 0:
            return
        assert self.keys is not None
        size = self.keys.shape[0]
        for name, pool in self.pools().items():
            more = pool.new_zeros(count, *pool.shape[1:])
            setattr(self, name, torch.cat([pool, more]) if size else more)
        self._free += range(size, size + count)

    def select(self, rows: Sequence[int]) -> None:
        """Make the batch the given sequences, in this order; one that is named twice is copied."""
        assert self.keys is not None
        if self.max_length is not None:
            reserved = self.keys.shape[0] // len(self.lengths)
            places = [place for row in rows for place in range(row * reserved, (row + 1) * reserved)]
            self._table = self._ring_table(len(rows), self.max_length)[0]
        else:
            places = [place for row in rows for table in self.tables[row] for place in table]
            self._table = None
        order = torch.tensor(places, dtype=torch.long, device=self.device)
        for name, pool in self.pools().items():
            setattr(self, name, pool[order])
        fresh = iter(range(len(places)))
        self.tables = [[[next(fresh) for _ in table] for table in self.tables[row]] for row in rows]
        self._lows, self._turns = ([each[row] for row in rows] for each in (self._lows, self._turns))
        self._free = []
        super().select(rows)

    def fill(self, row: int, single: State) -> None:
        """Copy the one sequence of a reserved state into this one: reserved pools have sequence behind sequence."""
        assert isinstance(single, PagedState) and self.max_length == single.max_length is not None
        assert self.slack == single.slack
        for name, source in single.pools().items():
            getattr(self, name)[row * len(source) : (row + 1) * len(source)] = source
        self._lows[row] = single._lows[0]
        super().fill(row, single)
