"""What lm-eval found on one task or suite: its metrics, and the outcome of every item."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress.bench.file import MOST_TOKENS
from compress.evaluate.cell import STANDARD_ERRORS, Cell, by_part
from compress.evaluate.measure import Result
from compress.words import counted

DEPTHS = tuple(number / 5 for number in range(6))


class Item(BaseModel):
    """One item's figures, by metric, and where its evidence lay, if it is of a suite that records that."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metrics: dict[str, float]
    depth: float | None = Field(default=None, ge=0, le=1)
    gap: int | None = Field(default=None, ge=0)
    written: str | None = None


class TaskResult(Result):
    """One task on one model.

    Attributes:
        metrics: as lm-eval aggregates them, by name; errors: their standard errors where lm-eval has one.
        higher: whether more is better, by metric.
        length: tokens of the items, for a suite.
        generates: False for tasks that only score given text: they never touch a KV cache.
    """

    measure: Literal["lm_eval"] = "lm_eval"
    task: str
    version: str
    metrics: dict[str, float] = Field(min_length=1)
    errors: dict[str, float]
    higher: dict[str, bool]
    length: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    generates: bool
    samples: list[Item]

    @model_validator(mode="after")
    def _main_is_there(self) -> TaskResult:
        main = self.main()
        if main not in self.higher:
            raise ValueError(f"higher: expected an entry for `{main}`, the task's main metric")
        placed = [sample for sample in self.samples if sample.depth is not None or sample.gap is not None]
        if any(main not in sample.metrics for sample in placed):
            raise ValueError(f"samples: expected `{main}` of every item with a place")
        return self

    def main(self) -> str:
        """The metric that stands for the task: the normalised accuracy, else the first."""
        return next((name for name in ("score", "acc_norm", "acc") if name in self.metrics), next(iter(self.metrics)))

    def cells(self) -> list[Cell]:
        """The main metric, and for a suite its means by depth of the evidence and by the gap behind it."""
        main = self.main()
        value, error = self.metrics[main], self.errors.get(main)
        outcomes = [item.metrics.get(main) for item in self.samples]
        kind = "" if self.generates else ", scored"
        whole = Cell(
            self.task,
            "score",
            value,
            "higher" if self.higher[main] else "lower",
            length=self.length,
            interval=None if error is None else (value - 1.96 * error, value + 1.96 * error),
            interval_kind="" if error is None else STANDARD_ERRORS,
            error=error,
            count=len(self.samples),
            items=None if None in outcomes else tuple(outcome for outcome in outcomes if outcome is not None),
            table="task",
            note=f"{main}{kind}, {counted(len(self.samples), 'item')}",
        )
        depths = [(item.depth, item.metrics[main]) for item in self.samples if item.depth is not None]
        gaps = [(float(item.gap), item.metrics[main]) for item in self.samples if item.gap is not None]
        most = max((gap for gap, _ in gaps), default=1.0)
        powers = range(math.ceil(math.log(max(most, 1.0), 4)) + 1)
        return [
            whole,
            *by_part(whole, "depth", depths, DEPTHS),
            *by_part(whole, "gap", gaps, [0.0, *(4.0**power for power in powers)]),
        ]
