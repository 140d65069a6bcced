"""The retain target: a window, sinks, and those older tokens that a scorer says to keep; the others are freed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from compress.errors import one_of
from compress.limits import ENTRIES, FACTOR, LONGEST
from compress.registry import Method, targets
from compress.runtime.mixer_retain import KNOWN
from compress.runtime.retain_state import cap_at
from compress.runtime.scorers import SCORERS
from compress.runtime.span import BETA_UNIT, NO_END, PAGE, Span
from compress.targets.cost import Cost
from compress.targets.span import visible_keys, visible_pairs
from compress.targets.target import Target, Thresholds
from compress.targets.unit import Unit

SCORER_NAMES = tuple(sorted(name for name, made in SCORERS.items() if made in KNOWN))
LEVELS = 64  # shares that thresholds are measured for are multiples of one of so many
COUNTERS = 2 * 4  # bytes that a sequence and group has beside its pages: tokens in the list, and tokens that are kept


def _known(name: str) -> str:
    if name not in SCORERS:
        raise ValueError(f"expected {one_of(SCORER_NAMES, name)}, got {name}")
    return name


class RetainGrid(Method):
    """The heads that keep tokens to choose from: every scorer with every window, share and cap."""

    scorers: Annotated[
        tuple[Annotated[str, AfterValidator(_known)], ...],
        Field(min_length=1, max_length=ENTRIES, description=f"what judges tokens: {', '.join(SCORER_NAMES)}"),
    ] = ("ridge",)
    sinks: Annotated[
        tuple[Annotated[int, Field(ge=0, le=LONGEST)], ...],
        Field(min_length=1, max_length=ENTRIES, description="tokens at the start that stay visible, in whole pages"),
    ] = (4,)
    alphas: Annotated[
        tuple[Annotated[int, Field(ge=1, le=LONGEST)], ...],
        Field(min_length=1, max_length=ENTRIES, description="windows in tokens"),
    ] = (128,)
    shares: Annotated[
        tuple[Annotated[float, Field(ge=1 / LEVELS, le=1 - 1 / LEVELS)], ...],
        Field(
            min_length=1,
            max_length=ENTRIES,
            description="shares of the tokens before the window that are kept, from 1/64 to 63/64; each head group "
            "gets the threshold that keeps such a share",
        ),
    ] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
    caps: Annotated[
        tuple[Annotated[float, Field(ge=1, le=FACTOR)] | None, ...],
        Field(
            min_length=1,
            max_length=ENTRIES,
            description="hard bounds, as multiples of the share: `[1.5]` lets a text keep half as many tokens again, "
            "beside a page; null has none",
        ),
    ] = (None,)


@targets.register("retain")
class RetainGroup(Target):
    """Sees a window by whole pages, and those tokens before it that a scorer says to keep; the others are freed.

    What is kept depends on the text, so a cost is an expectation: `share` and `spread` say what is known of it.
    """

    runtime: ClassVar[str | None] = "compress.runtime.mixer_retain"
    noun: ClassVar[str] = "retention"
    objective: ClassVar[str | None] = "reconstruction"
    in_expectation: ClassVar[bool] = True
    grid: ClassVar[type[Method] | None] = RetainGrid

    target: Literal["retain"] = "retain"
    sink: int = Field(4, ge=0, lt=NO_END, description="tokens at the start that stay visible, in whole pages of 64")
    alpha: int = Field(128, gt=-NO_END, lt=NO_END, description="fixed part of the window, tokens")
    beta: float = Field(0.0, ge=0, le=1, description="share of the position added to the window, a multiple of 1/1024")
    scorer: Annotated[str, AfterValidator(_known)] = Field(
        description=f"what judges a token when it is written: {', '.join(SCORER_NAMES)}"
    )
    threshold: Annotated[float, Field(allow_inf_nan=False)] | Literal["share"] | None = Field(
        None,
        description="score from which on a token is kept; null keeps all that a cap lets in; `share` stands for the "
        "threshold that keeps `share`, which a preparation of the scorer says for every head group",
    )
    share: float = Field(
        1.0, ge=0, le=1, description="share of the tokens before the window that is expected to be kept"
    )
    spread: float = Field(0.0, ge=0, le=1, description="standard deviation of that share over documents")
    cap: tuple[Annotated[int, Field(ge=0, le=LONGEST)], Annotated[float, Field(ge=0, le=1)]] | None = Field(
        None,
        description="a and b: at most a + floor(b (j + 1)) tokens behind the sink are kept once token j, from 0, has "
        "come; b is a multiple of 1/1024",
    )

    @model_validator(mode="after")
    def _fits(self) -> RetainGroup:
        self.span()
        if self.cap is not None:
            try:
                Span(0, 0, self.cap[1])
            except ValueError as error:
                raise ValueError(str(error).replace("beta", "cap")) from None
        if self.open and not 1 / LEVELS <= self.share <= 1 - 1 / LEVELS:
            raise ValueError(
                f"threshold: expected a share from 1/{LEVELS} to {LEVELS - 1}/{LEVELS}, for which there are "
                f"thresholds, got {self.share:g}"
            )
        return self

    @property
    def open(self) -> bool:
        """Whether its threshold is the one that keeps `share`."""
        return self.threshold == "share"

    @property
    def idle(self) -> bool:
        """Whether it keeps all tokens."""
        return self.threshold is None and self.cap is None

    @property
    def bounded(self) -> bool:
        """Whether a cap says how many tokens are kept at most."""
        return self.cap is not None

    def placed(self, thresholds: Thresholds | None, layer: int, group: int) -> RetainGroup:
        """With the threshold that keeps `share` in one head group, and the spread of that."""
        if not self.open or thresholds is None:
            return self
        found, spread = (float(values[layer, group]) for values in thresholds.at(self.share))
        return self if math.isnan(found) else self.model_copy(update={"threshold": found, "spread": spread})

    @property
    def anywhere(self) -> RetainGroup:
        """With `share` in place of a threshold, where there is one for its share."""
        if self.threshold is None or not 1 / LEVELS <= self.share <= 1 - 1 / LEVELS:
            return self
        return self.model_copy(update={"threshold": "share", "spread": 0.0})

    def with_share(self, share: float) -> RetainGroup:
        """See `Target.with_share`; its threshold is open then, and a cap is as many times the share as before."""
        cap = self.cap
        if cap is not None and self.share:
            cap = (cap[0], min(math.ceil(cap[1] * share / self.share * BETA_UNIT), BETA_UNIT) / BETA_UNIT)
        return self.model_copy(update={"threshold": "share", "share": share, "spread": 0.0, "cap": cap})

    def with_threshold(self, threshold: float, share: float, spread: float) -> RetainGroup:
        """See `Target.with_threshold`."""
        return self.model_copy(update={"threshold": threshold, "share": share, "spread": spread})

    @property
    def chooser(self) -> str:
        """See `Target.chooser`."""
        return f"{self._seen}, by {self.scorer}"

    @property
    def _seen(self) -> str:
        """What is seen without the tokens that are kept, in words."""
        grows = f" + {self.beta:g} of the position" if self.beta else ""
        return f"sink {self.sink}, window {self.alpha}{grows}"

    @classmethod
    def average(cls, groups: Sequence[RetainGroup]) -> RetainGroup:
        """The first with the mean share."""
        return groups[0].model_copy(update={"share": sum(group.share for group in groups) / len(groups)})

    @classmethod
    def ranges(cls, groups: Sequence[RetainGroup]) -> str:
        """Of shares and thresholds, and of how far the share of a text is from the expected one."""
        scores = [group.threshold for group in groups if isinstance(group.threshold, float)]
        if not scores:
            return ""
        shares, spreads = ([100 * getattr(group, name) for group in groups] for name in ("share", "spread"))
        parts = [f"shares {_range(shares, '.3g')}%"] if len(set(shares)) > 1 else []
        parts.append(f"threshold{'s' if len(set(scores)) > 1 else ''} {_range(scores, '.3g')}")
        return ", ".join([*parts, f"shares of texts deviate by {_range(spreads, '.2g')} points"])

    @classmethod
    def options(cls, unit: Unit, lengths: Sequence[int], grid: RetainGrid | None = None) -> list[Target]:
        """Every scorer, window, share and cap of the grid, with open thresholds; none in a layer that slides."""
        if unit.native is not None:
            return []
        grid = grid or RetainGrid()
        made: list[Target] = []
        for scorer, sink, alpha, share, times in product(grid.scorers, grid.sinks, grid.alphas, grid.shares, grid.caps):
            cap = None if times is None else (PAGE, min(math.ceil(times * share * BETA_UNIT), BETA_UNIT) / BETA_UNIT)
            fields: dict[str, Any] = {"scorer": scorer, "sink": sink, "alpha": alpha, "share": share, "cap": cap}
            made.append(cls(threshold="share", **fields))
        return made

    @property
    def untrained(self) -> bool:  # type: ignore[override]
        """Scorers by norms are of use as they are; what a preparation says of these is which threshold keeps what."""
        made = SCORERS[self.scorer]
        return not (made.fitted or made.stepped)

    @property
    def prepared_as(self) -> RetainGroup:
        """A scorer serves every window, threshold and cap."""
        return RetainGroup(scorer=self.scorer)

    def span(self) -> Span:
        """What is seen without the tokens that are kept, by whole pages."""
        return Span(self.sink, self.alpha, self.beta, granule=PAGE)

    def measured(self, threshold: float | None, share: float, spread: float) -> RetainGroup:
        """See `Target.measured`."""
        return self.model_copy(update={"threshold": threshold, "share": share, "spread": spread})

    def listed(self, length: int) -> tuple[float, int]:
        """Tokens behind the sink that have left the window of `length` tokens and are kept: expected, and at most."""
        return self._listed(self.span(), length - 1)

    def _listed(self, span: Span, t: int) -> tuple[float, int]:
        """The same of the query at t: of the tokens that its span hides, those that it sees."""
        hidden = int(span.boundary(t)) - span.sink
        most = min(hidden, cap_at(self.cap, span.sink + hidden - 1)) if hidden else 0
        return min(self.share * hidden, most), most

    def _listed_pairs(self, span: Span, length: int, hidden: int) -> int:
        """Pairs of a query and a kept token that its span hides, of `hidden` that it hides."""
        if self.cap is None:
            return round(self.share * hidden)
        return round(sum(self._listed(span, t)[0] * min(PAGE, length - t) for t in range(0, length, PAGE)))

    def cost(self, unit: Unit, length: int) -> Cost:
        """Pages of the window, of the sink and of the expected list, with a flag for every token, and two counters.

        A list of n tokens fills n / 64 pages, and half of one more on average, but no less than one, no more than one a
        token, and no more than hold all tokens that are hidden.

        Raises:
            ValueError: tokens are asked for; no stock architecture has this target.
        """
        if not unit.paged:
            raise self.no_stock_form()
        span, dim = self.span(), unit.head_dim
        kept, most = self.listed(length)
        all_pages = -(-most // PAGE) * PAGE
        listed = round(min(max(kept + (PAGE - 1) / 2, PAGE), PAGE * kept, all_pages))
        slots = span.page_count(length) * PAGE + listed
        spread = min(self.spread * (int(span.boundary(length - 1)) - span.sink), most)
        pairs = visible_pairs(span, length)
        pairs += self._listed_pairs(span, length, length * (length + 1) // 2 - pairs)
        made = SCORERS[self.scorer]
        flops = 4 * dim * unit.query_heads * pairs + made.flops(unit.hidden_size, dim) * length
        own = made.parameter_count(unit.hidden_size, dim) if unit.parameters else 0
        return Cost(
            held_bytes=slots * (unit.token_bytes + 1) + COUNTERS,
            read_bytes=slots * unit.token_bytes,
            keys=visible_keys(span, length) + round(kept),
            flops=flops,
            parameters=unit.parameters + own,
            heads=unit.query_heads,
            spread_bytes=round(spread * (unit.token_bytes + 1)),
            over_bytes=(all_pages - listed) * (unit.token_bytes + 1),
        )

    def words(self, native: int | None = None) -> str:
        most = "" if self.cap is None else f", at most {self.cap[0]} + {self.cap[1]:g} of the position"
        kept = "all" if self.threshold is None else f"{100 * self.share:.3g}%"
        return f"{self._seen}, before it {kept} by {self.scorer}{most}"

    def short(self, native: int | None = None) -> str:
        """`K sink|window` and the share that is kept."""
        return f"K {self.sink}|{self.alpha}{f'+{self.beta:g}t' if self.beta else ''} {100 * self.share:.3g}%"

    def rule_text(self) -> str:
        return (
            "with p the first position of the query's page of 64 tokens, the query sees key j when `j` is in the pages "
            "of the first `sink` tokens, not before the page of position `p + 1 - max(1, floor(alpha + beta * (p + "
            "1)))`, or kept. A token is kept, from when it is written on, when its scorer gives it `threshold` or more "
            "and, with a `cap` of a and b, fewer than `a + floor(b * (j + 1))` tokens behind the sink are kept before "
            "it. What is not kept is freed for good when it leaves the window."
        )


def _range(values: Sequence[float], form: str) -> str:
    low, high = (format(value, form) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
