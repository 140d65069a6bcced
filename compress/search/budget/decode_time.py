"""The budget `decode_time`: the predicted time of a decode step, at every length and batch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, ValidationInfo, field_validator

from compress.errors import Problem, UserError
from compress.limits import BATCH, ENTRIES, FACTOR
from compress.registry import PathText, budget_kinds
from compress.search.budget.kind import BudgetKind, Row, rounded_up, shares_by_length
from compress.search.budget.step_time import StepTime, measured, roofline

if TYPE_CHECKING:
    from compress.search.dense import Dense
    from compress.targets.cost import Cost


@dataclass(frozen=True, kw_only=True)
class TimeRow(Row):
    """The limit of the time as one of the bytes that a step reads, on which alone the time depends.

    Attributes:
        times: of a step.
        batches: batch sizes at which the row limits the time.
        most_time: share of the dense model's time that is allowed.
        dense_read: KV bytes that the dense model's step reads for one sequence.
        weights: bytes of the dense decoder layers, which the row counts, too; 0 where all plans have the same.
        itemsize: bytes of one number of them.
    """

    times: StepTime
    batches: tuple[int, ...]
    most_time: float
    dense_read: int
    weights: int
    itemsize: int

    def time_share(self, steps: int) -> float:
        """Share of the dense model's time that such a plan takes, at the batch size where it is largest."""
        size = self.amount(steps)

        def time(batch: int) -> float:
            return self.times.rest[batch] + size - self.weights if self.weights else self.times.planned(size, batch)

        return max(time(batch) / self.times.as_is(self.dense_read, batch) for batch in self.batches)

    def describe(self, smallest: int) -> dict[str, Any]:
        shares = {"limit_time_share": self.most_time, "smallest_time_share": self.time_share(smallest)}
        return {**super().describe(smallest), **shares}

    def amount_of(self, cost: Cost) -> None:
        """Nothing: the times are reported."""

    def report(self, costs: Callable[[int], Cost]) -> dict[str, Any]:
        """The predicted times of a plan beside the dense model's."""
        assert self.length is not None
        cost, times, rows = costs(self.length), self.times, []
        removed = self.weights - cost.parameters * self.itemsize if self.weights else 0
        for batch in self.batches:
            planned = times.planned(cost.read_bytes, batch, removed)
            dense = times.as_is(self.dense_read, batch)
            spent = {"ms": planned * times.unit_ms, "dense_ms": dense * times.unit_ms, "share": planned / dense}
            rows.append({"length": self.length, "batch": batch, **spent})
        return {"source": times.source, "rows": rows}

    def too_tight(self, smallest: int, least: str, cheaper: str) -> Problem:
        fraction = rounded_up(self.time_share(smallest))
        longer = "budget at longer inputs or larger batches, where attention takes more of a step"
        return Problem(
            f"no plan meets the budget `decode_time` at length {self.length}",
            "search.budget.decode_time",
            expected=f"at least {fraction:g} of the dense model's step, {least}, by {self.times.source}",
            found=f"{self.most_time:g} of the dense model's step",
            fix=f"raise it to {fraction:g} or more, or {longer}"
            if fraction <= 1
            else f"{longer}; nothing measured is faster than the dense model here",
        )


