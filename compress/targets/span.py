"""The base of targets whose head groups see a span of keys: all answers follow from the span."""

from __future__ import annotations

from abc import abstractmethod
from functools import lru_cache
from itertools import accumulate
from typing import ClassVar

from compress.runtime.span import BETA_UNIT, PAGE, AnySpan, Span
from compress.targets.cost import Cost
from compress.targets.target import StockForm, Target
from compress.targets.unit import Unit


def representable(beta: float) -> float:
    """A share of the position as it is, where a span can have it.

    Raises:
        ValueError: it is no multiple of 1/1024.
    """
    Span(0, 0, beta)
    return beta


class SpanTarget(Target):
    """Sees a span of keys (runtime/span.py), keeps what it may see again, and reads what it keeps."""

    noun: ClassVar[str] = "a window"
    takes_back: ClassVar[bool] = True

    @abstractmethod
    def span(self, native: int | None = None) -> AnySpan:
        """What a group sees in a layer that slides over `native` tokens by itself, as the runtime has it."""

    def cost(self, unit: Unit, length: int) -> Cost:
        """In pages: those of the sink and the window. In tokens: what transformers' cache keeps of the window, one of
        them new while a step runs.

        Raises:
            ValueError: tokens are asked for, and no stock architecture has this target.
        """
        span = self.span(unit.native).at_length(length)
        if unit.paged:
            held = span.page_count(length) * PAGE
        else:
            form = self.stock(unit.native)
            if form is None:
                raise self.no_stock_form()
            held = length if form.window is None else min(length, form.window)
        held_bytes = held * unit.token_bytes
        flops = 4 * unit.head_dim * unit.query_heads * visible_pairs(span, length)
        keys = visible_keys(span, length)
        return Cost(held_bytes, held_bytes, keys, flops, unit.parameters, heads=unit.query_heads)

    def words(self, native: int | None = None) -> str:
        span = self.span(native)
        if span.is_full:
            return "sees everything"
        grows = f" + {span.beta:g} of the {span.rule}" if span.beta else ""
        return f"sink {span.sink}, window {span.alpha}{grows}"

    def short(self, native: int | None = None) -> str:
        """`full`, or `sink|window` and what it grows by: a share of the position t, or of the input's N tokens."""
        span = self.span(native)
        if span.is_full:
            return "full"
        growth_text = f"+{span.beta:g}{'t' if span.rule == 'position' else 'N'}" if span.beta else ""
        return f"{span.sink}|{span.alpha}{growth_text}"

    def rule_text(self) -> str:
        if self.by_length:
            return (
                'an input of N tokens has the window `max(1, floor(alpha + beta * N))` (`"rule": "length"`) in all of '
                "its rows and in what is generated after it, beside `sink` tokens at the start. This is the published "
                "form of MoA and is there to compare with; the rule by position can do what this one refuses."
            )
        return "the query at position t sees key j when `j < sink` or `t - j < max(1, floor(alpha + beta * (t + 1)))`."

    def stock(self, native: int | None) -> StockForm | None:
        """A layer that sees everything, or one that slides: over a fixed window of 2 tokens or more without sinks."""
        span = self.span(native)
        if span.is_full:
            return StockForm()
        if self.by_length or span.sink or span.beta or span.alpha < 2:
            return None
        return StockForm(span.alpha)

    @property
    def by_length(self) -> bool:
        """Whether the window is worked out from the length of the input."""
        return self.span().rule == "length"


@lru_cache(maxsize=4096)
def visible_pairs(span: Span, length: int) -> int:
    """Pairs of a query and a key that it sees, over all queries of `length` tokens in one query head.

    The query at u - 1 sees min(u, sink + max(1, alpha + floor(beta u))) keys. The second number grows no faster than
    the first, so the first is the smaller one up to some u; what is behind is a sum of known form. Where the rule moves
    by pages, the queries of a page have one window each, and the pages are added up.
    """
    if span.granule > 1:
        starts = range(0, length, span.granule)
        hidden = sum((span.boundary(t) - span.sink) * min(span.granule, length - t) for t in starts)
        return length * (length + 1) // 2 - hidden

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
    growing, wider = grows - low - 1, length - grows + 1
    growth = floor_sum(length, span.beta_units) - floor_sum(grows - 1, span.beta_units)
    return low * (low + 1) // 2 + (growing + wider) * span.sink + growing + wider * span.alpha + growth


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
    return int(span.at_length(length).keys_seen(length - 1))
