"""What a fixed window loses: predicted loss against the window's size, one line a layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compress.plots.figure import new_figure, save, style
from compress.profile.key import Key
from compress.profile.store import Profile

NAMED = 8  # layers that the legend names


@dataclass(frozen=True)
class Curves:
    """Influence lost by fixed windows (beta 0) at one length.

    Attributes:
        sink: tokens at the start that stay visible besides.
        windows: tokens of the window (alpha), ascending.
        losses: by layer, the mean over its head groups for every window; layers that slide by themselves are left out.
    """

    length: int
    sink: int
    windows: list[int]
    losses: dict[int, list[float]]


def influence_curves(profile: Profile, kind: str = "absolute") -> Curves | None:
    """The curves at the longest profiled length; None where no influence, or no fixed window, was profiled.

    Args:
        kind: which influence: absolute, signed or joint.
    """
    grid, length = profile.grid, max(profile.lengths)
    table = profile.find(Key("influence", kind, length))
    if grid is None or 0.0 not in grid.betas or table is None:
        return None
    means = table[:, :, 0, grid.betas.index(0.0)].double().mean(1)
    native = profile.header.model.native_windows
    return Curves(
        length,
        grid.sinks[0],
        grid.alphas(length),
        {layer: row.tolist() for layer, row in enumerate(means) if native[layer] is None},
    )


def draw_influence(curves: Curves, path: Path) -> list[Path]:
    """A line a layer, coloured by depth, the legend for up to eight of them; the files."""
    from matplotlib import colormaps

    with style():
        figure = new_figure(7, 4.5)
        axis = figure.subplots()
        layers = sorted(curves.losses)
        named = layers[:: -(-len(layers) // NAMED)] if layers else []
        for number, layer in enumerate(layers):
            colour = colormaps["viridis"](number / max(1, len(layers) - 1))
            label = f"layer {layer}" if layer in named else None
            axis.plot(curves.windows, curves.losses[layer], color=colour, linewidth=1, label=label)
        axis.set_xscale("log", base=2)
        doubled = [window for window in curves.windows if window > 0 and window & (window - 1) == 0]
        axis.set_xticks(doubled, [f"{window:,}" for window in doubled])
        # Losses span orders of magnitude, and signed ones may be below zero.
        axis.set_yscale("symlog", linthresh=_smallest(curves))
        if all(loss >= 0 for row in curves.losses.values() for loss in row):
            axis.set_ylim(bottom=0)
        axis.set(
            title=f"influence lost at {curves.length:,} tokens, sink {curves.sink}, mean over head groups",
            xlabel="window, tokens",
            ylabel="predicted loss, nats",
        )
        if named:
            axis.legend(fontsize=7)
    return save(figure, path)


def _smallest(curves: Curves) -> float:
    """A thousandth of the largest size, below which the axis is linear."""
    return max((abs(loss) for row in curves.losses.values() for loss in row), default=0.0) / 1000 or 1.0
