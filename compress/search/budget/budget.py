"""The budget of a search: KV bytes, visible keys and decode time at every length, and whether they can be met."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, ValidationInfo, field_validator, model_validator

from compress.errors import Problem, UserError
from compress.limits import BATCH, BYTES, ENTRIES, FACTOR, LONGEST
from compress.registry import Method, PathText
from compress.runtime.span import FULL, AnySpan, Span, own_span
from compress.search.budget.step_time import StepTime, TimeLimit, measured, roofline
from compress.targets.cost import kv_bytes, stock_kv_bytes, visible_keys
from compress.targets.window import SpanGrid

if TYPE_CHECKING:
    from compress.plan import ModelShape
    from compress.search.problem import SearchProblem


class Budget(Method):
    """What a plan may cost for one sequence, at every length a constraint of its own. All kinds that are given hold."""

    density: Annotated[
        float | dict[int, float] | None,
        Field(
            description="share of the keys that the dense model's last query sees, above 0 and up to 1, in tokens over "
            "all head groups; for all `lengths`, or a mapping from length to a share"
        ),
    ] = None
    decode_time: Annotated[
        float | None,
        Field(
            gt=0,
            le=1,
            description="share of the dense model's time for a decode step, at all `lengths` and `batch_sizes`; by "
            "`cost_table`, or by bytes over bandwidth (weights and KV cache) without one",
        ),
    ] = None
    batch_sizes: Annotated[
        tuple[Annotated[int, Field(le=BATCH)], ...],
        Field(max_length=ENTRIES, description="sequences of a decode step at which `decode_time` holds"),
    ] = (1,)
    cost_table: Annotated[
        PathText | tuple[PathText, ...] | None,
        Field(description="a bench.json that `compress bench --what model` wrote, or several, one for each batch size"),
    ] = None
    bandwidth: Annotated[
        float | None,
        Field(
            gt=0,
            le=FACTOR,
            description="GB/s of the device, to say the times in ms without a `cost_table`; null measures a copy. "
            "Shares, and so the plan, do not depend on it",
        ),
    ] = None
    lengths: Annotated[
        tuple[Annotated[int, Field(le=LONGEST)], ...] | None,
        Field(
            max_length=ENTRIES,
            description="input lengths in tokens at which the budget holds; null takes the profiled lengths",
        ),
    ] = None
    parameters: Annotated[
        float | None,
        Field(
            gt=0,
            le=BYTES,
            description="share of the decoder layers' parameters that stays, above 0 and up to 1, or a whole number of "
            "them; for solvers that remove heads and neurons, and with no other kind",
        ),
    ] = None
    # After the other kinds, because its default depends on them.
    kv: Annotated[
        float | dict[int, float] | None,
        Field(
            description="share of the dense KV bytes, above 0 and up to 1, for all `lengths`; or a mapping from length "
            "to a share, or to whole bytes where the number is above 1; 0.5 when no other kind is given",
            validate_default=True,
        ),
    ] = None

    @field_validator("density")
    @classmethod
    def _check_density(cls, density: float | dict[int, float] | None) -> float | dict[int, float] | None:
        if isinstance(density, dict):
            _check_mapping(density)
            for length, share in density.items():
                if not 0 < share <= 1:
                    raise ValueError(f"at length {length}: expected a share in (0, 1], got {share}")
        elif density is not None and not 0 < density <= 1:
            raise ValueError(f"expected a share of the visible keys in (0, 1], got {density}; half of them is 0.5")
        return density

    @field_validator("kv")
    @classmethod
    def _check_kv(cls, kv: float | dict[int, float] | None, info: ValidationInfo) -> float | dict[int, float] | None:
        if kv is None:
            others = [info.data.get(kind) for kind in ("density", "decode_time", "parameters")]
            return 0.5 if others == [None] * 3 else None
        if isinstance(kv, dict):
            _check_mapping(kv)
            for length, value in kv.items():
                if not (0 < value <= 1 or (1 < value <= BYTES and value == int(value))):
                    most = f"whole bytes of at most {BYTES:,}"
                    raise ValueError(f"at length {length}: expected a share in (0, 1] or {most}, got {value}")
        elif not 0 < kv <= 1:
            raise ValueError(f"expected a share of the dense KV bytes in (0, 1], got {kv}; half of them is 0.5")
        return kv

    @field_validator("lengths", "batch_sizes")
    @classmethod
    def _check_sizes(cls, sizes: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...] | None:
        if sizes is not None and (not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes)):
            unit = "lengths of at least 1 token" if info.field_name == "lengths" else "batch sizes of at least 1"
            raise ValueError(f"expected one or more {unit}, each once")
        return sizes

    @model_validator(mode="after")
    def _check_together(self) -> Budget:
        if self.parameters is not None:
            if self.parameters > 1 and self.parameters != int(self.parameters):
                raise ValueError(f"parameters: expected a share in (0, 1] or a whole number, got {self.parameters}")
            if (self.kv, self.density, self.decode_time) != (None, None, None):
                raise ValueError(
                    "parameters: it stands alone; prune first, then search spans with the pruned checkpoint as `model`"
                )
        for name, value in (("kv", self.kv), ("density", self.density)):
            if isinstance(value, dict) and self.lengths is not None and set(self.lengths) != set(value):
                raise ValueError(f"lengths: leave it out, or name the lengths of `{name}`, when `{name}` is a mapping")
        if self.decode_time is None:
            for name in ("cost_table", "bandwidth", "batch_sizes"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name}: it is for `decode_time`, which is not given")
        elif self.cost_table is not None and self.bandwidth is not None:
            raise ValueError("bandwidth: leave it out, the times are those of `cost_table`")
        return self

    def most_parameters(self, block: int) -> int:
        """Parameters of the decoder layers that may stay, of `block` in all. Needs `parameters`."""
        share = self.parameters or 1.0
        return int(share) if share > 1 else math.floor(share * block)

    @property
    def tables(self) -> tuple[str, ...]:
        """Paths of the cost tables."""
        return (self.cost_table,) if isinstance(self.cost_table, str) else self.cost_table or ()

    def limits(self, shape: ModelShape, itemsize: int, profiled: Sequence[int]) -> dict[int, int]:
        """Bytes that `kv` allows at every length for one sequence, ascending lengths; empty without `kv`.

        A share is of what the dense model's cache holds. A share of 1 also covers the rounding of a length to
        whole cache pages, so that the dense model itself always meets it.

        Args:
            itemsize: bytes of one cached number.
            profiled: lengths to use when the budget names none.
        """
        limits = {}
        for length, share in self._shares(self.kv, profiled).items():
            dense = dense_bytes(shape, length, itemsize)
            if share > 1:
                limits[length] = int(share)
            elif share == 1:
                limits[length] = max(dense, rule_bytes(shape, FULL, length, itemsize))
            else:
                limits[length] = math.floor(share * dense)
        return limits

    def key_limits(self, shape: ModelShape, profiled: Sequence[int]) -> dict[int, int]:
        """Keys that the last query may see at every length, over all head groups; empty without `density`."""
        return {
            length: math.floor(share * rule_keys(shape, FULL, length))
            for length, share in self._shares(self.density, profiled).items()
        }

    def time_limit(self, shape: ModelShape, itemsize: int, profiled: Sequence[int], step: StepTime) -> TimeLimit | None:
        """What `decode_time` allows, as KV bytes at every length; None without it.

        A step takes longer the more bytes it reads, and depends on nothing else of a plan, so the limit of the time is
        one of the bytes: exactly, at every batch size, of which the tightest counts. A share of 1 always lets the
        dense model through.
        """
        if self.decode_time is None:
            return None
        dense, limits = {}, {}
        for length, share in self._shares(self.decode_time, profiled).items():
            dense[length] = dense_bytes(shape, length, itemsize)
            limits[length] = min(step.most_bytes(share, dense[length], batch) for batch in self.batch_sizes)
            if share == 1:
                limits[length] = max(limits[length], rule_bytes(shape, FULL, length, itemsize))
        return TimeLimit(self.decode_time, step, self.batch_sizes, dense, limits)

    def step_time(
        self,
        shape: ModelShape,
        itemsize: int,
        profiled: Sequence[int],
        weights: int,
        measured_bandwidth: float | None = None,
    ) -> StepTime:
        """The step time that `decode_time` is counted in: of the cost tables, or the roofline.

        Args:
            weights: bytes of weights that a step reads.
            measured_bandwidth: of a copy on the device at hand, bytes per second, where `bandwidth` is not given.

        Raises:
            UserError: a table cannot be used (see `decode_time.measured`), or no bandwidth is known.
        """
        if self.tables:
            held = {length: dense_bytes(shape, length + 1, itemsize) for length in self.lengths or profiled}
            return measured(self.tables, shape, itemsize, self.batch_sizes, held)
        if self.bandwidth is not None:
            return roofline(weights, self.bandwidth * 1e9, self.batch_sizes, "as the recipe says")
        if measured_bandwidth is None:
            raise UserError(
                "no bandwidth is known for `decode_time`",
                where="search.budget.bandwidth",
                expected="GB/s, or a cost_table",
            )
        return roofline(weights, measured_bandwidth, self.batch_sizes, "a copy on this device")

    def _shares(self, value: float | dict[int, float] | None, profiled: Sequence[int]) -> dict[int, float]:
        """The value of a kind at every length, ascending."""
        if value is None:
            return {}
        return dict(
            sorted((value if isinstance(value, dict) else dict.fromkeys(self.lengths or profiled, value)).items())
        )


def _check_mapping(value: Mapping[int, float]) -> None:
    if not value:
        raise ValueError("expected at least one length")
    if len(value) > ENTRIES:
        raise ValueError(f"expected at most {ENTRIES} lengths, got {len(value)}")
    for length in value:
        if not 1 <= length <= LONGEST:
            raise ValueError(f"expected lengths of at least 1 token and at most {LONGEST:,}, got {length}")


def check_lengths(budget: Budget, context: int | None) -> None:
    """Refuse a budget at inputs that the model cannot take.

    Args:
        context: the model's longest input in tokens; None where there is no limit.

    Raises:
        UserError: there are such lengths.
    """
    if context is None:
        return
    named = {
        "lengths": budget.lengths or (),
        "kv": tuple(budget.kv) if isinstance(budget.kv, dict) else (),
        "density": tuple(budget.density) if isinstance(budget.density, dict) else (),
    }
    problems = [
        Problem(
            "the budget is for inputs that are longer than the model's context",
            f"search.budget.{key}",
            expected=f"lengths of at most {context} tokens",
            found=", ".join(str(length) for length in sorted(lengths) if length > context),
        )
        for key, lengths in named.items()
        if any(length > context for length in lengths)
    ]
    if problems:
        raise UserError(problems)


def effective_spans(shape: ModelShape, decision: Sequence[Sequence[AnySpan]]) -> list[list[AnySpan]]:
    """What the runtime runs: in a layer that slides by itself, the architecture's window replaces the decision."""
    return [
        list(row) if native is None else [own_span(native)] * len(row)
        for row, native in zip(decision, shape.native_windows, strict=True)
    ]


