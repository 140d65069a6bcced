"""Quality against KV bytes and parameters: a panel for each measure and length, every variant of one run or several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.plots.figure import new_figure, save
from compress.report.facts import Facts
from compress.report.sections import Chart, quality_against_bytes, quality_against_parameters

COLUMNS = 3


def draw_quality(folders: Sequence[Facts], path: Path) -> list[Path]:
    """Panels of the report's charts, with their intervals; the files, none where nothing was measured."""
    charts = [*quality_against_bytes(folders), *quality_against_parameters(folders)]
    if not charts:
        return []
    columns = min(COLUMNS, len(charts))
    rows = -(-len(charts) // columns)
    figure = new_figure(5 * columns, 3.8 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, chart in zip(panels, charts, strict=False):
        _panel(axis, chart)
    for axis in panels[len(charts) :]:
        axis.set_axis_off()
    return save(figure, path)


def _panel(axis: Any, chart: Chart) -> None:
    for number, one in enumerate(chart.series):
        for index, (share, value) in enumerate(one.points):
            bars = None
            if one.error is not None:
                low, high = one.error[index]
                # Wilson's interval of all right or all wrong ends at the share itself, to a rounding.
                bars = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axis.errorbar(share, value, yerr=bars, fmt="o", capsize=3, color=f"C{number}", label=one.label)
    axis.set_title(chart.title, fontsize=9)
    axis.set(xlabel=chart.x, ylabel=chart.y)
    axis.legend(fontsize=7)
