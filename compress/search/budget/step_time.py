"""The time of a decode step, predicted from the KV bytes it reads: by a table of `compress bench`, or by a roofline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from compress.bench.file import WholeModel, read_bench
from compress.errors import UserError

if TYPE_CHECKING:
    from compress.plan import ModelShape

AGAIN = "compress bench MODEL --what model --mix A,B,full --batch B --lengths ... --out FOLDER"


class Curve:
    """Time of the attention of all layers as a function of the KV bytes that they read.

    Measured points are joined by straight lines. Below the smallest point its time holds, since nothing is
    assumed to be faster than what was measured. Beyond the largest point the time is extrapolated in proportion to the
    bytes; this overestimates when part of the time is constant. Times are made non-decreasing in bytes.

    Args:
        points: (bytes, time), at least one, in any order.
    """

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        sizes, times = np.array(sorted(points)).T
        self.bytes = sizes
        self.times = np.maximum.accumulate(np.maximum(times, 0.0))

    def time(self, size: float) -> float:
        """Time of `size` bytes."""
        if size >= self.bytes[-1]:
            return float(self.times[-1] * size / self.bytes[-1])
        return float(np.interp(size, self.bytes, self.times))

    def most_bytes(self, time: float) -> float:
        """The most bytes whose time is at most `time`; 0 where even the smallest measured point takes longer."""
        if time < self.times[0]:
            return 0.0
        if time >= self.times[-1]:
            return float(self.bytes[-1] * (time / self.times[-1] if self.times[-1] > 0 else 1.0))
        return float(np.interp(time, self.times, self.bytes))


@dataclass(frozen=True)
class StepTime:
    """Time of one decode step: the time of everything but attention, and attention's as a function of its KV bytes.

    The first part (weights, and all else) is the same for the plan and the dense model. The second depends on a plan
    only through the bytes of all its layers, times the batch. Two ways to come by both:

    * a table (`measured`): times of the whole model as `compress bench` measured them, plan and dense apart;
    * a roofline (`roofline`): the weights' bytes and the KV bytes over one bandwidth. Shares of the dense time then do
      not depend on the bandwidth, which only turns them into milliseconds, and a plan gains by the weights that it
      removes.

    Attributes:
        rest: time of everything but attention, by batch size.
        plan, dense: time of the attention of all layers by batch size, against KV bytes of the whole batch in the
            searched model's dtype.
        unit_ms: milliseconds of one unit of these times.
        source: where the figures are from, in words.
        weights_count: whether a removed byte of weights saves the time of a byte; a table measured no such model.
    """

    rest: Mapping[int, float]
    plan: Mapping[int, Curve]
    dense: Mapping[int, Curve]
    unit_ms: float
    source: str
    weights_count: bool = False

    def planned(self, size: int, batch: int, removed: int = 0) -> float:
        """Time of a plan that reads `size` KV bytes for one sequence and lacks `removed` bytes of weights."""
        rest = self.rest[batch] - (removed if self.weights_count else 0)
        return rest + self.plan[batch].time(size * batch)

    def as_is(self, size: int, batch: int) -> float:
        """Time of the dense model, which reads `size` KV bytes for one sequence."""
        return self.rest[batch] + self.dense[batch].time(size * batch)

    def most_bytes(self, fraction: float, dense: int, batch: int) -> int:
        """The KV bytes of one sequence up to which a plan's step takes at most a share of the dense model's."""
        left = fraction * self.as_is(dense, batch) - self.rest[batch]
        # A time that is met exactly must not be missed by the last digit of a division.
        return math.floor(self.plan[batch].most_bytes(left) / batch + 1e-6)


def roofline(weights: int, bandwidth: float, batch_sizes: Sequence[int], how: str) -> StepTime:
    """Bytes over bandwidth, for the weights (once a step) and for the KV cache (of every sequence).

    Args:
        weights: bytes that a step reads whatever the cache holds.
        bandwidth: bytes per second.
        how: where the bandwidth is from, in words.
    """
    line = dict.fromkeys(batch_sizes, Curve([(0.0, 0.0), (1.0, 1.0)]))
    source = f"roofline: {weights:,} bytes of weights, and the KV bytes, at {bandwidth / 1e9:.4g} GB/s ({how})"
    return StepTime(dict.fromkeys(batch_sizes, float(weights)), line, line, 1e3 / bandwidth, source, weights_count=True)


def measured(
    paths: Sequence[str], shape: ModelShape, itemsize: int, batch_sizes: Sequence[int], sizes: Mapping[int, int]
) -> StepTime:
    """The step time by the whole-model rows of files that `compress bench --what model --out FOLDER` wrote.

    A row has the time of a decode step of a plan, of the dense model, and of the model without attention, beside the
    bytes that both caches held. The last is the time of everything but attention, and what a step takes longer is
    attention's. Rows count whatever their length, those of another batch size do not. A row's cache was allocated
    for the steps of the measurement, too, so that a plan may hold a page or two a head group less than its row.

    Args:
        itemsize: bytes of one cached number of the searched model; the table's are counted in this dtype.
        sizes: KV bytes that the dense model holds for one sequence after a decode step, by the budget's lengths.

    Raises:
        UserError: a file cannot be read, they hold no rows of this model and these batch sizes, or the dense model was
            not measured around the budget's lengths.
    """
    token = shape.layers * shape.kv_heads * 2 * shape.head_dim
    rows: list[tuple[float, WholeModel]] = []
    machines = set()
    for path in paths:
        table = read_bench(Path(path).expanduser(), "the cost table", fix=AGAIN)
        cached = torch.empty(0, dtype=getattr(torch, table.dtype)).element_size()
        machines.add(f"{table.dtype} on {table.machine}")
        for row in table.model_rows:
            # The bench's dense cache holds one token more than the prompt, in every layer.
            ours = row.dense.cache_bytes == row.batch * (row.length + 1) * token * cached
            pruned = row.parameters != row.dense_parameters
            if ours and not pruned and not row.shape.endswith(", one layer"):
                rows.append((itemsize / cached, row))
    where = ", ".join(paths)
    missing = [str(batch) for batch in batch_sizes if all(row.batch != batch for _, row in rows)]
    if missing:
        raise UserError(
            f"the cost table has no whole-model rows of this model at batch size {', '.join(missing)}",
            where=where,
            expected=f"rows of a model with {token:,} cached numbers a token",
            found=f"{len(rows)} such rows" + (f", of batch size {_batches(rows)}" if rows else ""),
            fix=f"measure this model at these batch sizes, and name every file in `cost_table`: {AGAIN}",
        )
    if len(machines) > 1:
        raise UserError("the cost tables are of different dtypes or devices", where=where, found=", ".join(machines))
    rest: dict[int, float] = {}
    plan: dict[int, Curve] = {}
    dense: dict[int, Curve] = {}
    for batch in batch_sizes:
        of_batch = [(scale, row) for scale, row in rows if row.batch == batch]
        spent = sorted(row.without_attention.median for _, row in of_batch)
        rest[batch] = spent[len(spent) // 2]
        for curves, sides in (
            (plan, [(scale, row.plan) for scale, row in of_batch]),
            (dense, [(scale, row.dense) for scale, row in of_batch]),
        ):
            points = [(side.cache_bytes * scale, side.decode.median - rest[batch]) for scale, side in sides]
            curves[batch] = Curve(points)
        low, high = dense[batch].bytes[0], dense[batch].bytes[-1]
        outside = [f"{length:,}" for length, size in sizes.items() if not low <= size * batch <= high]
        if outside:
            measured_at = sorted({row.length for _, row in of_batch})
            raise UserError(
                f"the dense model was not measured around the length {', '.join(outside)} at batch size {batch}",
                where=where,
                expected="rows at this length, or at a shorter and a longer one",
                found=f"rows at {', '.join(f'{length:,}' for length in measured_at)} tokens",
                fix=f"measure it there, or budget at other `lengths`: {AGAIN}",
            )
    return StepTime(rest, plan, dense, 1.0, f"{len(rows)} measured rows of {where}, {machines.pop()}")


def _batches(rows: Sequence[tuple[float, WholeModel]]) -> str:
    return ", ".join(map(str, sorted({row.batch for _, row in rows})))
