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
        name, what: whose numbers they are, and which.
        values: by layer, the number of each of its heads; heads of one unit have the same. A head without a number is
            left out.
    """

    name: str
    what: str
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
    """Heat maps on one scale from 0 to 1, a row for whose numbers they are, a column for each kind; the files, none
    without maps. What has no number stays blank."""
    if not maps:
        return []
    names, kinds = (list(dict.fromkeys(getattr(each, field) for each in maps)) for field in ("name", "what"))
    layers, heads = max(len(each.values) for each in maps), max(each.heads for each in maps)
    with style():
        width, height = max(3.2, 0.22 * heads), max(1.6, 0.8 + 0.12 * layers)
        figure = new_figure(1.5 + len(kinds) * width, 0.6 + len(names) * height)
        axes = figure.subplots(len(names), len(kinds), squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for each in maps:
            axis = axes[names.index(each.name), kinds.index(each.what)]
            axis.set_axis_on()
            table = [[each.values[layer].get(head, math.nan) for head in range(each.heads)] for layer in each.layers]
            shown = axis.imshow(table, vmin=0, vmax=1, aspect="auto", cmap="viridis")
            axis.set(title=f"{each.name}: {each.what}", xlabel="query head", ylabel="layer")
            axis.set_xticks(range(0, each.heads, -(-each.heads // 16)))
            ticks = range(0, len(each.layers), -(-len(each.layers) // 16))
            axis.set_yticks(ticks, [str(each.layers[tick]) for tick in ticks])
        figure.colorbar(shown, ax=list(axes.flat))
    return save(figure, path)