def dense_bytes(shape: ModelShape, length: int, itemsize: int) -> int:
    """KV bytes of the model as it is: `length` tokens a group, or the window in a layer that slides by itself."""
    return stock_kv_bytes(shape.native_windows, shape.kv_heads, length, shape.head_dim, itemsize)


def rule_bytes(shape: ModelShape, span: Span, length: int, itemsize: int) -> int:
    """KV bytes of one span in every head group that can have it, native sliding layers as they are."""
    spans = effective_spans(shape, [[span] * shape.kv_heads] * shape.layers)
    return kv_bytes(spans, length, shape.head_dim, itemsize)


def rule_keys(shape: ModelShape, span: Span, length: int) -> int:
    """Keys that the last query sees under one span in every head group that can have it; FULL is the dense model."""
    spans = effective_spans(shape, [[span] * shape.kv_heads] * shape.layers)
    return sum(visible_keys(own, length) for row in spans for own in row)


def smallest_rule(grid: SpanGrid) -> Span:
    """The rule of the grid that costs least, in every kind and at every length.

    Pages and visible keys grow with sink, beta and alpha, so it is the smallest in all three.
    """
    windows = [rule.span for rule in grid.rules(1) if not rule.span.is_full]
    return windows[0] if windows else FULL


def smallest_bytes(shape: ModelShape, grid: SpanGrid, length: int, itemsize: int) -> int:
    """The fewest KV bytes that any plan of the grid allocates at `length`."""
    return rule_bytes(shape, smallest_rule(grid), length, itemsize)


