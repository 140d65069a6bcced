"""What a unit, or a whole plan, costs for an input of one length: integers that add up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from itertools import accumulate

from compress.runtime.span import BETA_UNIT, PAGE, AnySpan, Span, spans_at


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
    """

    held_bytes: int = 0
    read_bytes: int = 0
    keys: int = 0
    flops: int = 0
    parameters: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, units: int) -> Cost:
        """The cost of so many equal units."""
        return Cost(*(value * units for value in astuple(self)))

    @staticmethod
    def total(costs: Iterable[Cost]) -> Cost:
        """The sum of costs; of none, nothing."""
        return Cost(*map(sum, zip(astuple(Cost()), *map(astuple, costs), strict=True)))


def page_bytes(head_dim: int, itemsize: int) -> int:
    """Bytes of one cache page of one head group: keys and values of 64 tokens."""
    return PAGE * 2 * head_dim * itemsize


def kv_bytes(spans: Iterable[Iterable[AnySpan]], length: int, head_dim: int, itemsize: int) -> int:
    """Bytes that the paged cache holds for one sequence of `length` tokens under a plan's spans `[layers][groups]`."""
    pages = sum(span.page_count(length) for row in spans_at(spans, length) for span in row)
    return pages * page_bytes(head_dim, itemsize)


def dense_kv_bytes(groups: int, length: int, head_dim: int, itemsize: int) -> int:
    """Bytes that transformers' own cache holds for one sequence: `length` tokens in each of all `groups`."""
    return groups * length * 2 * head_dim * itemsize


def stock_kv_bytes(
    windows: Sequence[int | None], kv_heads: int | Sequence[int], length: int, head_dim: int, itemsize: int
) -> int:
    """Bytes that transformers' own cache holds for one sequence while it decodes token `length`.

    Args:
        kv_heads: key/value heads of every layer, or layer by layer.
        windows: per layer, its sliding window in tokens; None where it sees everything. A sliding layer keeps
            `window - 1` tokens between two steps, and the new one is beside them while a step runs.
    """
    heads = [kv_heads] * len(windows) if isinstance(kv_heads, int) else kv_heads
    return sum(
        dense_kv_bytes(own, length if window is None else min(length, window), head_dim, itemsize)
        for own, window in zip(heads, windows, strict=True)
    )


def prefill_density(spans: Iterable[Iterable[AnySpan]], length: int) -> float:
    """Visible pairs of query and key over causal pairs in a prefill, all head groups together, token by token.

    One minus this is the prefill sparsity of Sparse Frontier (arXiv 2504.17768), which counts whole blocks.
    """
    counts = Counter(span for row in spans_at(spans, length) for span in row)
    seen = sum(number * visible_pairs(span, length) for span, number in counts.items())
    return seen / (counts.total() * length * (length + 1) / 2)


def visible_pairs(span: Span, length: int) -> int:
    """Pairs of a query and a key that it sees, over all queries of `length` tokens in one query head.

    The query at u - 1 sees min(u, sink + max(1, alpha + floor(beta u))) keys. The second number grows no faster than
    the first, so the first is the smaller one up to some u; what is behind is a sum of known form.
    """

    def window(u: int) -> int:
        return span.alpha + u * span.beta_units // BETA_UNIT

    low, high = 0, length  # the last u whose query sees every key before it
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle <= span.sink + max(1, window(middle)) else (low, middle - 1)
    grows = low + 1  # the first u from which on the window has more than the query's own key
    if span.alpha < 1:
        steps = (1 - span.alpha) * BETA_UNIT
        grows = max(grows, -(-steps // span.beta_units)) if span.beta_units else length + 1
    grows = min(grows, length + 1)
    own, wider = grows - low - 1, length - grows + 1
    growth = floor_sum(length, span.beta_units) - floor_sum(grows - 1, span.beta_units)
    return low * (low + 1) // 2 + (own + wider) * span.sink + own + wider * span.alpha + growth


def floor_sum(count: int, units: int) -> int:
    """The sum of floor(u x units / 1024) over u from 1 to `count`: whole periods of 1024 numbers, and the rest."""
    periods, rest = divmod(count, BETA_UNIT)
    sums = _floor_sums(units)
    whole = periods * sums[-1] + BETA_UNIT * units * periods * (periods - 1) // 2
    return whole + sums[rest] + rest * periods * units


@lru_cache(maxsize=BETA_UNIT + 1)
def _floor_sums(units: int) -> list[int]:
    """The same for every count of 0 to 1024."""
    return [0, *accumulate(u * units // BETA_UNIT for u in range(1, BETA_UNIT + 1))]


def visible_keys(span: AnySpan, length: int) -> int:
    """Keys that the query at the end of `length` tokens sees in one head group."""
    fixed = span.at_length(length)
    first = int(fixed.first(length - 1))
    return length - first + min(fixed.sink, first)


def decode_density(spans: Iterable[Iterable[AnySpan]], length: int) -> float:
    """Keys that the query at the end of `length` tokens sees over all keys, all head groups together.

    One minus this is the decode sparsity of Sparse Frontier; the bytes held are whole pages, `kv_bytes`.
    """
    counts = Counter(span for row in spans for span in row)
    return sum(number * visible_keys(span, length) for span, number in counts.items()) / (counts.total() * length)
