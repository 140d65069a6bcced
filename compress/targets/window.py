"""The window target, and the grid that it is chosen from: which (sink, alpha, beta) a head group may get."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from compress.errors import UserError
from compress.limits import ENTRIES, LONGEST
from compress.registry import Method, targets
from compress.runtime.span import BETA_UNIT, FULL, NO_END, PAGE, RULES, AnySpan, LengthSpan, Span
from compress.targets.span import SpanTarget, representable
from compress.targets.target import Target
from compress.targets.unit import Unit


@dataclass(frozen=True)
class Rule:
    """One rule of a grid.

    Attributes:
        span: what the rule lets a query see.
        index: position in the axes [sinks, betas, alphas] of an influence table; None for full attention, which
            loses nothing and needs no table.
    """

    span: Span
    index: tuple[int, int, int] | None


def _sorted_unique(values: tuple[float, ...]) -> bool:
    return all(low < high for low, high in pairwise(values))


class SpanGrid(Method):
    """The rules that a profile prices and a search chooses from: full attention, and every sink x beta x alpha.

    Alphas are whole cache pages because a finer step changes no allocated byte at lengths of whole pages.
    The default covers fixed windows (beta 0) and windows that grow with the position.
    """

    sinks: Annotated[
        tuple[Annotated[int, Field(le=LONGEST)], ...],
        Field(min_length=1, max_length=ENTRIES, description="tokens at the start that stay visible, ascending"),
    ] = (64,)
    betas: Annotated[
        tuple[float, ...],
        Field(
            min_length=1,
            max_length=ENTRIES,
            description="shares of the position that the window grows by, ascending, multiples of 1/1024; 1 is full",
        ),
    ] = tuple(eighth / 8 for eighth in range(9))
    alpha_min: Annotated[
        int,
        Field(
            ge=-LONGEST,
            le=LONGEST,
            multiple_of=PAGE,
            description="smallest fixed part of the window in tokens, a multiple of 64",
        ),
    ] = 64
    alpha_max: Annotated[
        int | None,
        Field(
            ge=-LONGEST,
            le=LONGEST,
            description="largest fixed part of the window in tokens, a multiple of 64; null is the length it is "
            "used at",
        ),
    ] = None
    alpha_step: Annotated[
        int, Field(ge=PAGE, le=LONGEST, multiple_of=PAGE, description="tokens between two alphas, a multiple of 64")
    ] = 64

    @field_validator("sinks")
    @classmethod
    def _check_sinks(cls, sinks: tuple[int, ...]) -> tuple[int, ...]:
        if any(sink < 0 for sink in sinks) or not _sorted_unique(sinks):
            raise ValueError("expected ascending numbers of tokens >= 0, each once")
        return sinks

    @field_validator("betas")
    @classmethod
    def _check_betas(cls, betas: tuple[float, ...]) -> tuple[float, ...]:
        if not _sorted_unique(betas):
            raise ValueError("expected ascending values, each once")
        for beta in betas:
            if not 0 <= beta <= 1:
                raise ValueError(f"expected 0 <= beta <= 1, got {beta}")
            if beta * BETA_UNIT != int(beta * BETA_UNIT):
                nearest = round(beta * BETA_UNIT) / BETA_UNIT
                raise ValueError(f"expected multiples of 1/{BETA_UNIT}, got {beta}; the nearest is {nearest}")
        return betas

    @model_validator(mode="after")
    def _check_alphas(self) -> SpanGrid:
        if self.alpha_max is not None and self.alpha_max % PAGE:
            raise ValueError(f"alpha_max: expected a multiple of {PAGE}, got {self.alpha_max}")
        if self.alpha_max is not None and self.alpha_max < self.alpha_min:
            raise ValueError(f"alpha_max: expected at least alpha_min ({self.alpha_min}), got {self.alpha_max}")
        return self

    def alphas(self, length: int) -> list[int]:
        """Alphas of the table at one length in tokens: alpha_min and steps up to the first one >= `length`.

        That last alpha hides nothing at this length, so a larger alpha of a longer table costs nothing here.
        `alpha_max` cuts the list; the list of a shorter length is always a prefix of that of a longer one.
        """
        last = self.alpha_min + max(0, -(-(length - self.alpha_min) // self.alpha_step)) * self.alpha_step
        if self.alpha_max is not None:
            last = min(last, self.alpha_max)
        return list(range(self.alpha_min, last + 1, self.alpha_step))

    def rules(self, length: int) -> list[Rule]:
        """Every rule for inputs up to `length` tokens: full attention first, then sink by sink, beta by beta.

        Within one beta alphas ascend. beta = 1 is left out beside full attention: with alpha >= 0 it is the same,
        and with alpha < 0 it only hides the tokens that follow the sinks.
        """
        rules = [Rule(FULL, None)]
        for sink_index, sink in enumerate(self.sinks):
            for beta_index, beta in enumerate(self.betas):
                if beta == 1:
                    continue
                for alpha_index, alpha in enumerate(self.alphas(length)):
                    rules.append(Rule(Span(sink, alpha, beta), (sink_index, beta_index, alpha_index)))
        return rules

    def fixed(self) -> SpanGrid:
        """The fixed windows of this grid: beta 0 and alphas above 0.

        Raises:
            UserError: it has none.
        """
        least = next((alpha for alpha in self.alphas(PAGE) if alpha > 0), None)
        if least is None or 0 not in self.betas:
            raise UserError(
                "the span grid has no fixed windows, and rules by length are priced by them",
                where="profile.grid",
                expected="0 among `betas`, and an `alpha_max` above 0",
                found=f"betas {list(self.betas)}, alpha_max {self.alpha_max}",
                fix="profile again with such a grid, or search with the rule `position`",
            )
        return self.model_copy(update={"betas": (0.0,), "alpha_min": least})

    def length_spans(self, profiled: int, lengths: Collection[int]) -> list[AnySpan]:
        """Full attention first, then every rule by length of this grid's sinks, betas and alphas that is of use.

        A fixed window, beta 0, is the same by position, and is given as that: it refuses nothing then.
        Left out is what sees less than the smallest fixed window at the shortest input, where the paper leaves out
        windows <= 0, and what sees everything at all inputs. alpha < 0 with beta = 1 is kept: it hides the first
        tokens of a long input from its end.

        Args:
            profiled: longest profiled length in tokens; alphas go up to it.
            lengths: of all inputs to price or to budget, in tokens.
        """
        least, shortest, longest = self.fixed().alpha_min, min(lengths), max(lengths)
        spans: list[AnySpan] = [FULL]
        for sink in self.sinks:
            for beta in self.betas:
                for alpha in self.alphas(profiled):
                    span = LengthSpan(sink, alpha, beta) if beta else Span(sink, alpha, beta)
                    if span.at_length(shortest).alpha >= least and span.at_length(longest).alpha < longest:
                        spans.append(span)
        return spans

    def fixed_rule(self, window: Span, length: int) -> Rule:
        """The rule of the table at `length` that prices a fixed window: the same, or the next smaller alpha."""
        if window.is_full or window.alpha >= length:
            return Rule(FULL, None)
        alphas = self.alphas(length)
        place = bisect_right(alphas, window.alpha) - 1
        index = (self.sinks.index(window.sink), self.betas.index(0.0), place)
        return Rule(Span(window.sink, alphas[place], 0.0), index)


@targets.register("window")
class WindowGroup(SpanTarget):
    """Sees `sink` tokens and a window of alpha + beta * position, or alpha + beta * input length (runtime/span.py)."""

    runtime: ClassVar[str | None] = "compress.runtime.mixer_span"
    grid: ClassVar[type[Method] | None] = SpanGrid
    in_vllm: ClassVar[bool] = True

    target: Literal["window"] = "window"
    sink: int = Field(ge=0, lt=NO_END, description="tokens at the start that stay visible")
    alpha: int = Field(gt=-NO_END, lt=NO_END, description="fixed part of the window, tokens")
    beta: float = Field(ge=0, le=1, description="share of the position added to the window, a multiple of 1/1024")
    rule: Literal["position", "length"] = Field(
        "position",
        description="what beta is a share of: the query's position, or the length of the input, the same window for "
        "all of it, as MoA has it (no chunks, no further turns, no inputs of different lengths in a batch)",
    )

    _representable = field_validator("beta")(representable)

    @model_serializer(mode="wrap")
    def _as_written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the default rule, so that plans by position are written as they were before it had a name."""
        written: dict[str, Any] = write(self)
        if self.rule == "position":
            written.pop("rule", None)
        return written

    @classmethod
    def of(cls, span: AnySpan) -> WindowGroup:
        """The group that sees a span."""
        return cls(sink=span.sink, alpha=span.alpha, beta=span.beta, rule=span.rule)

    def span(self, native: int | None = None) -> AnySpan:
        """The rule by position, or by length."""
        return RULES[self.rule](self.sink, self.alpha, self.beta)

    @classmethod
    def options(cls, unit: Unit, lengths: Sequence[int], grid: SpanGrid | None = None) -> list[Target]:
        """Every window of the grid at the longest length; none in a layer that slides by itself."""
        if unit.native is not None:
            return []
        rules = (grid or SpanGrid()).rules(max(lengths))
        return [cls.of(rule.span) for rule in rules if not rule.span.is_full]