def smallest_share(shape: ModelShape, grid: SpanGrid, length: int, itemsize: int) -> float:
    """`smallest_bytes` over the dense model's, rounded up, so that a budget of this share is met."""
    return _rounded_up(smallest_bytes(shape, grid, length, itemsize) / dense_bytes(shape, length, itemsize))


def ceiling(shape: ModelShape, grid: SpanGrid, lengths: Iterable[int], itemsize: int) -> str | None:
    """In words, how much a model that is part local has to give; None where no layer slides by itself."""
    sliding = sum(native is not None for native in shape.native_windows)
    if not sliding:
        return None
    shares = [f"{smallest_share(shape, grid, length, itemsize):g} at {length:,} tokens" for length in sorted(lengths)]
    return (
        f"{sliding} of {shape.layers} layers slide by themselves and stay as they are; only the full ones "
        f"({shape.layers - sliding}) have anything to give. The smallest share of the dense KV bytes that any plan "
        f"reaches is {', '.join(shares)}"
    )


def check_feasible(problem: SearchProblem) -> None:
    """Raise one UserError with a problem for every kind and length whose limit no plan of the grid can meet."""
    problems = []
    shape, grid = problem.shape, problem.grid
    for length, limit in problem.limits.items():
        smallest = smallest_bytes(shape, grid, length, problem.itemsize)
        if smallest > limit:
            dense = dense_bytes(shape, length, problem.itemsize)
            problems.append(_too_tight("kv", shape, length, smallest, dense, limit))
    for length, limit in problem.key_limits.items():
        smallest = rule_keys(shape, smallest_rule(grid), length)
        if smallest > limit:
            dense = rule_keys(shape, FULL, length)
            problems.append(_too_tight("density", shape, length, smallest, dense, limit))
    if problem.times is not None:
        for length, limit in problem.times.limits.items():
            smallest = smallest_bytes(shape, grid, length, problem.itemsize)
            if smallest > limit:
                problems.append(_too_slow(problem.times, length, smallest))
    if problems:
        raise UserError(problems)


