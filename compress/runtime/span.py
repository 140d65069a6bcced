"""The span rule: which keys a head group sees, keeps and pays for. Masks, cache and cost all read this file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch

PAGE = 64  # tokens in one cache page
BETA_UNIT = 1024  # beta is a multiple of 1/1024, so that S(t) is the same integer in Python, torch and a kernel


def kept_table(rows: Any, device: torch.device | str, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """A tensor of integers that is made once and kept for later passes.

    Autograd saves such tensors, and would refuse one that an earlier pass in inference mode had made.
    """
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=dtype, device=device)


@lru_cache(maxsize=4096)
def cached_table(rows: tuple[Any, ...], device: torch.device, dtype: torch.dtype = torch.long) -> torch.Tensor:
    """`kept_table` of rows that can be hashed, which goes to the device once for all passes."""
    return kept_table(rows, device, dtype)


@dataclass(frozen=True)
class Span:
    """What the query at position t (from 0) sees: key j <= t when

        j < sink   or   t - j < S(t),     S(t) = max(1, floor(alpha + beta * (t + 1))).

    S grows with the query's position and never by more than one token a step, so the first visible key
    never moves back: what is evicted is never needed again, and one-shot prefill, chunked prefill, many
    turns and decoding compute the same function.

    With `granule` 64 the rule moves by whole pages: all queries of a page, those at 64 p to 64 p + 63, have the window
    of the first of them, opened down to the start of a page, and the sink is rounded up to whole pages. What such
    a group does not see are then the keys of the pages that its cache has freed, and `boundary` moves by at most one
    page from one page of queries to the next.

    Args:
        sink: tokens at the start of the sequence that stay visible, >= 0.
        alpha: fixed part of the span in tokens; may be negative.
        beta: share of the position added to the span, 0 <= beta <= 1, a multiple of 1/1024.
        granule: tokens by which the edge of the window moves: 1, or those of a page, 64.

    Raises:
        ValueError: a parameter is outside its range.
    """

    rule: ClassVar[Literal["position"]] = "position"

    sink: int = 0
    alpha: int = 0
    beta: float = 1.0
    granule: int = 1

    def __post_init__(self) -> None:
        if self.granule not in (1, PAGE):
            raise ValueError(f"granule: expected 1 or {PAGE} tokens, got {self.granule}")
        if self.sink != int(self.sink) or self.sink < 0:
            raise ValueError(f"sink: expected a whole number of tokens >= 0, got {self.sink}")
        if self.alpha != int(self.alpha):
            raise ValueError(f"alpha: expected a whole number of tokens, got {self.alpha}")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta: expected 0 <= beta <= 1, got {self.beta}")
        if self.beta * BETA_UNIT != int(self.beta * BETA_UNIT):
            nearest = round(self.beta * BETA_UNIT) / BETA_UNIT
            raise ValueError(f"beta: expected a multiple of 1/{BETA_UNIT}, got {self.beta}; the nearest is {nearest}")
        if self.granule > 1:
            object.__setattr__(self, "sink", -(-self.sink // self.granule) * self.granule)

    @property
    def beta_units(self) -> int:
        """beta as a whole number of 1/1024."""
        return int(self.beta * BETA_UNIT)

    @property
    def is_full(self) -> bool:
        """True when every query sees every earlier key."""
        return self.beta == 1 and -self.alpha < self.granule

    def at_length(self, length: int) -> Span:
        """Itself: the rule by position does not ask how long the input is."""
        return self

    def sees_all(self, length: int) -> bool:
        """True when nothing is hidden from any query of a sequence of `length` tokens."""
        return self.is_full or bool(self.first(length - 1) <= self.sink)

    def length(self, t: int | torch.Tensor) -> Any:
        """S(t) in tokens, for one position or an integer tensor of positions."""
        return span_length(t, self.alpha, self.beta_units)

    def first(self, t: int | torch.Tensor) -> Any:
        """The first key of the window of the query at position t (keys before `sink` are visible besides)."""
        return first_key(t, self.alpha, self.beta_units, self.granule)

    def boundary(self, t: int | torch.Tensor) -> Any:
        """Where the keys end that the query at position t does not see any more: they are `sink` <= j < boundary.

        It never moves back, and is `sink` while there are none; a state that stands for them sums over exactly these.
        """
        first = self.first(t)
        return first.clamp(min=self.sink) if isinstance(first, torch.Tensor) else max(first, self.sink)

    def last_query(self, j: int | torch.Tensor) -> Any:
        """The last query whose window holds key j, at least j itself; `NO_END` where all later ones do."""
        return last_query(j, self.alpha, self.beta_units, self.granule)

    def visible(self, t: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Boolean mask of the rule; t and j are integer positions that broadcast against each other."""
        return visible(t, j, self.sink, self.alpha, self.beta_units, self.granule)

    def keys_seen(self, t: int | torch.Tensor) -> Any:
        """How many keys the query at position t sees."""
        return keys_seen(t, self.sink, self.alpha, self.beta_units, self.granule)

    def pages(self, length: int, low: int | None = None) -> list[int]:
        """Numbers of the pages that a cache of `length` tokens holds, ascending.

        A page is held while the last query (t = length - 1) or a later one can see a token of it. The count
        times the bytes of a page is what the cache allocates, whatever the chunks it was filled with.

        Args:
            low: the fewest tokens that the cache may be taken back to, <= `length`: pages that the query at low - 1
                sees are held, too. None where no token is taken back.
        """
        sink_end, start, end = self.page_bounds(length, low)
        return [*range(sink_end), *range(start, end)]

    def page_count(self, length: int, low: int | None = None) -> int:
        """How many pages `pages` lists."""
        sink_end, start, end = self.page_bounds(length, low)
        return sink_end + end - start

    def page_bounds(self, length: int, low: int | None = None) -> tuple[int, int, int]:
        """End of the sink's page numbers, then start and end of the window's; what `pages` lists."""
        end = -(-length // PAGE)
        sink_end = -(-min(self.sink, length) // PAGE)
        first = self.first((length if low is None else max(low, 0)) - 1)
        return sink_end, max(min(first // PAGE, end), sink_end), end

    def same_pages_until(self, length: int, low: int | None = None, slack: int = 0) -> int:
        """The greatest length at which `pages` is what it is at `length`, if `low` then is `slack` tokens behind."""
        _, start, end = self.page_bounds(length, low)
        return max(length, min(end * PAGE, self.last_query((start + 1) * PAGE - 1) + 1 + slack))

    def reserved_pages(self, max_length: int, slack: int = 0) -> tuple[int, int]:
        """Pages that hold any cache of up to `max_length` tokens: those of the sink, and a ring for the window.

        A window of S tokens lies on at most (S + 62) // 64 + 1 pages, and S never shrinks. A rule by pages takes no
        more, with the S of the first query of a page. With a slack the window of the query that many tokens before
        the last is held, which by pages begins up to 63 tokens earlier still.
        """
        total = -(-max_length // PAGE)
        sinks = -(-min(self.sink, max_length) // PAGE)
        longest = self.length((max_length - 1) & -self.granule) + (slack + self.granule - 1 if slack else 0)
        return sinks, min(total - sinks, (min(longest, max_length) + PAGE - 2) // PAGE + 1)


@dataclass(frozen=True)
class LengthSpan:
    """The span of MoA (arXiv 2406.14909): an input of N tokens has one window for all of its rows,

        S = max(1, floor(alpha + beta * N)),

    which is what `Span` has at the input's last row. It is there to reproduce the paper. N has to be known before the
    first token is seen, so there is no chunked prefill, no second turn, no cache shared between inputs that start
    alike, and no batch of inputs of different lengths. The window stays what the input made it while tokens are
    generated. The paper's code takes N as the input and 1024 tokens more, whatever is generated; that is left out.

    Args:
        sink, alpha, beta: as in `Span`, with the same limits.
    """

    rule: ClassVar[Literal["length"]] = "length"
    is_full: ClassVar[bool] = False  # with beta = 1 the input sees everything, the tokens generated after it do not

    sink: int = 0
    alpha: int = 0
    beta: float = 1.0

    def __post_init__(self) -> None:
        Span(self.sink, self.alpha, self.beta)

    def at_length(self, length: int) -> Span:
        """The fixed window of an input of `length` tokens."""
        return Span(self.sink, Span(self.sink, self.alpha, self.beta).length(length - 1), 0.0)


AnySpan = Span | LengthSpan
FULL = Span(0, 0, 1.0)
NO_END = 2**31 - 1


def own_span(native: int | None) -> Span:
    """What a group of a layer sees as the model has it: everything, or the architecture's own window in tokens."""
    return FULL if native is None else Span(0, native, 0.0)


def span_length(t: Any, alpha: Any, beta_units: Any) -> Any:
    """S(t) from integers or integer tensors that broadcast."""
    span = alpha + ((t + 1) * beta_units) // BETA_UNIT
    return span.clamp(min=1) if isinstance(span, torch.Tensor) else max(1, span)


def first_key(t: Any, alpha: Any, beta_units: Any, granule: Any = 1) -> Any:
    """First key of the window, t + 1 - S(t) but not below 0, from integers or integer tensors that broadcast.

    With a granule, a power of two, t and the result are rounded down to a multiple of it.
    """
    if isinstance(granule, torch.Tensor) or granule != 1:
        return first_key(t & -granule, alpha, beta_units) & -granule
    first = t + 1 - span_length(t, alpha, beta_units)
    return first.clamp(min=0) if isinstance(first, torch.Tensor) else max(0, first)


def keys_seen(t: Any, sink: Any, alpha: Any, beta_units: Any, granule: Any = 1) -> Any:
    """Keys that the query at t sees, from integers or integer tensors: the window's, and the sink's before it."""
    first = first_key(t, alpha, beta_units, granule)
    before = sink - (sink - first) * (sink > first)  # the smaller of the two
    return t + 1 - first + before


def last_query(j: Any, alpha: Any, beta_units: Any, granule: int = 1) -> Any:
    """The inverse of `first_key`: the greatest t with first_key(t) <= j, for a key j (int or tensor) of one rule.

    u = t + 1 has first <= j while u - floor(beta u) - alpha <= j, that is while
    u <= floor(1024 (j + alpha) / (1024 - beta units)). Every query sees at least itself, so t >= j always does.
    With a granule that holds for the last key and the first query of each: the last key of j's granule decides, and
    all queries of a granule see what its first one sees.
    """
    if granule != 1:
        return last_query(j | (granule - 1), alpha, beta_units) | (granule - 1)
    if beta_units == BETA_UNIT:
        never = j + alpha < 0
        return torch.where(never, j, NO_END) if isinstance(j, torch.Tensor) else j if never else NO_END
    last = (BETA_UNIT * (j + alpha)) // (BETA_UNIT - beta_units) - 1
    return torch.maximum(last, j) if isinstance(j, torch.Tensor) else max(last, j)


def visible(t: torch.Tensor, j: torch.Tensor, sink: Any, alpha: Any, beta_units: Any, granule: Any = 1) -> torch.Tensor:
    """Boolean mask of the rule; positions and parameters are integers or integer tensors that broadcast.

    With a granule the sink has to be a multiple of it, as in `Span`.
    """
    return (j <= t) & ((j < sink) | (j >= first_key(t, alpha, beta_units, granule)))


@lru_cache(maxsize=1024)
def rule_columns(spans: tuple[Span, ...], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Sink, alpha, beta units and granule of G spans, `[G, 1]` int64 each, as the rule's functions here take them."""
    rules = [(span.sink, span.alpha, span.beta_units, span.granule) for span in spans]
    return kept_table(rules, device, torch.long).T[:, :, None].unbind()


def native_windows(config: Any, layers: int) -> list[int | None]:
    """Per layer, the sliding window of the architecture itself in tokens; None where a layer sees everything.

    transformers keeps it in two forms: `layer_types` with one `sliding_window` (Qwen2, Qwen3), or a
    `sliding_window` alone that holds for every layer (Mistral, Phi-3). A window of no fewer tokens than the model has
    positions hides nothing and is none (Phi-3 128k).
    """
    window = getattr(config, "sliding_window", None)
    if window is not None and window >= getattr(config, "max_position_embeddings", NO_END):
        window = None
    types = getattr(config, "layer_types", None)
    if types is None:
        return [window] * layers
    return [window if kind == "sliding_attention" else None for kind in types]


RULES: dict[str, type[Span] | type[LengthSpan]] = {kind.rule: kind for kind in (Span, LengthSpan)}


def span_of(group: Mapping[str, Any], native: int | None) -> AnySpan:
    """The span of a plan's `full` or `window` entry, in a layer whose own window is `native`.

    A `full` group of a layer with a window of its own sees that window and no more, as in the original model.

    Raises:
        ValueError: another target, which has no span.
    """
    if group["target"] == "full":
        return own_span(native)
    if group["target"] == "window":
        return RULES[group.get("rule", "position")](group["sink"], group["alpha"], group["beta"])
    raise ValueError(f"the target {group['target']!r} has no span")


def has_length_rule(spans: Iterable[Iterable[AnySpan]]) -> bool:
    """Whether any span of `[layers][groups]` depends on the length of the input."""
    return any(isinstance(span, LengthSpan) for row in spans for span in row)


def spans_at(spans: Iterable[Iterable[AnySpan]], length: int) -> list[list[Span]]:
    """The spans `[layers][groups]` as they are for an input of `length` tokens."""
    return [[span.at_length(length) for span in row] for row in spans]
