"""The KV cache of a planned model: 64-token pages per head group, freed as soon as no later query can see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, StaticCache

from .span import PAGE, AnySpan, Span, has_length_rule, spans_at


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


class PagedLayer(CacheLayerMixin):
    """Pages of one layer.

    One pool `[pages, 64, head_dim]` for keys and one for values serves all sequences and head groups. Padding is
    never stored: every sequence has a length of its own. transformers' `update` only passes the new tokens
    through, because it does not know which of them are padding; the attention function stores them.

    What is stored is detached: gradients flow through the new tokens of a forward pass, not through the cache.

    A growing layer takes pages as they are needed: its pool is never larger than the most pages that were held at
    once, so its size is what the plan predicts (`Span.page_count`) up to the one page a group that a window needs
    when its start is not on a page boundary. A reserved one takes at its first use all that `max_length` tokens
    will need (`Span.reserved_pages`); its table is then constant, the pages of a window following each other
    in a ring, so that a decode step changes nothing but what lies on the device.

    Args:
        spans: one per head group.
        max_length: tokens to reserve for; None grows.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, spans: Sequence[Span], max_length: int | None = None) -> None:
        super().__init__()
        self.spans = tuple(spans)
        self.max_length = max_length
        self.reset()

    def reset(self) -> None:
        """Forget everything and free the pool."""
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.is_initialized = False
        self.given = False  # new tokens came by `update`, and the attention function has not taken them yet
        self.columns = 0  # tokens seen, padding included: what transformers calls the sequence length
        self.lengths: list[int] = []  # tokens stored or evicted per sequence, without padding
        self.tables: list[list[list[int]]] = []  # [sequences][groups] -> pool pages in the order of Span.pages
        self._free: list[int] = []
        self._turns: list[int] = []  # per sequence, the length up to which its pages stay the same
        self._table: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take batch size, head size, dtype and device from the first tokens, `[B, G, T, D]`.

        The dtype is that of the values. Under autocast they are as the projections gave them, and keys are wider,
        because RoPE is computed in float32.
        """
        batch, groups, _, head_dim = key_states.shape
        if groups != len(self.spans):
            raise ValueError(f"key/value heads: expected {len(self.spans)} as in the plan, got {groups}")
        self.dtype, self.device = value_states.dtype, value_states.device
        pages = 0
        if self.max_length is not None:
            self._table, pages = self._ring_table(batch, self.max_length)
        self.keys = key_states.new_zeros(pages, PAGE, head_dim, dtype=self.dtype)
        self.values = value_states.new_zeros(pages, PAGE, value_states.shape[-1])
        self.lengths = [0] * batch
        self.tables = [[[] for _ in self.spans] for _ in range(batch)]
        self._turns = [0] * batch
        self.is_initialized = True

    def _ring_table(self, batch: int, max_length: int) -> tuple[torch.Tensor, int]:
        """The constant table of a reserved layer, and the pages of its pool, sequence by sequence."""
        numbers = torch.arange(-(-max_length // PAGE))
        rows, taken = [], 0
        for span in self.spans:
            sinks, ring = span.reserved_pages(max_length)
            rows.append(taken + torch.where(numbers < sinks, numbers, sinks + (numbers - sinks) % max(ring, 1)))
            taken += sinks + ring
        first = torch.arange(batch)[:, None, None] * taken
        return (first + torch.stack(rows)).to(torch.int32).to(self.device), taken * batch

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand the tokens `[B, G, T, D]` on to the attention function."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != len(self.lengths):
            raise ValueError(f"batch size: expected {len(self.lengths)} as cached, got {key_states.shape[0]}")
        self.given = True
        return key_states, value_states

    def held_pages(self, row: int, group: int) -> list[int]:
        """Numbers (not pool places) of the pages that are held for one sequence and group."""
        return self.spans[group].pages(self.lengths[row])

    def advance(self, gains: Sequence[int]) -> None:
        """Bring the sequences to their new lengths: free the pages that leave a span, take those that enter."""
        for row, gain in enumerate(gains):
            new = self.lengths[row] + gain
            if self.max_length is None and new > self._turns[row]:
                self._turn(row, new)
            else:
                self.lengths[row] = new

    def pages(self) -> Pages:
        """Pools and table as an implementation reads them."""
        assert self.keys is not None and self.values is not None
        if self._table is None:
            most = max((self.spans[0].page_bounds(length)[2] for length in self.lengths), default=0)
            table = torch.full((len(self.lengths), len(self.spans), most), -1, dtype=torch.int32)
            for row, groups in enumerate(self.tables):
                for group, places in enumerate(groups):
                    table[row, group, self.held_pages(row, group)] = torch.tensor(places, dtype=torch.int32)
            self._table = table.to(self.device)
        return Pages(self.keys, self.values, self._table)

    def allocated_bytes(self) -> int:
        """Bytes of the pool as allocated, keys and values."""
        return sum(pool.untyped_storage().nbytes() for pool in (self.keys, self.values) if pool is not None)

    def held_bytes(self) -> int:
        """Bytes of the pages in use; `allocated_bytes` less the free list."""
        if self.keys is None or self.values is None:
            return 0
        used = sum(span.page_count(length) for span in self.spans for length in self.lengths)
        return used * PAGE * (self.keys.shape[-1] * self.keys.itemsize + self.values.shape[-1] * self.values.itemsize)

    def _turn(self, row: int, new: int) -> None:
        """Bring one sequence to a length at which it holds other pages than before."""
        old = self.lengths[row]
        self.lengths[row] = new
        self._turns[row] = min(span.same_pages_until(new) for span in self.spans)
        self._table = None
        entering: list[tuple[int, list[int], dict[int, int]]] = []
        missing = 0
        for group, span in enumerate(self.spans):
            after = span.pages(new)
            staying = set(after)
            held = dict(zip(span.pages(old), self.tables[row][group], strict=True))
            self._free += [place for number, place in held.items() if number not in staying]
            missing += sum(number not in held for number in after)
            entering.append((group, after, held))
        self._grow(missing - len(self._free))
        for group, after, held in entering:
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
        if self.max_length is not None:
            each = self.keys.shape[0] // len(self.lengths)
            places = [place for row in indices for place in range(row * each, (row + 1) * each)]
            self._table = self._ring_table(len(indices), self.max_length)[0]
        else:
            places = [place for row in indices for table in self.tables[row] for place in table]
            self._table = None
        order = torch.tensor(places, dtype=torch.long, device=self.device)
        self.keys, self.values = self.keys[order], self.values[order]
        fresh = iter(range(len(places)))
        self.tables = [[[next(fresh) for _ in table] for table in self.tables[row]] for row in indices]
        self.lengths = [self.lengths[row] for row in indices]
        self._turns = [self._turns[row] for row in indices]
        self._free = []

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
    """One `PagedLayer` per layer, the padding seen so far, and the lengths on the device.

    Args:
        spans: the plan's spans, `[layers][groups]`. Those by length are fixed by `resolve`, which the model calls
            with the length of its first input.
        max_length: reserve all pages for that many tokens a sequence at the first use. A decode step then needs
            nothing from the host, so a CUDA graph can hold it; `synchronize` tells the host what replays did.
            None takes pages as they are needed.
    """

    def __init__(self, spans: Sequence[Sequence[AnySpan]], max_length: int | None = None) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length: expected at least one token, got {max_length}")
        self.rules = spans if has_length_rule(spans) else None
        # A layer has no spans while they wait for a length; those by position are the same at any.
        known: list[list[Span]] = [[] for _ in spans] if self.rules is not None else spans_at(spans, 1)
        self.paged = [PagedLayer(row, max_length) for row in known]
        super().__init__(layers=list(self.paged))
        self.plan = spans
        self.max_length = max_length
        self.interrupted = False  # an error left some layers with the tokens of a pass and others without
        self.lengths: torch.Tensor | None = None  # [B] int32 on the device, tokens of each sequence
        self.width: torch.Tensor | None = None  # [1] int32 on the device, columns so far
        self.seen: torch.Tensor | None = None  # [B, columns] bool, which columns were tokens; None while all were

    def resolve(self, length: int) -> None:
        """Fix the windows of spans by length for an input of `length` tokens, before the first of them is stored."""
        if self.rules is not None:
            for layer, row in zip(self.paged, spans_at(self.rules, length), strict=True):
                layer.spans = tuple(row)

    def begin(self, batch: int, device: torch.device) -> torch.Tensor:
        """The sequences' lengths before this forward pass, `[B]` int32 on the device."""
        if self.lengths is None or not self.paged[0].is_initialized:
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
            self.width = torch.zeros(1, dtype=torch.int32, device=device)
        return self.lengths

    def check(self, plan: Sequence[Sequence[AnySpan]], batch: int) -> None:
        """Whether a pass of `batch` sequences under this plan can go into the cache.

        Raises:
            ValueError: it holds the pages of another plan, other sequences, or half of a pass that failed.
        """
        if self.interrupted:
            raise ValueError(
                "the cache holds a part of a forward pass that ended in an error; start again with model.new_cache(), "
                "or call reset() on this one"
            )
        if self.plan is not plan:
            if self.plan != plan:
                raise ValueError("the cache was made for another plan than the model has now; use model.new_cache()")
            self.plan = plan  # found at once the next time
        if self.paged[0].is_initialized and batch != len(self.paged[0].lengths):
            raise ValueError(f"batch size: expected {len(self.paged[0].lengths)} as cached, got {batch}")

    def check_room(self, gains: Sequence[int] | None) -> None:
        """Raise ValueError where a reserved cache has no room for as many more tokens of each sequence."""
        if self.max_length is None or gains is None:
            return
        past = self.paged[0].lengths or [0] * len(gains)
        most = max(held + gain for held, gain in zip(past, gains, strict=True))
        if most > self.max_length:
            raise ValueError(
                f"the cache was reserved for {self.max_length} tokens, and a sequence comes to {most}; "
                "make it with a larger max_length"
            )

    def synchronize(self) -> None:
        """Read the lengths back from the device, where replays of a CUDA graph have advanced them."""
        if self.lengths is None or self.width is None or not self.paged[0].is_initialized:
            return
        *lengths, width = torch.cat([self.lengths, self.width]).tolist()
        for layer in self.paged:
            layer.lengths = list(lengths)
            layer.columns = width

    def assume(self, length: int) -> None:
        """Say that every sequence holds `length` tokens, whatever the reserved pages contain: for measurements."""
        if self.max_length is None or self.lengths is None or self.width is None or length > self.max_length:
            raise ValueError(f"assume({length}): needs a cache that was reserved for as many tokens, and used once")
        self.lengths.fill_(length)
        self.width.fill_(length)
        for layer in self.paged:
            layer.lengths = [length] * len(layer.lengths)
            layer.columns = length

    def allocated_bytes(self) -> int:
        """Bytes of all pools as allocated."""
        return sum(layer.allocated_bytes() for layer in self.paged)

    def held_bytes(self) -> int:
        """Bytes of all pages in use: `kv_bytes` of the plan, summed over the sequences."""
        return sum(layer.held_bytes() for layer in self.paged)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.interrupted = False
        self.lengths = None
        self.width = None
        self.seen = None

    def _select(self, indices: torch.Tensor) -> None:
        if self.lengths is not None:
            self.lengths = self.lengths[indices.to(self.lengths.device)]
        if self.seen is not None:
            self.seen = self.seen[indices.to(self.seen.device)]

    def reorder_cache(self, beam_idx: Any) -> None:
        """Reorder the sequences for beam search."""
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the given sequences."""
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        super().batch_repeat_interleave(repeats)
        if self.lengths is not None:
            self._select(torch.arange(len(self.lengths)).repeat_interleave(repeats))


def check_foreign(cache: Any) -> None:
    """Raise ValueError, with the name of its class, unless a cache is a `PagedCache` or `adopt` can make it one."""
    if cache is None or isinstance(cache, PagedCache):
        return
    name = type(cache).__name__
    if type(cache) not in (DynamicCache, StaticCache) or getattr(cache, "offloading", False):
        article = "an" if name[:1] in "AEIOU" else "a"
        kind = f"an offloaded {name}" if getattr(cache, "offloading", False) else f"{article} {name}"
        if hasattr(cache, "paged"):
            kind = f"a {name} of another checkpoint"
        raise ValueError(
            "past_key_values: a planned model keeps keys and values in a PagedCache of its own and cannot fill "
            f"{kind}; leave it out, or pass model.new_cache()"
        )
    if any(int(layer.get_seq_length()) > 0 for layer in cache.layers):
        raise ValueError(
            f"past_key_values: expected the model's PagedCache, got a {name} that holds tokens already, as another "
            "model or prefix tuning makes it; start with past_key_values=None or model.new_cache(). Of PEFT's "
            "prompt methods prompt tuning and p-tuning work, prefix tuning does not"
        )


def adopt(cache: Any, spans: Sequence[Sequence[AnySpan]]) -> PagedCache:
    """Turn a cache that the caller holds, and that `check_foreign` lets pass, into one of this plan, in place.

    The object stays the caller's, so a loop that passes it again finds its tokens. A `StaticCache` becomes a cache that
    is reserved for as many tokens; where all layers slide it does not know how many, and the cache grows.
    """
    if isinstance(cache, PagedCache):
        return cache
    most = [layer.max_cache_len for layer in cache.layers if hasattr(layer, "max_cache_len") and not layer.is_sliding]
    made = PagedCache(spans, max(most, default=None))
    cache.__class__ = PagedCache
    vars(cache).update(vars(made))
    adopted: PagedCache = cache
    return adopted
