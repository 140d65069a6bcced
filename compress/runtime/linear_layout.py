"""Where a pass's hidden keys and its queries lie, in whole pages: the bookkeeping between columns and states."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from .pages import Pages
from .reference import Rows
from .span import PAGE, Span, kept_table


@dataclass(frozen=True)
class Layout:
    """What a linear branch does with the new columns of a pass, or with a part of them.

    The keys that a state may have to take in follow each other from `begin`, the boundary of the query before the first
    new one, where a page starts: cached ones first, then new ones. The queries are laid out from the start of the page
    that the first of them lies in. All that follows is one page of keys and one page of queries after another.

    Attributes:
        past, start: `[B, 1]`, of the whole pass, as in `Rows`.
        after, until: `[B, 1]`, positions of the first of these queries and of the one behind the last.
        begin: `[B, G]`, position of the first key.
        keys: `[B, G]`, how many keys there are from there.
        chunks: pages of keys, N.
        columns: new ones of the pass, T.
        page: `[B, 1]`, position of the first query's page.
        pages: pages of queries, P.
        chunk: `[B, G, P]`, which of the N + 1 states the queries of a page read: the one before their boundary.
        last: `[B, G]`, which of the states is the one for the next pass.
        slice_from: the column of the first key where no column is padding, nothing is cached and all groups begin
            alike, so that all of this is a slice; None elsewhere.
    """

    past: torch.Tensor
    start: torch.Tensor
    after: torch.Tensor
    until: torch.Tensor
    begin: torch.Tensor
    keys: torch.Tensor
    chunks: int
    columns: int
    page: torch.Tensor
    pages: int
    chunk: torch.Tensor
    last: torch.Tensor
    slice_from: int | None

    def keys_of(self, new: torch.Tensor, pages: Pages | None, pool: torch.Tensor | None) -> torch.Tensor:
        """Of every key `[B, G, 64 * N, D]` what `new` `[B, G, T, D]` has of the columns, and `pool` of what is cached.

        Where `new` has more than T columns, its last T are meant, and those before are of the tokens before. What lies
        behind the last key may be anything.
        """
        size = self.chunks * PAGE
        if self.slice_from is not None:
            taken = new[:, :, self.slice_from : self.slice_from + size]
            return taken if taken.shape[2] == size else torch.nn.functional.pad(taken, (0, 0, 0, size - taken.shape[2]))
        positions = self.key_positions(new.device)
        ahead = new.shape[2] - self.columns
        column = (positions - self.past[..., None] + self.start[..., None] + ahead).clamp(0, new.shape[2] - 1)
        found = new.gather(2, column[..., None].expand(-1, -1, -1, new.shape[-1]))
        if pages is None or pool is None:
            return found
        number = (positions // PAGE).clamp(max=pages.table.shape[-1] - 1)
        place = pages.table.long().gather(2, number).clamp(min=0) * PAGE + positions % PAGE
        old = pool.view(-1, pool.shape[-1])[place].to(new.dtype)
        return torch.where((positions < self.past[..., None])[..., None], old, found)

    def key_positions(self, device: torch.device) -> torch.Tensor:
        """`[B, G, 64 * N]`."""
        return self.begin[..., None] + torch.arange(self.chunks * PAGE, device=device)

    def queries_of(self, new: torch.Tensor) -> torch.Tensor:
        """Queries `[B, H, T, D]` by pages, `[B, H, 64 * P, D]`; zero in slots without one."""
        size = self.pages * PAGE
        if self.slice_from is not None:
            return torch.nn.functional.pad(new, (0, 0, 0, size - new.shape[2]))
        positions = self.query_positions(new.device)
        column = (positions - self.past + self.start).clamp(0, new.shape[2] - 1)
        found = new.gather(2, column[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[-1]))
        absent = (positions < self.after) | (positions >= self.until)
        return found.masked_fill(absent[:, None, :, None], 0)

    def query_positions(self, device: torch.device) -> torch.Tensor:
        """`[B, 64 * P]`."""
        return self.page + torch.arange(self.pages * PAGE, device=device)

    def columns_of(self, paged: torch.Tensor, columns: int) -> torch.Tensor:
        """The inverse of `queries_of`: `[B, H, 64 * P, E]` to `[B, H, T, E]`; zero where a column is none of these."""
        if self.slice_from is not None:
            return paged[:, :, :columns]
        position = self.past - self.start + torch.arange(columns, device=paged.device)  # [B, T]
        slot = (position - self.page).clamp(0, max(self.pages * PAGE - 1, 0))
        found = paged.gather(2, slot[:, None, :, None].expand(-1, paged.shape[1], -1, paged.shape[-1]))
        absent = (position < self.after) | (position >= self.until)
        return found.masked_fill(absent[:, None, :, None], 0)


def layouts(
    rows: Rows, spans: tuple[Span, ...], columns: int, alone: bool, longest: int, device: torch.device
) -> tuple[Layout, ...]:
    """The layouts of a pass, one for every `longest` tokens of each sequence: the states of one are held at a time.

    Args:
        spans: one per head group, of whole pages.
        columns: T.
        alone: whether queries also read the keys of their own page from the layout's keys.
        longest: a multiple of 64.
    """
    return _layouts(rows, spans, columns, alone, longest, device)


@lru_cache(maxsize=256)
def _layouts(
    rows: Rows, spans: tuple[Span, ...], columns: int, alone: bool, longest: int, device: torch.device
) -> tuple[Layout, ...]:
    parts = max(1, -(-max(rows.count, default=0) // longest))
    return tuple(_layout(rows, spans, columns, alone, part, longest, parts, device) for part in range(parts))


def _layout(
    rows: Rows,
    spans: tuple[Span, ...],
    columns: int,
    alone: bool,
    part: int,
    longest: int,
    parts: int,
    device: torch.device,
) -> Layout:
    ends = [past + count for past, count in zip(rows.past, rows.count, strict=True)]
    after = [min(past + part * longest, end) for past, end in zip(rows.past, ends, strict=True)]
    until = [min(first + longest, end) for first, end in zip(after, ends, strict=True)]
    begin = [[span.boundary(first - 1) for span in spans] for first in after]
    final = [[span.boundary(end - 1) for span in spans] for end in until]
    stop = [[end] * len(spans) for end in until] if alone else final
    keys = [[max(0, end - first) for first, end in zip(*row, strict=True)] for row in zip(begin, stop, strict=True)]
    page = [first // PAGE * PAGE for first in after]
    # A pass of padding alone has a page, too, in which there is nothing.
    pages = max(1, *(-(-(end - first) // PAGE) for first, end in zip(page, until, strict=True)))
    chunks = max(int(alone), *(-(-number // PAGE) for row in keys for number in row))
    t = torch.tensor(page)[:, None] + torch.arange(pages) * PAGE  # [B, P]
    bounds = torch.stack([span.boundary(t) for span in spans], dim=1)
    chunk = ((bounds - torch.tensor(begin)[..., None]) // PAGE).clamp(0, chunks)
    last = [[(b - a) // PAGE for a, b in zip(*row, strict=True)] for row in zip(begin, final, strict=True)]
    alike = len({first for row in begin for first in row}) == 1
    whole = parts == 1 and not any(rows.past) and rows.is_whole(columns) and alike

    def table(values: object) -> torch.Tensor:
        return kept_table(values, device, torch.long)

    def column(values: object) -> torch.Tensor:
        return table(values)[:, None]

    return Layout(
        past=column(rows.past),
        start=column(rows.start),
        after=column(after),
        until=column(until),
        begin=table(begin),
        keys=table(keys),
        chunks=chunks,
        columns=columns,
        page=column(page),
        pages=pages,
        chunk=table(chunk.tolist()).view(len(page), len(spans), pages),
        last=table(last),
        slice_from=begin[0][0] if whole else None,
    )


@lru_cache(maxsize=16)  # shared by the layers of a pass; one has as many rows as the windows have tokens
def waiting(rows: Rows, spans: tuple[Span, ...], device: torch.device) -> torch.Tensor:
    """The new tokens of a pass that stay in pages until a state takes them in, for every sequence and group.

    Returns:
        `[K, 4]`: sequence, group, column, position.
    """
    found = [torch.empty(0, 4, dtype=torch.long)]
    for row, (past, start, count) in enumerate(zip(rows.past, rows.start, rows.count, strict=True)):
        for group, span in enumerate(spans):
            first = max(past, span.boundary(past + count - 1))
            positions = torch.arange(first, max(first, past + count))
            places = torch.tensor([row, group]).expand(len(positions), 2)
            found.append(torch.cat([places, (positions - past + start)[:, None], positions[:, None]], dim=1))
    with torch.inference_mode(False):
        return torch.cat(found).to(device)
