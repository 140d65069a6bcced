"""Speed-up over the fastest dense attention against the length, a line for every plan and batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Protocol

from compress.plots.chart import Chart, Series


class SpeedRow(Protocol):
    """What is read of one measurement: `what` is `prefill` or `decode`, `mix` the name of the plan."""

    @property
    def what(self) -> str: ...
    @property
    def mix(self) -> str: ...
    @property
    def batch(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def speedup(self) -> float: ...


def speed_charts(rows: Iterable[SpeedRow]) -> list[Chart]:
    """One chart for prefill and one for decode, of what was measured."""
    lines: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        lines[row.what][f"plan {row.mix}, batch {row.batch}"].append((row.length, row.speedup))
    return [
        Chart(
            f"{what}, attention alone: speed-up over the fastest dense",
            "tokens",
            "times",
            [Series(label, sorted(points)) for label, points in series.items()],
            logarithmic=True,
            zero=True,
        )
        for what, series in sorted(lines.items(), reverse=True)
    ]
