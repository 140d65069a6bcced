"""The linear target: a state of constant size stands for the keys that a window hides, or for all keys."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from compress.errors import one_of
from compress.limits import ENTRIES, LONGEST
from compress.registry import Method, targets
from compress.runtime.linear_states import state_columns
from compress.runtime.maps import MAPS
from compress.runtime.mixer_linear import KNOWN
from compress.runtime.span import NO_END, PAGE, Span
from compress.targets.cost import Cost
from compress.targets.span import visible_keys, visible_pairs
from compress.targets.target import Target
from compress.targets.unit import Unit

Rule = Literal["add", "delta"]
MOST_FEATURES, STEEPEST = 1 << 14, 100.0
MAP_NAMES = tuple(sorted(name for name, made in MAPS.items() if made in KNOWN))


def _known(name: str) -> str:
    if name not in MAPS:
        raise ValueError(f"expected {one_of(MAP_NAMES, name)}, got {name}")
    return name


MapName = Annotated[str, AfterValidator(_known)]


class LinearGrid(Method):
    """The linear heads to choose from: every rule and map with every decay, behind every window or without one."""

    rules: Annotated[tuple[Rule, ...], Field(min_length=1, description="how keys are written into the state")] = (
        "add",
    )
    maps: Annotated[
        tuple[MapName, ...],
        Field(min_length=1, max_length=ENTRIES, description=f"feature maps of the rule `add`: {', '.join(MAP_NAMES)}"),
    ] = ("hedgehog",)
    sinks: Annotated[
        tuple[Annotated[int, Field(ge=0, le=LONGEST)], ...],
        Field(min_length=1, max_length=ENTRIES, description="tokens at the start that stay visible"),
    ] = (4,)
    alphas: Annotated[
        tuple[Annotated[int, Field(ge=1, le=LONGEST)], ...],
        Field(
            min_length=1, max_length=ENTRIES, description="windows in tokens; the state stands for what is before them"
        ),
    ] = (64,)
    decays: Annotated[
        tuple[Literal["none", "fixed", "token"], ...],
        Field(min_length=1, description="what states lose a token; `fixed` takes every one of `slopes`"),
    ] = ("none",)
    slopes: Annotated[
        tuple[Annotated[float, Field(gt=0, le=STEEPEST)], ...],
        Field(
            min_length=1,
            max_length=ENTRIES,
            description="of fixed decays; the default keeps half of a token for 22, 177 and 1,420 tokens",
        ),
    ] = (2**-5, 2**-8, 2**-11)
    alone: Annotated[
        tuple[bool, ...],
        Field(min_length=1, max_length=2, description="whether heads have no softmax; those have no sinks and windows"),
    ] = (False,)

    def decay_fields(self) -> list[dict[str, Any]]:
        """What the decays are in a plan."""
        fixed = [{"decay": "fixed", "slope": slope} for slope in self.slopes]
        return [each for name in self.decays for each in (fixed if name == "fixed" else [{"decay": name}])]


@targets.register("linear")
class LinearGroup(Target):
    """A linear state over the keys that a window of whole pages hides, joined with the softmax over those in it."""

    runtime: ClassVar[str | None] = "compress.runtime.mixer_linear"
    noun: ClassVar[str] = "linear attention"
    grid: ClassVar[type[Method] | None] = LinearGrid

    target: Literal["linear"] = "linear"
    rule: Rule = Field(
        "add", description="how a key is written: added, or by the gated delta rule, which replaces what it finds"
    )
    map: MapName = Field("hedgehog", description=f"what makes features of queries and keys: {', '.join(MAP_NAMES)}")
    features: int | None = Field(
        None, ge=1, le=MOST_FEATURES, description="features of a query or key; null takes the map's own number"
    )
    decay: Literal["none", "fixed", "token"] = Field(
        "none", description="what a state loses a token: nothing, by `slope`, or what a gate of the layer's input says"
    )
    slope: float | None = Field(
        None, gt=0, le=STEEPEST, description="of `decay: fixed`: a state becomes exp(-slope) times itself every token"
    )
    out: Literal["shared", "added"] = Field(
        "shared", description="one normaliser with the window's softmax, or added to it behind a norm and a gate"
    )
    rope: Literal["keep", "undo"] = Field(
        "keep", description="whether features are of queries and keys as the softmax has them, or before RoPE"
    )
    alone: bool = Field(False, description="without any softmax: the state stands for all keys")
    reach: int = Field(8192, ge=1, le=LONGEST, description="of the map `cosine`: at least the longest input in tokens")
    sink: int = Field(0, ge=0, lt=NO_END, description="tokens at the start that stay visible, in whole pages of 64")
    alpha: int = Field(64, gt=-NO_END, lt=NO_END, description="fixed part of the window, tokens")
    beta: float = Field(0.0, ge=0, le=1, description="share of the position added to the window, a multiple of 1/1024")

    @model_validator(mode="before")
    @classmethod
    def _follow(cls, given: Any) -> Any:
        """What follows from the rule, and from having no window, where the plan does not say it."""
        if not isinstance(given, dict):
            return given
        follows: dict[str, Any] = {}
        if given.get("rule") == "delta":
            follows |= {"map": "unit", "out": "added"}
        if given.get("alone") is True:
            follows |= {"alpha": 1}
        return follows | given

    @model_validator(mode="after")
    def _fits(self) -> LinearGroup:
        made = MAPS[self.map]
        Span(self.sink, self.alpha, self.beta)
        if self.features is not None:
            made.width(self.features)
        if self.rule == "delta" and (self.map, self.out) != ("unit", "added"):
            raise ValueError(f"the rule delta goes with map unit and out added, got {self.map} and {self.out}")
        if self.out == "shared" and not made.positive:
            raise ValueError(f"out shared divides by a sum of weights, which the map {self.map} may make negative")
        if (self.slope is None) == (self.decay == "fixed"):
            raise ValueError("slope goes with decay fixed, and with no other")
        if self.alone and (self.sink, self.alpha, self.beta) != (0, 1, 0):
            raise ValueError("a group that is alone has no window: leave out sink, alpha and beta")
        return self

    @property
    def objective(self) -> str:  # type: ignore[override]
        """The weights of the hidden keys where they have one normaliser; an added state has none to match."""
        return "weights" if self.out == "shared" else "transfer"

    def span(self) -> Span:
        """The keys in the softmax, by whole pages; of a group that is alone, those that its cache holds."""
        return Span(self.sink, self.alpha, self.beta, granule=PAGE)

    def feature_count(self, head_dim: int) -> int:
        """F of heads of this size."""
        return MAPS[self.map].usual(head_dim) if self.features is None else self.features

    @property
    def undoes_rope(self) -> bool:
        """See `Target.undoes_rope`."""
        return self.rope == "undo"

    @property
    def learns_from_all(self) -> bool:
        """Alone, the state stands for all keys."""
        return self.alone

    @property
    def gate_count(self) -> int:
        """Numbers that every cached token has beside its key and value."""
        return (self.decay == "token") + (self.rule == "delta")

    def state_bytes(self, head_dim: int) -> int:
        """Bytes of one sequence's state: float32, whatever the cache has."""
        return 4 * self.feature_count(head_dim) * state_columns(self.rule, head_dim)

    def cost(self, unit: Unit, length: int) -> Cost:
        """Pages in sight, the gates of their tokens, and the state, which a decode step reads whole.

        Raises:
            ValueError: tokens are asked for; no stock architecture has this target.
        """
        if not unit.paged:
            raise self.no_stock_form()
        span, dim = self.span(), unit.head_dim
        features = self.feature_count(dim)
        columns, width = state_columns(self.rule, dim), MAPS[self.map].width(features)
        held = span.page_count(length) * PAGE * (unit.token_bytes + 4 * self.gate_count) + self.state_bytes(dim)
        absorbed = int(span.boundary(length - 1)) - span.sink
        readers = max(0, length - 1 - int(span.last_query(span.sink)))
        of_pair = 2 * (features + columns) if self.alone else 4 * dim
        flops = of_pair * unit.query_heads * visible_pairs(span, length)
        flops += 2 * features * columns * (unit.query_heads * readers + absorbed * (2 if self.rule == "delta" else 1))
        flops += 2 * dim * width * (unit.query_heads * length + absorbed)
        keys, own = visible_keys(span, length), self._parameters(unit)
        return Cost(held, held, keys, flops, own, state_bytes=self.state_bytes(dim), heads=unit.query_heads)

    def _parameters(self, unit: Unit) -> int:
        """The group's own and the mixer's; 0 where none are counted."""
        if not unit.parameters:
            return 0
        dim, heads = unit.head_dim, unit.query_heads
        made = MAPS[self.map]
        width = made.width(self.feature_count(dim))
        hidden = unit.hidden_size
        own = (heads + 1) * width * (dim + made.biased) + self.gate_count * (hidden + 1)
        own += heads * (1 + dim) if self.out == "shared" else heads * (dim + hidden + 1)
        return unit.parameters + own

    def words(self, native: int | None = None) -> str:
        made = [f"{self.map} map" if self.rule == "add" else "delta rule"]
        if self.features is not None:
            made.append(f"{self.features} features")
        if self.rope == "undo":
            made.append("without RoPE")
        if self.decay != "none":
            made.append("decay by token" if self.decay == "token" else f"decay exp(-{self.slope:g})")
        linear = f"linear ({', '.join(made)})"
        if self.alone:
            return f"{linear}, no window"
        grows = f" + {self.beta:g} of the position" if self.beta else ""
        return f"sink {self.sink}, window {self.alpha}{grows}, before it {linear}"

    def short(self, native: int | None = None) -> str:
        if self.alone:
            return "L"
        return f"L {self.sink}|{self.alpha}{f'+{self.beta:g}t' if self.beta else ''}"

    def rule_text(self) -> str:
        return (
            "with p the first position of the query's page of 64 tokens, the query sees key j by softmax when `j` is "
            "in the pages of the first `sink` tokens or not before the page of position "
            "`p + 1 - max(1, floor(alpha + beta * (p + 1)))`. All keys between are summed up in a state of constant "
            "size, which the query reads; with `alone` there is no softmax, and the state stands for all keys."
        )

    @classmethod
    def options(cls, unit: Unit, lengths: Sequence[int], grid: LinearGrid | None = None) -> list[Target]:
        """Every rule, map, decay and window of the grid; none in a layer that slides by itself."""
        if unit.native is not None:
            return []
        grid = grid or LinearGrid()
        kinds: list[dict[str, Any]] = []
        if "add" in grid.rules:
            kinds += [{"map": name, "out": "shared" if MAPS[name].positive else "added"} for name in grid.maps]
        kinds += [{"rule": "delta"}] if "delta" in grid.rules else []
        places: list[dict[str, Any]] = [{"alone": True}] if True in grid.alone else []
        if False in grid.alone:
            places += [{"sink": sink, "alpha": alpha} for sink in grid.sinks for alpha in grid.alphas]
        made = product(kinds, grid.decay_fields(), places)
        return [cls.model_validate({**kind, **decay, **place}) for kind, decay, place in made]


def lightning_slopes(heads: int, layer: int, layers: int) -> list[float]:
    """The slopes of TransNormerLLM and Lightning Attention (arXiv 2307.14995) of the heads of a layer.

    Head h, counted from 1, has 2^(-8 h / heads), less in later layers, and next to none in the last.
    """
    return [2 ** (-8 * (head + 1) / heads) * (1 - layer / max(layers - 1, 1) + 1e-5) for head in range(heads)]