def _rounded_up(share: float) -> float:
    """Four digits, so that what a message asks for is enough."""
    return math.ceil(share * 10_000) / 10_000


def _too_tight(kind: str, shape: ModelShape, length: int, smallest: int, dense: int, limit: int) -> Problem:
    """Bytes (`kv`) or keys (`density`) that even the smallest rule exceeds."""
    unit, of = ("bytes", "the dense KV bytes") if kind == "kv" else ("keys", "the dense model's visible keys")
    share = _rounded_up(smallest / dense)
    return Problem(
        f"no plan meets the budget at length {length}",
        f"search.budget.{kind}",
        expected=f"at least {share:g} of {of} ({smallest:,} of {dense:,} {unit}), which the smallest rule of the "
        "profile's span grid takes in every head group"
        + (", beside the layers that slide by themselves" if any(shape.native_windows) else ""),
        found=f"{limit:,} {unit}, {limit / dense:.4g} of {of}",
        fix=f"raise the budget to {share:g} or more, budget at longer inputs, or profile a grid with a smaller "
        "sink or alpha_min",
    )


def _too_slow(times: TimeLimit, length: int, smallest: int) -> Problem:
    """A time that even the smallest rule exceeds."""
    share = _rounded_up(times.share_of(smallest, length))
    longer = "budget at longer inputs or larger batches, where attention takes more of a step"
    return Problem(
        f"no plan meets the budget `decode_time` at length {length}",
        "search.budget.decode_time",
        expected=f"at least {share:g} of the dense model's step, which the smallest rule of the profile's span grid "
        f"takes by {times.step.source}",
        found=f"{times.share:g} of the dense model's step",
        fix=f"raise it to {share:g} or more, or {longer}"
        if share <= 1
        else f"{longer}; nothing measured is faster than the dense model here",
    )
