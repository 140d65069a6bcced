"""Plots as SVG text: lines and points with axes. Colours are CSS classes, so that a page can be light or dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 44
LARGEST = 1e100  # differences of larger numbers have no digits left


@dataclass(frozen=True)
class Series:
    """Points of one line, with a label; `error` has the lower and upper end of a vertical bar for each."""

    label: str
    points: Sequence[tuple[float, float]]
    error: Sequence[tuple[float, float]] | None = None
    line: bool = True


def plot(series: Sequence[Series], *, title: str, x: str, y: str, logarithmic: bool = False, zero: bool = False) -> str:
    """An SVG element with axes, one colour a series, a legend, and a title for readers that do not see it.

    Args:
        logarithmic: x grows by factors of two.
        zero: y starts at zero.
    """
    series = [shown for shown in map(_finite, series) if shown.points]
    points = [point for one in series for point in one.points]
    if not points:
        return ""
    across = _scale([math.log2(px) if logarithmic else px for px, _ in points], LEFT, WIDTH - RIGHT, pad=0.06)
    ends = [end for one in series for pair in one.error or () for end in pair]
    up = _scale([*(py for _, py in points), *ends, *([0.0] if zero else [])], HEIGHT - BOTTOM, TOP, pad=0.08)

    def place(px: float, py: float) -> tuple[float, float]:
        return across.at(math.log2(px) if logarithmic else px), up.at(py)

    drawn = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>'
    ]
    for value in up.ticks():
        at = up.at(value)
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>')
    ticks = sorted({px for px, _ in points}) if logarithmic else across.ticks()
    for value in ticks:
        at = across.at(math.log2(value) if logarithmic else value)
        drawn.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_short(value)}</text>')
    drawn.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>')
    drawn.append(f'<text transform="translate(14 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(y)}</text>')
    for number, one in enumerate(series):
        colour = f"c{number % 6}"
        placed = [place(*point) for point in one.points]
        if one.line and len(placed) > 1:
            joined = " ".join(f"{px:.1f},{py:.1f}" for px, py in placed)
            drawn.append(f'<polyline class="{colour}" fill="none" points="{joined}"/>')
        for index, (px, py) in enumerate(placed):
            if one.error is not None:
                below, above = (up.at(end) for end in one.error[index])
                drawn.append(f'<line class="{colour}" x1="{px:.1f}" x2="{px:.1f}" y1="{below:.1f}" y2="{above:.1f}"/>')
            told = f"{one.label}: {one.points[index][1]:.4g} at {_short(one.points[index][0])}"
            drawn.append(
                f'<circle class="{colour}" cx="{px:.1f}" cy="{py:.1f}" r="4"><title>{escape(told)}</title></circle>'
            )
    drawn.append("</svg>")
    legend = "".join(f'<li class="c{number % 6}">{escape(one.label)}</li>' for number, one in enumerate(series))
    return f'<figure>{"".join(drawn)}<ul class="legend">{legend}</ul><figcaption>{escape(title)}</figcaption></figure>'


def _finite(series: Series) -> Series:
    """Without points that have no place: a perplexity that overflowed."""
    ends = series.error or [(0.0, 0.0)] * len(series.points)
    kept = [number for number, parts in enumerate(zip(series.points, ends, strict=True)) if _placed(parts)]
    error = None if series.error is None else [series.error[number] for number in kept]
    return replace(series, points=[series.points[number] for number in kept], error=error)


def _placed(parts: tuple[tuple[float, float], tuple[float, float]]) -> bool:
    return all(math.isfinite(value) and abs(value) < LARGEST for pair in parts for value in pair)


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    at: Callable[[float], float]

    def ticks(self) -> list[float]:
        """About five round values within the range."""
        step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        step *= next(factor for factor in (1, 2, 2.5, 5, 10) if (self.high - self.low) / (step * factor) <= 5)
        first = math.ceil(self.low / step)
        return [round(number * step, 10) for number in range(first, math.floor(self.high / step) + 1)]


def _scale(values: Sequence[float], start: float, end: float, pad: float) -> _Scale:
    low, high = min(values), max(values)
    width = (high - low) or abs(high) or 1.0
    low, high = low - pad * width, high + pad * width
    return _Scale(low, high, lambda value: start + (value - low) / (high - low) * (end - start))


def _short(value: float) -> str:
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:g}k"
    return f"{value:g}"
