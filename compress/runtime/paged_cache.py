"""The KV cache of a planned model: 64-token pages per head group, freed as soon as no later query can see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .span import PAGE, Span


class PagedLayer(CacheLayerMixin):
    """Pages of one layer.

    One pool `[pages, 64, head_dim]` for keys and one for values serves all sequences and head groups; `tables`
    maps (sequence, group) to pool pages, in the order of `Span.pages`. Padding is never stored: every sequence
    has a length of its own. transformers' `update` only passes the new tokens through, because it does not know
    which of them are padding; the attention function calls `append`.

    What is stored is detached: gradients flow through the new tokens of a forward pass, not through the cache.

    The pool is never larger than the most pages that were held at once, so its size is what the plan predicts
    (`Span.page_count`) up to the one page a group that a window needs when its start is not on a page boundary.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, spans: Sequence[Span]) -> None:
        super().__init__()
        self.spans = tuple(spans)
        self.reset()

    def reset(self) -> None:
        """Forget everything and free the pool."""
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.is_initialized = False
        self.columns = 0  # tokens seen, padding included: what transformers calls the sequence length
        self.lengths: list[int] = []  # tokens stored or evicted per sequence, without padding
        self.tables: list[list[list[int]]] = []  # [sequences][groups] -> pool pages
        self._free: list[int] = []
        self._index: tuple[torch.Tensor, torch.Tensor] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take batch size, head size, dtype and device from the first tokens, `[B, G, T, D]`."""
        batch, groups, _, head_dim = key_states.shape
        if groups != len(self.spans):
            raise ValueError(f"key/value heads: expected {len(self.spans)} as in the plan, got {groups}")
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty(0, PAGE, head_dim)
        self.values = value_states.new_empty(0, PAGE, value_states.shape[-1])
        self.lengths = [0] * batch
        self.tables = [[[] for _ in self.spans] for _ in range(batch)]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count the new columns and hand the tokens `[B, G, T, D]` on to the attention function."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != len(self.lengths):
            raise ValueError(f"batch size: expected {len(self.lengths)} as cached, got {key_states.shape[0]}")
        self.columns += key_states.shape[-2]
        return key_states, value_states

    def pages(self, row: int, group: int) -> list[int]:
        """Numbers (not pool places) of the pages that are held for one sequence and group."""
        return self.spans[group].pages(self.lengths[row])

    def history(self, rows: Sequence[int], group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What is stored of one group for sequences of equal length: keys and values `[B, M, D]`, positions `[M]`."""
        assert self.keys is not None and self.values is not None
        length = self.lengths[rows[0]]
        numbers = torch.tensor(self.pages(rows[0], group), dtype=torch.long, device=self.device)
        positions = self._slots(numbers)
        stored = positions < length
        places = torch.tensor([self.tables[row][group] for row in rows], dtype=torch.long, device=self.device)
        keys = self.keys[places].flatten(1, 2)[:, stored]
        values = self.values[places].flatten(1, 2)[:, stored]
        return keys, values, positions[stored]

    def append(self, keys: torch.Tensor, values: torch.Tensor, rows: Sequence[int]) -> None:
        """Store the next T tokens `[len(rows), G, T, D]` of sequences of equal length, and free what they outdate."""
        old = self.lengths[rows[0]]
        new = old + keys.shape[-2]
        self._advance(rows, new)
        for group in range(len(self.spans)):
            numbers = torch.tensor(self.pages(rows[0], group), dtype=torch.long, device=self.device)
            positions = self._slots(numbers)
            fresh = (positions >= old) & (positions < new)
            places = torch.tensor([self.tables[row][group] for row in rows], dtype=torch.long, device=self.device)
            slots = self._slots(places)[:, fresh]
            source = positions[fresh] - old
            self._write(slots, keys[:, group, source], values[:, group, source])

    def append_one(self, keys: torch.Tensor, values: torch.Tensor, rows: Sequence[int]) -> None:
        """Store one token `[len(rows), G, 1, D]` of sequences whose lengths may differ."""
        for row in rows:
            self._advance([row], self.lengths[row] + 1)
        last = [[table[-1] * PAGE + (self.lengths[row] - 1) % PAGE for table in self.tables[row]] for row in rows]
        self._write(torch.tensor(last, dtype=torch.long, device=self.device), keys[:, :, 0], values[:, :, 0])

    def table(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Page table for a decode kernel: pool places and page numbers, `[B, G, most pages]`, -1 where unused."""
        if self._index is None:
            most = max((len(table) for row in self.tables for table in row), default=0)
            places = [[table + [-1] * (most - len(table)) for table in row] for row in self.tables]
            numbers = [
                [held + [-1] * (most - len(held)) for held in (self.pages(b, g) for g in range(len(self.spans)))]
                for b in range(len(self.tables))
            ]
            shape = (len(self.tables), len(self.spans), most)
            self._index = (
                torch.tensor(places, dtype=torch.long, device=self.device).view(shape),
                torch.tensor(numbers, dtype=torch.long, device=self.device).view(shape),
            )
        return self._index

    def allocated_bytes(self) -> int:
        """Bytes of the pool as allocated, keys and values."""
        return sum(pool.untyped_storage().nbytes() for pool in (self.keys, self.values) if pool is not None)

    def held_bytes(self) -> int:
        """Bytes of the pages in use; `allocated_bytes` less the free list."""
        if self.keys is None or self.values is None:
            return 0
        used = sum(len(table) for row in self.tables for table in row)
        return used * PAGE * (self.keys.shape[-1] * self.keys.itemsize + self.values.shape[-1] * self.values.itemsize)

    def _slots(self, pages: torch.Tensor) -> torch.Tensor:
        """Token numbers of whole pages, `[..., P]` to `[..., P * 64]`."""
        return (pages[..., None] * PAGE + torch.arange(PAGE, device=self.device)).flatten(-2)

    def _write(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put tokens `[..., D]` into the pool's slots `[...]`."""
        assert self.keys is not None and self.values is not None
        self.keys.view(-1, self.keys.shape[-1])[slots] = keys.detach().to(self.dtype)
        self.values.view(-1, self.values.shape[-1])[slots] = values.detach().to(self.dtype)

    def _advance(self, rows: Sequence[int], new: int) -> None:
        """Bring sequences of equal length to `new` tokens: free the pages that leave a span, take those that enter."""
        old = self.lengths[rows[0]]
        for row in rows:
            self.lengths[row] = new
        turning = [g for g, span in enumerate(self.spans) if span.page_bounds(old) != span.page_bounds(new)]
        if not turning:
            return
        self._index = None
        entering: list[tuple[int, int, list[int], dict[int, int]]] = []
        missing = 0
        for group in turning:
            before, after = self.spans[group].pages(old), self.spans[group].pages(new)
            staying = set(after)
            for row in rows:
                held = dict(zip(before, self.tables[row][group], strict=True))
                self._free += [place for number, place in held.items() if number not in staying]
                missing += sum(number not in held for number in after)
                entering.append((row, group, after, held))
        self._grow(missing - len(self._free))
        for row, group, after, held in entering:
            self.tables[row][group] = [held[number] if number in held else self._free.pop() for number in after]

    def _grow(self, count: int) -> None:
        """Add `count` pages to the pool; exactly as many as lack, since an idle page is memory nobody saved."""
        if count <= 0:
            return
        assert self.keys is not None and self.values is not None
        size = self.keys.shape[0]
        self.keys = torch.cat([self.keys, self.keys.new_zeros(count, *self.keys.shape[1:])])
        self.values = torch.cat([self.values, self.values.new_zeros(count, *self.values.shape[1:])])
        self._free += range(size, size + count)

    def _select(self, indices: Sequence[int]) -> None:
        """Make the batch the given sequences, in this order; one that is named twice is copied."""
        if not self.is_initialized:
            return
        assert self.keys is not None and self.values is not None
        places = [place for row in indices for table in self.tables[row] for place in table]
        order = torch.tensor(places, dtype=torch.long, device=self.device)
        self.keys, self.values = self.keys[order], self.values[order]
        fresh = iter(range(len(places)))
        self.tables = [[[next(fresh) for _ in table] for table in self.tables[row]] for row in indices]
        self.lengths = [self.lengths[row] for row in indices]
        self._free = []
        self._index = None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the sequences for beam search."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the given sequences."""
        self._select(torch.arange(len(self.lengths))[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        self._select([row for row in range(len(self.lengths)) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: an evicted page cannot come back. Raises ValueError unless there is nothing to remove."""
        if tokens_to_remove != 0:
            raise ValueError(
                "a paged cache cannot be cropped: pages outside a head group's window are freed for good. "
                "Assisted decoding and other methods that take tokens back need the dense model."
            )

    def offload(self) -> None:
        """Refused: the pool stays where the model is."""
        raise ValueError("a paged cache cannot be offloaded; use the dense model with cache_implementation='offloaded'")

    def get_seq_length(self) -> int:
        """Columns seen so far, padding and evicted tokens included."""
        return self.columns

    def get_max_length(self) -> int:
        """-1: grows without bound."""
        return -1

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over all columns."""
        return self.columns + query_length, 0


class PagedCache(Cache):
    """One `PagedLayer` per layer, with the padding seen so far.

    Args:
        spans: the plan's spans, `[layers][groups]`.
    """

    def __init__(self, spans: Sequence[Sequence[Span]]) -> None:
        self.paged = [PagedLayer(row) for row in spans]
        super().__init__(layers=list(self.paged))
        self.seen: torch.Tensor | None = None  # [B, columns] bool, which columns were tokens; None while all were

    def allocated_bytes(self) -> int:
        """Bytes of all pools as allocated."""
        return sum(layer.allocated_bytes() for layer in self.paged)

    def held_bytes(self) -> int:
        """Bytes of all pages in use: `kv_bytes` of the plan, summed over the sequences."""
        return sum(layer.held_bytes() for layer in self.paged)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.seen = None

    def reorder_cache(self, beam_idx: Any) -> None:
        """Reorder the sequences for beam search."""
        super().reorder_cache(beam_idx)
        if self.seen is not None:
            self.seen = self.seen.index_select(0, beam_idx.to(self.seen.device))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the given sequences."""
        super().batch_select_indices(indices)
        if self.seen is not None:
            self.seen = self.seen[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        super().batch_repeat_interleave(repeats)
        if self.seen is not None:
            self.seen = self.seen.repeat_interleave(repeats, dim=0)
