"""Charts of points and lines: one look for files and for the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress.plots.figure import LINE, SERIES, inline_svg, new_figure, save, style

COLUMNS = 3  # charts beside each other in a file
LARGEST = 1e100  # differences of larger numbers have no digits left


@dataclass(frozen=True)
class Series:
    """Points of one line, with a label; `error` has the lower and upper end of a vertical bar for each."""

    label: str
    points: Sequence[tuple[float, float]]
    error: Sequence[tuple[float, float]] | None = None
    line: bool = True


@dataclass(frozen=True)
class Chart:
    """Series on one pair of axes.

    Attributes:
        logarithmic: x grows by factors of two, with a tick at every point.
        zero: y starts at zero.
    """

    title: str
    x: str
    y: str
    series: Sequence[Series]
    logarithmic: bool = False
    zero: bool = False


def draw_charts(charts: Sequence[Chart], path: Path) -> list[Path]:
    """Charts beside and below each other in a file of each kind; the files, none without charts."""
    if not charts:
        return []
    columns = min(COLUMNS, len(charts))
    rows = -(-len(charts) // columns)
    with style():
        figure = new_figure(5 * columns, 3.8 * rows)
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis, chart in zip(panels, charts, strict=False):
            _draw(axis, chart)
        for axis in panels[len(charts) :]:
            axis.set_axis_off()
    return save(figure, path)


def chart_svg(chart: Chart, name: str) -> str:
    """A chart as an SVG element for a page (`inline_svg`); empty where no point can be drawn."""
    if not any(one.points for one in map(_finite, chart.series)):
        return ""
    with style():
        figure = new_figure(5.6, 3.6, layout=None)  # a constrained layout draws everything several times
        figure.subplots_adjust(left=0.14, right=0.97, bottom=0.15, top=0.91)
        figure.patch.set_alpha(0)
        axis = figure.subplots()
        axis.patch.set_alpha(0)
        _draw(axis, chart)
    return inline_svg(figure, name, chart.title)


def _draw(axis: Any, chart: Chart) -> None:
    series = [one for one in map(_finite, chart.series) if one.points]
    for number, one in enumerate(series):
        across, up = zip(*one.points, strict=True)
        bars = None
        if one.error is not None:
            # An interval of all right or all wrong ends at the share itself, to a rounding.
            ends = [(max(0.0, y - low), max(0.0, high - y)) for y, (low, high) in zip(up, one.error, strict=True)]
            bars = list(zip(*ends, strict=True))
        joined = one.line and len(one.points) > 1
        axis.errorbar(
            across,
            up,
            yerr=bars,
            fmt="o-" if joined else "o",
            markersize=5,
            capsize=3,
            color=SERIES[number % len(SERIES)],
            label=one.label,
        )
    axis.set_title(chart.title)
    axis.set(xlabel=chart.x, ylabel=chart.y)
    if chart.logarithmic:
        axis.set_xscale("log", base=2)
        ticks = sorted({x for one in series for x, _ in one.points})
        axis.set_xticks(ticks, [short(tick) for tick in ticks])
        axis.minorticks_off()
    if chart.zero:
        axis.set_ylim(bottom=0)
    axis.grid(axis="y", color=LINE, linewidth=0.6)
    axis.set_axisbelow(True)
    if series:
        axis.legend()


def _finite(series: Series) -> Series:
    """Without points that have no place: a perplexity that overflowed."""
    ends = series.error or [(0.0, 0.0)] * len(series.points)
    kept = [number for number, parts in enumerate(zip(series.points, ends, strict=True)) if _placed(parts)]
    error = None if series.error is None else [series.error[number] for number in kept]
    return replace(series, points=[series.points[number] for number in kept], error=error)


def _placed(parts: tuple[tuple[float, float], tuple[float, float]]) -> bool:
    return all(math.isfinite(value) and abs(value) < LARGEST for pair in parts for value in pair)


def short(value: float) -> str:
    """A number of tokens in a few characters: 1k is 1,024."""
    return f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:g}"
