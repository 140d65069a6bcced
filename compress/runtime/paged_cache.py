"""The KV cache of a planned model: for every layer what its mixers keep, and the lengths and padding of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, StaticCache

from .mixer import Kinds, State


class CacheLayer(CacheLayerMixin):
    """The states of one layer's mixers, as a cache layer of transformers.

    Padding is never stored: every sequence has a length of its own. transformers' `update` only passes the new tokens
    through, because it does not know which of them are padding; the mixers store them.

    Args:
        kinds: the layer's mixers; only their empty states are kept.
        max_length: tokens to reserve for; None grows.
    """

    is_compileable = False
    is_sliding = False

    def __init__(self, kinds: Kinds, max_length: int | None = None) -> None:
        super().__init__()
        self.groups = kinds.count
        self.targets = tuple(mixer.targets[0] for mixer in kinds.mixers)
        self.states: tuple[State, ...] = kinds.states(max_length)
        self.reset()

    def reset(self) -> None:
        """Forget everything and free the memory."""
        for state in self.states:
            state.reset()
        self.is_initialized = False
        self.given = False  # new tokens came by `update`, and the attention function has not taken them yet
        self.columns = 0  # tokens seen, padding included: what transformers calls the sequence length

    @property
    def lengths(self) -> list[int]:
        """Tokens stored or dropped per sequence, without padding; empty before the first."""
        return self.states[0].lengths

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take batch size, head size, dtype and device from the first tokens, `[B, G, T, D]`.

        The dtype is that of the values. Under autocast they are as the projections gave them, and keys are wider,
        because RoPE is computed in float32.
        """
        groups = key_states.shape[1]
        if groups != self.groups:
            raise ValueError(f"key/value heads: expected {self.groups} as in the plan, got {groups}")
        self.dtype, self.device = value_states.dtype, value_states.device
        self.sizes = (key_states.shape[-1], value_states.shape[-1])
        for state in self.states:
            state.begin(key_states, value_states)
        self.is_initialized = True

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

    def count(self, lengths: Sequence[int], columns: int) -> None:
        """Take over what the device has counted: tokens of each sequence, and columns."""
        for state in self.states:
            state.lengths = list(lengths)
        self.columns = columns

    def fill(self, row: int, single: CacheLayer, batch: int) -> None:
        """Copy the one sequence of a layer of the same plan, reserved for as many tokens, to row `row` of `batch`."""
        if not self.is_initialized:
            options: dict[str, Any] = {"dtype": single.dtype, "device": single.device}
            self.lazy_initialization(*(torch.empty(batch, self.groups, 1, size, **options) for size in single.sizes))
        for state, source in zip(self.states, single.states, strict=True):
            state.fill(row, source)

    def allocated_bytes(self) -> int:
        """Bytes of the states as allocated."""
        return sum(state.allocated_bytes() for state in self.states)

    def held_bytes(self) -> int:
        """Bytes of what is in use; `allocated_bytes` less what is free for more tokens."""
        return sum(state.held_bytes() for state in self.states)

    def _select(self, rows: Sequence[int]) -> None:
        """Make the batch the given sequences, in this order; one that is named twice is copied."""
        if self.is_initialized:
            for state in self.states:
                state.select(rows)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the sequences for beam search."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the given sequences."""
        self._select(torch.arange(len(self.lengths))[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        self._select([row for row in range(len(self.lengths)) for _ in range(repeats)])

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether the last token of a sequence can always be taken back."""
        return all(state.is_croppable for state in self.states)

    def take_back(self, counts: Sequence[int], columns: int) -> None:
        """Take back the last tokens of each sequence, which lie in as many last columns."""
        for state in self.states:
            state.crop(counts)
        self.columns -= columns

    def offload(self) -> None:
        """Refused: the states stay where the model is."""
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
    """One `CacheLayer` per layer, the padding seen so far, and the lengths on the device.

    Args:
        layers: the mixers of every layer. Rules by length are fixed by `resolve`, which the model calls with the
            length of its first input.
        max_length: reserve memory for that many tokens a sequence at the first use. A decode step then needs
            nothing from the host, so a CUDA graph can hold it; `synchronize` tells the host what replays did.
            None takes memory as it is needed.
        slack: last tokens that `crop` can always take back, see `hold`.
    """

    def __init__(self, layers: Sequence[Kinds], max_length: int | None = None, slack: int = 0) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length: expected at least one token, got {max_length}")
        self.paged = [CacheLayer(kinds, max_length) for kinds in layers]
        super().__init__(layers=list(self.paged))
        self.plan: tuple[str, ...] = tuple(kinds.key for kinds in layers)
        self.max_length = max_length
        self.interrupted = False  # an error left some layers with the tokens of a pass and others without
        self.lengths: torch.Tensor | None = None  # [B] int32 on the device, tokens of each sequence
        self.width: torch.Tensor | None = None  # [1] int32 on the device, columns so far
        self.seen: torch.Tensor | None = None  # [B, columns] bool, which columns were tokens; None while all were
        self.slack = 0
        self.hold(slack)

    def resolve(self, length: int) -> None:
        """Fix what depends on the length of the input, `length` tokens, before the first of them is stored."""
        for layer in self.paged:
            for state in layer.states:
                state.resolve(length)

    def begin(self, batch: int, device: torch.device) -> torch.Tensor:
        """The sequences' lengths before this forward pass, `[B]` int32 on the device."""
        if self.lengths is None or not self.paged[0].is_initialized:
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
            self.width = torch.zeros(1, dtype=torch.int32, device=device)
        return self.lengths

    def check(self, plan: tuple[str, ...], batch: int) -> None:
        """Whether a pass of `batch` sequences under a plan, the keys of its layers, can go into the cache.

        Raises:
            ValueError: it holds the tokens of another plan, other sequences, or half of a pass that failed.
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

    def hold(self, slack: int) -> None:
        """Free pages `slack` tokens later from now on, so that as many last tokens can be taken back by `crop`.

        A group with a window then holds up to ceil(slack / 64) pages more, and one that sees everything none.
        `allocated_bytes` and `held_bytes` count them. A cache that holds as many already stays as it is.

        Raises:
            ValueError: a kind of head group cannot take tokens back, or the memory is reserved for less.
        """
        if slack < 0:
            raise ValueError(f"slack: expected 0 or more tokens, got {slack}")
        if slack <= self.slack:
            return
        for number, layer in enumerate(self.paged):
            for target, state in zip(layer.targets, layer.states, strict=True):
                if state.one_way is not None:
                    raise ValueError(
                        f"slack: no token can be taken back from the `{target}` groups of layer {number}: "
                        f"{state.one_way}"
                    )
        if self.max_length is not None and self.paged[0].is_initialized:
            raise ValueError(
                f"slack: this cache was reserved for taking {self.slack} tokens back, and {slack} were asked for; make "
                "it with a larger slack"
            )
        self.slack = slack
        for layer in self.paged:
            for state in layer.states:
                state.hold(slack)

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last columns back, as if they had not been given: what an assistant drafted and was not accepted.

        Args:
            tokens_to_remove: less than 0, how many, as since transformers 5.24; more than 0, how many columns to leave.

        Raises:
            ValueError: they are more than there are, or pages that would be needed again are freed. The cache is then
                what it was.
        """
        if self.max_length is not None:
            self.synchronize()
        held = self.get_seq_length()
        columns = max(held - tokens_to_remove, 0) if tokens_to_remove > 0 else -tokens_to_remove
        if columns == 0:
            return
        if columns > held:
            raise ValueError(f"crop: {columns} tokens cannot be taken back from a cache of {held}")
        counts = [columns] * len(self.paged[0].lengths)
        if self.seen is not None:
            counts = self.seen[:, held - columns :].sum(1).tolist()
        for number, layer in enumerate(self.paged):
            for target, state in zip(layer.targets, layer.states, strict=True):
                reason = state.crop_refusal(counts)
                if reason is not None:
                    raise ValueError(
                        f"crop: {columns} tokens cannot be taken back from the `{target}` groups of layer {number}: "
                        f"{reason}"
                    )
        for layer in self.paged:
            layer.take_back(counts, columns)
        assert self.lengths is not None and self.width is not None
        with torch.inference_mode(self.lengths.is_inference()):  # they stay where they lie, as a CUDA graph has them
            self.lengths -= torch.tensor(counts, dtype=torch.int32, device=self.lengths.device)
            self.width -= columns
        if self.seen is not None:
            self.seen = self.seen[:, : held - columns]

    def synchronize(self) -> None:
        """Read the lengths back from the device, where replays of a CUDA graph have advanced them."""
        if self.lengths is None or self.width is None or not self.paged[0].is_initialized:
            return
        *lengths, width = torch.cat([self.lengths, self.width]).tolist()
        for layer in self.paged:
            layer.count(lengths, width)

    def assume(self, length: int) -> None:
        """Say that every sequence holds `length` tokens, whatever the reserved pages contain: for measurements."""
        if self.max_length is None or self.lengths is None or self.width is None or length > self.max_length:
            raise ValueError(f"assume({length}): needs a cache that was reserved for as many tokens, and used once")
        self.lengths.fill_(length)
        self.width.fill_(length)
        for layer in self.paged:
            layer.columns = length
            for state in layer.states:
                state.assume(length)

    def allocated_bytes(self) -> int:
        """Bytes of all states as allocated."""
        return sum(layer.allocated_bytes() for layer in self.paged)

    def held_bytes(self) -> int:
        """Bytes of all that is in use: what the plan predicts, summed over the sequences."""
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


def adopt(cache: Any, layers: Sequence[Kinds]) -> PagedCache:
    """Turn a cache that the caller holds, and that `check_foreign` lets pass, into one of this plan, in place.

    The object stays the caller's, so a loop that passes it again finds its tokens. A `StaticCache` becomes a cache that
    is reserved for as many tokens; where all layers slide it does not know how many, and the cache grows.
    """
    if isinstance(cache, PagedCache):
        return cache
    most = [layer.max_cache_len for layer in cache.layers if hasattr(layer, "max_cache_len") and not layer.is_sliding]
    made = PagedCache(layers, max(most, default=None))
    cache.__class__ = PagedCache
    vars(cache).update(vars(made))
    adopted: PagedCache = cache
    return adopted
