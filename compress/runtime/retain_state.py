"""What a `retain` head keeps: the pages of its window, and a compact list of the tokens before it that are kept."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .pages import PagedState, Pages
from .reference import Rows
from .span import BETA_UNIT, PAGE, Span, first_key, kept_table, rule_columns
from .transfer import Coming, send

Cap = tuple[int, float]  # a + b (j + 1) kept tokens at most, once token j has come


@dataclass(frozen=True)
class ListedPages(Pages):
    """Pages as an implementation reads them where a group has a list of kept tokens before its window.

    The table's first `offset` numbers are the pages of the list, which is filled in order: slot v of it is in use while
    v < `listed`. Page number n of the window, tokens 64 n to 64 n + 63, is at `offset` + n.

    Attributes:
        kept: bool `[places, 64, 1]`, of tokens in the window whether they are kept when they leave it.
        listed: `[B, G]` int32 on the device, tokens in the lists.
        offset: pages that the table has for the lists.
        rings: where the table is that of a reserved state, what it follows from: of each group the first place of its
            list, the first of its window and how many the window has, `[G, 3]` int32 on the device; and the places of
            a sequence. None where it has to be read.
    """

    kept: torch.Tensor
    listed: torch.Tensor
    offset: int
    rings: tuple[torch.Tensor, int] | None = None


class RetainState(PagedState):
    """The pages of some `retain` groups: of every sequence and group a window and a list before it.

    Tokens leave the window by whole pages. Those of them that are kept are appended to the list, whose pages come out
    of the same pools, and the page that they lay in is freed; so what is allocated are the pages of the kept
    tokens and those of the window. A token is kept or not from when it is written on; the flags of those in
    the window lie beside their keys. Tokens of the sink are always kept, and are the list's first.

    A reserved state has room in its lists for all tokens that a cap lets in, and without a cap for all that
    `max_length` tokens hide; its table is constant.

    Args:
        spans: what each group sees without what is kept, by whole pages.
        caps: the most tokens behind the sink that each group keeps; None without a limit.
        shares: of hidden tokens that are expected to be kept, for `assume`.
        max_length: tokens to reserve for; None grows.

    Attributes:
        tensors: `listed` and `count`, `[B, G]` int32: tokens in the lists; and tokens behind the sink that are kept,
            those in the window included.
    """

    pooled = ("keys", "values", "kept")
    one_way = (
        "tokens that leave their window go into a list or are dropped at once; that would need both to wait until no "
        "token can be taken back any more"
    )

    def __init__(
        self, spans: Sequence[Span], caps: Sequence[Cap | None], shares: Sequence[float], max_length: int | None
    ) -> None:
        self.sinks = tuple(span.sink for span in spans)
        self.caps, self.shares = tuple(caps), tuple(shares)
        super().__init__([replace(span, sink=0) for span in spans], max_length)

    def reset(self) -> None:
        """See `PagedState.reset`."""
        super().reset()
        self.kept: torch.Tensor | None = None
        self.offset = 0
        self._window: torch.Tensor | None = None
        self._rings: tuple[torch.Tensor, int] | None = None
        self._expected: Coming | None = None  # the lists' lengths behind the pass that runs

    def begin(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """See `PagedState.begin`."""
        super().begin(key, value)
        assert self.keys is not None
        self.kept = value.new_zeros(self.keys.shape[0], PAGE, 1, dtype=torch.bool)
        batch, groups = key.shape[0], len(self.spans)
        # Behind the places of a sequence's windows are those of its lists.
        self.tables = [[[] for _ in range(2 * groups)] for _ in range(batch)]
        for name in ("listed", "count"):
            self.tensors[name] = value.new_zeros(batch, groups, dtype=torch.int32)

    def most_listed(self, group: int, length: int) -> int:
        """The most tokens that a group's list can have in a sequence of `length` tokens."""
        hidden = self.spans[group].first(length - 1)
        sinks = min(self.sinks[group], hidden)
        return sinks + min(hidden - sinks, cap_at(self.caps[group], hidden - 1))

    def _ring_table(self, batch: int, max_length: int) -> tuple[torch.Tensor, int]:
        """The constant table of a reserved state: of each sequence and group its list, and the ring of its window."""
        lists = [-(-self.most_listed(group, max_length) // PAGE) for group in range(len(self.spans))]
        self.offset = max(lists)
        numbers, entries = torch.arange(-(-max_length // PAGE)), torch.arange(self.offset)
        rows, rings, taken = [], [], 0
        for span, listed in zip(self.spans, lists, strict=True):
            _, ring = span.reserved_pages(max_length)
            window = taken + listed + numbers % max(ring, 1)
            rows.append(torch.cat([taken + torch.where(entries < listed, entries, 0), window]))
            rings.append((taken, taken + listed, max(ring, 1)))
            taken += listed + ring
        self._rings = (kept_table(rings, self.device), taken)
        first = torch.arange(batch)[:, None, None] * taken
        return (first + torch.stack(rows)).to(torch.int32).to(self.device), taken * batch

    def pages(self) -> ListedPages:
        """Pools, table and lists as an implementation reads them."""
        table, _ = self._whole_table()
        assert self.keys is not None and self.values is not None and self.kept is not None
        return ListedPages(self.keys, self.values, table, self.kept, self.tensors["listed"], self.offset, self._rings)

    def window(self) -> Pages:
        """The same of the windows alone, where a page has its own number."""
        _, window = self._whole_table()
        assert self.keys is not None and self.values is not None
        return Pages(self.keys, self.values, window)

    def _whole_table(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The table, and a copy of the windows' part of it."""
        if self._table is None:
            groups = len(self.spans)
            self.offset = max((len(places) for row in self.tables for places in row[groups:]), default=0)
            most = max((-(-length // PAGE) for length in self.lengths), default=0)
            shape = (len(self.lengths), groups, self.offset + most)
            numbers = array("i", [-1]) * math.prod(shape)
            for row, tables in enumerate(self.tables):
                for group in range(groups):
                    start = (row * groups + group) * shape[2]
                    listed, window = (array("i", tables[part]) for part in (groups + group, group))
                    numbers[start : start + len(listed)] = listed
                    start += self.offset + (self.held_pages(row, group)[0] if window else 0)
                    numbers[start : start + len(window)] = window
            table = torch.frombuffer(numbers, dtype=torch.int32) if numbers else torch.empty(0, dtype=torch.int32)
            self._table, self._window = send(table.view(shape), self.device), None
        if self._window is None:
            self._window = self._table[:, :, self.offset :].contiguous()
        return self._table, self._window

    def first_keys(self, t: torch.Tensor) -> torch.Tensor:
        """`[B, G]`, first key of the window of the query at position t `[B]` in every group."""
        _, alpha, beta_units, granule = (column[:, 0] for column in rule_columns(self.spans, t.device))
        return torch.as_tensor(first_key(t.long()[:, None], alpha, beta_units, granule))

    def held_bytes(self) -> int:
        """See `PagedState.held_bytes`; waits for the device."""
        if "listed" not in self.tensors:
            return super().held_bytes()
        listed = -(-self.tensors["listed"].long() // PAGE)
        return super().held_bytes() + int(listed.sum()) * self.page_bytes

    def assume(self, length: int) -> None:
        """See `State.assume`: lists are as long as their groups expect."""
        super().assume(length)
        listed, count = [], []
        for group, share in enumerate(self.shares):
            hidden = self.spans[group].first(length - 1)
            sinks = min(self.sinks[group], hidden)
            listed.append(min(sinks + round(share * (hidden - sinks)), self.most_listed(group, length)))
            behind = round(share * max(0, length - self.sinks[group]))
            count.append(min(behind, cap_at(self.caps[group], length - 1)))
        for name, numbers in (("listed", listed), ("count", count)):
            held = self.tensors[name]
            held.copy_(torch.tensor(numbers, dtype=torch.int32, device=held.device).expand_as(held))

    def select(self, rows: Sequence[int]) -> None:
        """See `PagedState.select`."""
        super().select(rows)
        self._window = None

    def write(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kept: torch.Tensor,
        rows: Rows,
        store: Callable[..., None],
        lists: Any = None,
        append: Callable[..., None] | None = None,
    ) -> None:
        """Take in the new tokens of a pass of prefill, and move what leaves the windows into the lists.

        Args:
            key, value: `[B, G, T, D]`.
            kept: `[B, G, T]`, which of them are kept; False where a column is no token.
            rows: which columns are tokens.
            store: writes what stays in the windows, as `reference.store`.
            lists: what leaves them, where the implementation has brought it together already; `append` writes it.
            append: as of `impl.Retain`; None where this does everything.
        """
        if append is not None:
            self._write_lists(key, value, kept, rows, store, lists, append)
            return
        past, _, count = rows.tensor(key.device).long().unbind(1)
        first = self.first_keys(past + count - 1)[..., None]
        positions = rows.positions(key.shape[2], key.device)
        moved = self._leaving(rows.past, rows.count)
        listed = self.tensors["listed"].long()
        entries = []
        if moved and any(rows.past):
            places, at, known = cached_window(self.window(), self.spans, rows, key.device)
            assert self.keys is not None and self.values is not None and self.kept is not None
            leaves = known & (at < first) & self.kept[places].flatten(2)
            slots = (listed[..., None] + leaves.cumsum(-1) - 1)[leaves]
            old = (pool[places].flatten(2, 3)[leaves] for pool in (self.keys, self.values))
            entries.append((leaves.nonzero(), slots, *old))
            listed = listed + leaves.sum(-1)
        if moved:
            leaves = kept & (positions >= 0)[:, None] & (positions[:, None] < first)
            slots = (listed[..., None] + leaves.cumsum(-1) - 1)[leaves]
            entries.append((leaves.nonzero(), slots, *(new.detach()[leaves] for new in (key, value))))
            listed = listed + leaves.sum(-1)
        self.advance(list(rows.count))
        if moved:
            self._take_list_pages(Coming(listed))
        table, _ = self._whole_table()
        for where, slots, *new in entries:
            place = table[where[:, 0], where[:, 1], slots // PAGE].long() * PAGE + slots % PAGE
            for pool, numbers in zip((self.keys, self.values), new, strict=True):
                assert pool is not None
                pool.view(-1, pool.shape[-1])[place] = numbers.to(pool.dtype)
        self.tensors["listed"].copy_(listed)
        window = self.window()
        store(key, value, window, rows, self.spans)
        stays = (positions >= 0)[:, None] & (positions[:, None] >= first)
        row, group, column = stays.nonzero().unbind(1)
        at = positions[row, column]
        assert self.kept is not None
        place = window.table[row, group, at // PAGE].long() * PAGE + at % PAGE
        self.kept.view(-1)[place] = kept[row, group, column]

    def expect(self, leaving: torch.Tensor) -> None:
        """Begin to bring to the host how long the lists will be, for which a growing state takes pages in `write`.

        What is launched between the two, as attention is, runs while the host waits and takes them.

        Args:
            leaving: `[B, G]` int32 tokens that go into the lists in this pass.
        """
        if self.max_length is None:
            self._expected = Coming(self.tensors["listed"] + leaving)

    def _write_lists(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kept: torch.Tensor,
        rows: Rows,
        store: Callable[..., None],
        lists: Any,
        append: Callable[..., None],
    ) -> None:
        """`write` where an implementation has brought together what leaves.

        A reserved state waits for no device, and a growing one for what it has asked for by `expect` alone.
        """
        moved, listed = self._leaving(rows.past, rows.count), self.tensors["listed"]
        if moved and self._expected is None:
            self.expect(lists.leaving)
        self.advance(list(rows.count))
        if moved:
            self._take_list_pages(self._expected)
            self._expected = None
            append(lists, self.pages())
            listed += lists.leaving
        assert self.kept is not None
        window, flags, pool = self.window(), kept.view(torch.uint8)[..., None], self.kept.view(torch.uint8)
        store(key, value, window, rows, self.spans)
        store(flags, flags, Pages(pool, pool, window.table), rows, self.spans)

    def leave(self, lengths: torch.Tensor, gains: Sequence[int] | None) -> None:
        """Move the page that leaves the sight of a new token into the lists, and make room for the token.

        A growing state knows on the host whether there is any; a reserved one always computes, and waits for nothing.

        Args:
            lengths: `[B]` tokens of each sequence, the new one included; 0 where there is none.
            gains: new tokens of each sequence; None where only the device knows.
        """
        if self.max_length is None and gains is not None and not self._leaving(self.lengths, gains):
            self.advance(gains)
            return
        table, window = self._whole_table()
        assert self.keys is not None and self.values is not None and self.kept is not None
        before, after = self.first_keys(lengths - 2), self.first_keys(lengths - 1)
        leaving = (after > before) & (lengths > 0)[:, None]
        number = (before // PAGE).clamp(max=window.shape[-1] - 1)
        place = window.long().gather(2, number[..., None])[..., 0].clamp(min=0)  # [B, G]
        flags = self.kept[place][..., 0] & leaving[..., None]  # [B, G, 64]
        slots = self.tensors["listed"].long()[..., None] + flags.cumsum(-1) - 1
        listed = self.tensors["listed"] + flags.sum(-1)
        old = [pool[place] for pool in (self.keys, self.values)]
        if gains is not None:
            self.advance(gains)
        if self.max_length is None:
            self._take_list_pages(Coming(listed))
            table, _ = self._whole_table()
        if self.offset:
            number = (slots // PAGE).clamp(min=0, max=self.offset - 1)
            target = table.long().gather(2, number) * PAGE + slots % PAGE
            for pool, numbers in zip((self.keys, self.values), old, strict=True):
                flat = pool.view(-1, pool.shape[-1])
                if self.max_length is None:
                    flat[target[flags]] = numbers[flags]
                else:  # the others are written where they are, which changes nothing
                    own = place[..., None] * PAGE + torch.arange(PAGE, device=place.device)
                    flat[torch.where(flags, target, own)] = numbers
        self.tensors["listed"].copy_(listed)

    def make_room(self, lengths: torch.Tensor, gains: Sequence[int] | None) -> bool:
        """As `leave`, but that a reserved state leaves the page to who stores the token; whether it does."""
        if self.max_length is None:
            self.leave(lengths, gains)
        elif gains is not None:
            self.advance(gains)
        return self.max_length is not None

    def store_one(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kept: torch.Tensor,
        lengths: torch.Tensor,
        store_one: Callable[..., None],
    ) -> None:
        """Write one token a sequence, `[B, G, D]` and whether it is kept, `[B, G]`, once `leave` has made room for it.

        Args:
            lengths: `[B]` tokens of each sequence, this one included; 0 where there is none.
            store_one: writes keys and values, as `reference.store_one`.
        """
        window = self.window()
        assert self.kept is not None
        store_one(key, value, window, lengths, self.spans)
        self.store_last(self.kept, kept[..., None], window.table, lengths)

    def _leaving(self, lengths: Sequence[int], gains: Sequence[int]) -> bool:
        """Whether any page leaves a window with `gains` more tokens, by the lengths that the host knows."""
        return any(
            span.first(past + count - 1) > span.first(past - 1)
            for past, count in zip(lengths, gains, strict=True)
            if count
            for span in self.spans
        )

    def _take_list_pages(self, listed: Coming | None) -> None:
        """Take what pages a growing state's lists need for `[B, G]` tokens."""
        if self.max_length is not None or listed is None:
            return
        groups, missing = len(self.spans), []
        for tables, numbers in zip(self.tables, listed.wait(), strict=True):
            for places, number in zip(tables[groups:], numbers, strict=True):
                if (count := -(-number // PAGE) - len(places)) > 0:
                    missing.append((places, count))
        if missing:
            self._grow(sum(count for _, count in missing) - len(self._free))
            self._table = None
        for places, count in missing:
            places += self._free[: -count - 1 : -1]
            del self._free[-count:]


def cap_at(cap: Cap | None, j: int) -> int:
    """How many tokens a group may keep once token j has come: a + b (j + 1), and j + 1 without a cap."""
    return j + 1 if cap is None else min(j + 1, cap[0] + (j + 1) * int(cap[1] * BETA_UNIT) // BETA_UNIT)


def cached_window(
    pages: Pages, spans: Sequence[Span], rows: Rows, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the tokens are that the windows held before a pass.

    Args:
        pages: of the windows alone.

    Returns:
        Places of pages `[B, G, M]`; positions `[B, G, 64 M]` of the slots in them; and whether a token is there.
    """
    first = [[span.first(past - 1) // PAGE for span in spans] for past in rows.past]
    ends = [-(-past // PAGE) for past in rows.past]
    most = max(end - start for starts, end in zip(first, ends, strict=True) for start in starts)
    numbers = torch.tensor(first, device=device)[..., None] + torch.arange(most, device=device)
    known = numbers < torch.tensor(ends, device=device)[:, None, None]
    places = pages.table.long().gather(2, numbers.clamp(max=max(pages.table.shape[-1] - 1, 0)))
    positions = (numbers[..., None] * PAGE + torch.arange(PAGE, device=device)).flatten(2)
    past = rows.tensor(device)[:, :1, None]
    return places.where(known, 0).clamp(min=0), positions, positions < past
