"""The routed target: of the head groups or query heads of a layer, every token uses those that a router chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from math import comb
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from compress.registry import targets
from compress.runtime.routers import disagreement
from compress.runtime.span import NO_END, AnySpan, Span, own_span
from compress.targets.cost import Cost
from compress.targets.span import SpanTarget, representable
from compress.targets.target import StockForm, Target
from compress.targets.unit import Unit

Router = Literal["two_stage", "norm", "random"]
MOST_UNITS = 1 << 10  # no layer has more heads
WORDS = {"two_stage": "", "norm": " by the norms of queries", "random": " at random"}
RULES = {
    "two_stage": "a router scores the units by the layer's input (Mixture-of-Head, arXiv 2410.11842)",
    "norm": "a unit's score is the norm of its query over the standard deviation of all scores, without any parameters "
    "(Mixture-of-Head for LLaMA, arXiv 2410.11842)",
    "random": "a unit's score is a fixed random function of the layer's input, as a control",
}


@targets.register("routed")
class RoutedGroup(SpanTarget):
    """Attention of the units that a token chooses: `active` of the `of` routed ones of its layer, beside those that are
    always on.

    Every entry of a layer says the same of the layer, and which of its own heads are shared. All keys and values are
    stored, since later tokens may choose what this one did not.
    """

    runtime: ClassVar[str | None] = "compress.runtime.mixer_routed"
    noun: ClassVar[str] = "a router"
    objective: ClassVar[str | None] = "routing"
    untrained: ClassVar[bool] = True
    by_layer: ClassVar[bool] = True

    target: Literal["routed"] = "routed"
    router: Router = Field(
        "two_stage",
        description="what scores the units: weights of the layer's input, the norms of their queries (not in models "
        "that normalise every query head), or fixed random weights as a control",
    )
    unit: Literal["group", "head"] = Field(
        "group",
        description="what is chosen: head groups, so that keys are not read either, or query heads, which under "
        "grouped queries leave most keys to be read",
    )
    active: int = Field(ge=0, le=MOST_UNITS, description="routed units that every token uses, in the whole layer")
    of: int = Field(ge=0, le=MOST_UNITS, description="routed units of the whole layer, which tokens choose from")
    always: int = Field(0, ge=0, le=MOST_UNITS, description="shared units of the whole layer, which all tokens use")
    shared: Literal["all"] | tuple[int, ...] = Field(
        (),
        description="the query heads of this group that are shared: their numbers in it, of those that stay, or all; "
        "where whole groups are chosen, all or none",
    )
    gates: Literal["weighted", "one"] = Field(
        "weighted",
        description="what outputs are multiplied by: the router's weights, or 1 with the gradient of probabilities, "
        "the default of `norm` and `random`, and where a token chooses one unit, whose weight would always be 1",
    )
    sink: int = Field(0, ge=0, lt=NO_END, description="tokens at the start that stay visible")
    alpha: int = Field(0, gt=-NO_END, lt=NO_END, description="fixed part of the window, tokens")
    beta: float = Field(
        1.0, ge=0, le=1, description="share of the position added to the window, a multiple of 1/1024; 1 is all keys"
    )

    @model_validator(mode="before")
    @classmethod
    def _follow(cls, given: Any) -> Any:
        """Gates of 1 where the router has no weights to train, or a weight among one chosen unit would say nothing."""
        if isinstance(given, dict) and (given.get("router") in ("norm", "random") or given.get("active") == 1):
            return {"gates": "one"} | given
        return given

    _representable = field_validator("beta")(representable)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.active > self.of or (self.active == 0) != (self.of == 0):
            raise ValueError(f"active: expected 1 to {self.of} of {self.of} routed units, got {self.active}")
        if self.shared != "all":
            if sorted(set(self.shared)) != list(self.shared) or (self.shared and self.shared[0] < 0):
                raise ValueError(f"shared: expected ascending numbers of query heads, got {list(self.shared)}")
            if self.shared and self.unit == "group":
                raise ValueError(f'shared: whole groups are chosen, so expected "all" or [], got {list(self.shared)}')
            if not self.of:
                raise ValueError('shared: the layer has no routed units (of: 0), so expected "all"')
        if self.shared and not self.always:
            raise ValueError("always: this group has shared units, so expected 1 or more, got 0")
        if self.router == "random" and self.gates != "one":
            raise ValueError("gates: a random router has no weights to trust, so expected one, got weighted")
        return self

    @classmethod
    def layer(
        cls,
        groups: int,
        active: int,
        *,
        shared: Sequence[int] = (),
        group_size: int = 1,
        unit: Literal["group", "head"] = "group",
        **fields: Any,
    ) -> list[RoutedGroup]:
        """The entries of a layer whose groups are all routed, in their order.

        Args:
            groups: head groups of the layer that stay.
            active: routed units that a token uses.
            shared: numbers of the layer's units that are always on: of groups, or of query heads.
            group_size: query heads of a group; asked for where heads are chosen.
            fields: the other fields of the entries.
        """
        share = group_size if unit == "head" else 1
        entries = []
        for group in range(groups):
            own = tuple(number - group * share for number in shared if number // share == group)
            on: Any = ("all" if own else ()) if unit == "group" else own
            about = {"unit": unit, "active": active, "of": groups * share - len(shared), "always": len(shared)}
            entries.append(cls(**about, shared=on, **fields))
        return entries

    @classmethod
    def layer_problem(cls, groups: Sequence[Target], query_heads: int) -> tuple[str, str, str] | None:
        """See `Target.layer_problem`: what entries of one layer have to agree on."""
        return disagreement([group.model_dump() for group in groups], query_heads)

    def span(self, native: int | None = None) -> AnySpan:
        """The window beside the routing; without one, what the layer itself sees."""
        span = Span(self.sink, self.alpha, self.beta)
        return own_span(native) if span.is_full else span

    @property
    def fits_native(self) -> bool:
        """See `Target.fits_native`: without a window of its own it has the layer's."""
        return Span(self.sink, self.alpha, self.beta).is_full

    @property
    def prepared_as(self) -> RoutedGroup:
        """See `Target.prepared_as`: what scores a unit is the same whichever are shared, and how many are chosen."""
        return type(self)(router=self.router, unit=self.unit, active=1, of=1)

    @property
    def learns(self) -> bool:
        """See `Target.learns`: norms have no parameters, and random weights stay as they are."""
        return self.router == "two_stage"

    @property
    def reads_norms(self) -> bool:
        """See `Target.reads_norms`."""
        return self.router == "norm"

    @property
    def share(self) -> Fraction:
        """Of the routed units of the layer, those that a token uses; 1 without any."""
        return Fraction(self.active, self.of) if self.of else Fraction(1)

    @property
    def all_on(self) -> RoutedGroup:
        """See `Target.all_on`: as many units a token as there are."""
        return self.model_copy(update={"active": self.of})

    def little(self, query_heads: int) -> str:
        """Under grouped queries a group's keys are read as long as one of its query heads is on."""
        if self.unit == "group" or query_heads == 1 or not self.of:
            return ""
        off = Fraction(0)
        if query_heads <= self.of:
            off = 1 - self.model_copy(update={"shared": ()}).read_share(query_heads)
        return (
            f"a head group's keys are read as long as one of its {query_heads} query heads is on, and none is for "
            f"{float(off):.1%} of the tokens; head groups as units (`unit: group`) save what they leave out"
        )

    @property
    def at_random(self) -> RoutedGroup:
        """See `Target.at_random`."""
        return self.model_copy(update={"router": "random", "gates": "one"})

    def shared_heads(self, query_heads: int) -> int:
        """How many of the group's query heads are always on."""
        return query_heads if self.shared == "all" else len(self.shared)

    def read_share(self, query_heads: int) -> Fraction:
        """How often a token reads the keys of a group of so many query heads, where all units are chosen alike.

        A group whose heads are chosen one by one is left alone only when none of them is among the `active` ones.
        """
        free = query_heads - self.shared_heads(query_heads)
        if free < query_heads:
            return Fraction(1)
        if self.unit == "group":
            return self.share
        return 1 - Fraction(comb(self.of - free, self.active), comb(self.of, self.active))

    def cost(self, unit: Unit, length: int) -> Cost:
        """All keys are held; a token reads and computes its expected share, as if all units were chosen alike.

        Fractions of a byte, key or operation are rounded up.

        Raises:
            ValueError: tokens are asked for; no stock architecture has this target.
        """
        return type(self).together([self], unit, length)

    @classmethod
    def together(cls, groups: Sequence[Any], unit: Unit, length: int) -> Cost:
        """See `Target.together`. What a token computes of a layer is exact, whatever it chooses, where the groups have
        one window: `active` of the routed units, whose shares add up to that. So are the keys that it reads where whole
        groups are chosen; where query heads are, they are expected ones."""
        heads = unit.query_heads
        each = [SpanTarget.cost(group, unit, length) for group in groups]
        shares = [(group.read_share(heads), group.computed_share(heads)) for group in groups]
        total, pairs = Cost.total(each), list(zip(each, shares, strict=True))
        return replace(
            total,
            read_bytes=_up(sum(cost.read_bytes * read for cost, (read, _) in pairs)),
            keys=_up(sum(cost.keys * read for cost, (read, _) in pairs)),
            flops=_up(sum(cost.flops * computed for cost, (_, computed) in pairs)),
            heads=_up(sum(cost.heads * computed for cost, (_, computed) in pairs)),
            parameters=total.parameters + sum(group._own(unit) for group in groups) if unit.parameters else 0,
        )

    def computed_share(self, query_heads: int) -> Fraction:
        """Of a group of so many query heads, how many a token computes, where all units are chosen alike."""
        on = self.shared_heads(query_heads)
        return (on + (query_heads - on) * self.share) / query_heads

    def _own(self, unit: Unit) -> int:
        """Parameters of the router that go with the group."""
        rows = unit.query_heads if self.unit == "head" else 1
        return {"norm": 0, "two_stage": (rows + 2) * unit.hidden_size, "random": rows * (unit.hidden_size + 1)}[
            self.router
        ]

    def words(self, native: int | None = None) -> str:
        span = super().words(native)
        return self._choice() + ("" if span == "sees everything" else f", {span}")

    def _choice(self) -> str:
        if not self.of:
            return "always on, weighed by a router"
        units = "query heads" if self.unit == "head" else "head groups"
        chosen = f"{self.active} of {self.of} {units}"
        if self.shared == "all":
            return f"always on, beside {chosen} that tokens choose{WORDS[self.router]}"
        beside = f", beside {self.always} always on" if self.always else ""
        if self.shared:
            beside += f" (here {', '.join(map(str, self.shared))})"
        return f"tokens choose {chosen}{WORDS[self.router]}{beside}"

    def short(self, native: int | None = None) -> str:
        """`R` of a group that tokens choose and `on` of one that is shared, with chosen / routed + shared units of the
        layer; with `h` these are query heads, and those in brackets are shared."""
        span = super().short(native)
        chosen = f"{self.active}/{self.of}" + (f"+{self.always}" if self.always else "")
        heads = f"({','.join(map(str, self.shared))})" if self.shared else ""
        here = "on" if self.shared == "all" else f"R{heads}"
        return f"{here} {chosen}{'h' if self.unit == 'head' else ''}" + ("" if span == "full" else f" {span}")

    def rule_text(self) -> str:
        weighed = {"weighted": "are weighed by a softmax over the units in use", "one": "are taken as they are"}
        rule = (
            "every token uses `active` of the layer's `of` routed units and all shared ones: "
            f"{RULES[self.router]}. Their outputs {weighed[self.gates]}; what a unit gives that a token does not use "
            "is 0, and its keys and values are stored all the same, since later tokens may use it."
        )
        return rule if self.fits_native else f"{super().rule_text()} {rule[0].upper()}{rule[1:]}"

    def stock(self, native: int | None) -> StockForm | None:
        """None: no stock architecture chooses heads."""
        return None


def _up(value: Fraction | int) -> int:
    return -int(-value // 1)
