"""One number for every query head: a heat map over layers and heads, of one model or of several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.plots.figure import new_figure, save, style


@dataclass(frozen=True)
class HeadMap:
    """Numbers of query heads.

    Attributes:
        title: whose they are, and what.
        values: by layer, the number of each of its heads; heads of one unit have the same. A head without a number is
            left out.
    """

    title: str
    values: Mapping[int, Mapping[int, float]]

    @property
    def layers(self) -> list[int]:
        """The layers with numbers, ascending."""
        return sorted(self.values)

    @property
    def heads(self) -> int:
        """Columns: one more than the largest number of a head."""
        return 1 + max(max(row) for row in self.values.values())


def draw_heads(maps: Sequence[HeadMap], path: Path) -> list[Path]:
    """Heat maps side by side on one scale from 0 to 1; the files, none without maps. What has no number stays blank."""
    if not maps:
        return []
    layers, heads = max(len(each.values) for each in maps), max(each.heads for each in maps)
    with style():
        figure = new_figure(1.5 + len(maps) * max(2.6, 0.22 * heads), max(2.5, 1.5 + 0.16 * layers))
        axes = figure.subplots(1, len(maps), squeeze=False)[0]
        for axis, each in zip(axes, maps, strict=True):
            table = [[each.values[layer].get(head, math.nan) for head in range(each.heads)] for layer in each.layers]
            shown = axis.imshow(table, vmin=0, vmax=1, aspect="auto", cmap="viridis")
            axis.set(title=each.title, xlabel="query head", xticks=range(0, each.heads, -(-each.heads // 16)))
            ticks = range(0, len(each.layers), -(-len(each.layers) // 16))
            axis.set_yticks(ticks, [str(each.layers[tick]) for tick in ticks])
        axes[0].set_ylabel("layer")
        figure.colorbar(shown, ax=list(axes))
    return save(figure, path)