@budget_kinds.register("decode_time")
class DecodeTime(BudgetKind):
    """Time of a decode step, by a table that `compress bench` measured or by bytes over bandwidth (a roofline).

    A step takes longer the more it reads, so the limit of the time is applied exactly as a limit of bytes. A roofline
    counts the weights that a plan removes; a table has no rows for fewer weights, so there only the cache counts.
    """

    reads: ClassVar[tuple[str, ...]] = ("read_bytes", "parameters")

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

    @field_validator("batch_sizes", "cost_table", "bandwidth")
    @classmethod
    def _for_decode_time(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse settings of a kind that is not given, and settings that exclude each other."""
        if info.field_name == "batch_sizes" and (not value or min(value) < 1 or len(set(value)) < len(value)):
            raise ValueError("expected one or more batch sizes of at least 1, each once")
        if info.data.get("decode_time") is None and value != cls.model_fields[info.field_name or ""].default:
            raise ValueError("it is for `decode_time`, which is not given")
        if info.field_name == "bandwidth" and value is not None and info.data.get("cost_table") is not None:
            raise ValueError("leave it out, the times are those of `cost_table`")
        return value

    @property
    def tables(self) -> tuple[str, ...]:
        """Paths of the cost tables."""
        return (self.cost_table,) if isinstance(self.cost_table, str) else self.cost_table or ()

    @classmethod
    def report_lines(cls, report: Mapping[str, Any]) -> list[str]:
        return [
            f"decode step at {times['length']:,} tokens, batch {times['batch']}: {times['ms']:.3g} ms predicted, "
            f"dense {times['dense_ms']:.3g} ms, {times['share']:.1%}"
            for times in report["rows"]
        ]

    @classmethod
    def rows(cls, budget: Any, dense: Dense, profiled: Sequence[int]) -> list[Row]:
        """One row a length, of the tightest batch size; where weights count, one for every batch size.

        Raises:
            UserError: a table cannot be used (see `step_time.measured`), or no bandwidth is known.
        """
        shares = shares_by_length(cls.value(budget), budget.lengths or profiled)
        if not shares:
            return []
        times = step_time(budget, dense, tuple(shares))
        weights = dense.parameters * dense.itemsize if dense.removes and times.weights_count else 0
        sets = [(batch,) for batch in budget.batch_sizes] if weights else [tuple(budget.batch_sizes)]
        return [
            cls.row(length, fraction, dense, times, batches, weights)
            for length, fraction in shares.items()
            for batches in sets
        ]

    @classmethod
    def row(
        cls, length: int, fraction: float, dense: Dense, times: StepTime, batches: tuple[int, ...], weights: int
    ) -> TimeRow:
        """The row of one length; a share of 1 lets a plan through that changes nothing."""
        read, paged = (dense.cost(length, paged=paged).read_bytes for paged in (False, True))
        sequences = batches[0] if weights else 1
        if weights:  # in bytes: what is left of the time may be less than the dense model's weights
            limit = math.floor(fraction * times.as_is(read, sequences) - times.rest[sequences] + 1e-6) + weights
        else:
            limit = min(times.most_bytes(fraction, read, batch) for batch in batches)
        if fraction == 1:
            limit = max(limit, paged * sequences + weights)
        return TimeRow(
            cls.registered,
            "bytes",
            "the bytes that the dense model's decode step reads",
            length,
            limit,
            read * sequences + weights,
            (("read_bytes", sequences), ("parameters", dense.itemsize)) if weights else (("read_bytes", 1),),
            step=1 if weights else dense.page_bytes,
            times=times,
            batches=batches,
            most_time=fraction,
            dense_read=read,
            weights=weights,
            itemsize=dense.itemsize,
        )


def step_time(budget: Any, dense: Dense, lengths: Sequence[int]) -> StepTime:
    """The step time that `decode_time` is counted in: of the cost tables, or the roofline.

    Raises:
        UserError: a table cannot be used (see `step_time.measured`), or no bandwidth is known.
    """
    if budget.tables:
        held = {length: dense.cost(length + 1).read_bytes for length in lengths}
        return measured(budget.tables, dense.shape, dense.itemsize, budget.batch_sizes, held)
    if budget.bandwidth is not None:
        return roofline(dense.step_weights, budget.bandwidth * 1e9, budget.batch_sizes, "as the recipe says")
    if dense.bandwidth is None:
        raise UserError(
            "no bandwidth is known for `decode_time`",
            where="search.budget.bandwidth",
            expected="GB/s, or a cost_table",
        )
    return roofline(dense.step_weights, dense.bandwidth(), budget.batch_sizes, "a copy on this device")
