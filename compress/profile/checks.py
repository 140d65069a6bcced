"""What statistics cannot be measured with one another, or on what there is: a recipe tells it, and a run refuses it."""

from __future__ import annotations

from collections.abc import Sequence

from compress.errors import UserError
from compress.profile.statistic import Statistic
from compress.registry import statistics as known
from compress.targets.window import SpanGrid


def grid_of(statistics: Sequence[Statistic]) -> SpanGrid | None:
    """The grid whose rules statistics price; None where none of them prices rules.

    Raises:
        UserError: two of them price different grids, so that no search could use both.
    """
    grids = {one.registered: grid for one in statistics if (grid := one.span_grid) is not None}
    if len(set(grids.values())) > 1:
        raise UserError(
            "the statistics price different span grids",
            where="profile.statistics",
            expected="one grid",
            found="; ".join(f"{name}: {grid!r}" for name, grid in grids.items()),
            fix="give every statistic the same `grid`, or leave it out everywhere",
        )
    return next(iter(grids.values()), None)


def check_shared(statistics: Sequence[Statistic]) -> None:
    """Refuse what cannot be measured where processes share samples. Raises UserError."""
    if whole := [one.registered for one in statistics if not one.by_rows]:
        raise UserError(
            "statistics need all tokens of a sample in one process",
            where="profile.context",
            expected="statistics that are sums over the queries or the tokens of a sample",
            found=", ".join(f"`{name}`" for name in whole),
            fix="leave them out, or set `profile.context` to 1",
        )


def check_second(statistics: Sequence[Statistic]) -> None:
    """Refuse a second corpus that none of some statistics is measured on. Raises UserError."""
    if not any(one.reads == "projections" for one in statistics):
        able = [name for name, kind in known.items() if kind.reads == "projections"]
        raise UserError(
            "no statistic is measured on a second corpus",
            where="calibration.second",
            expected=f"an importance statistic that reads documents: {', '.join(able)}",
            found=", ".join(one.registered for one in statistics),
            fix="leave `calibration.second` out, or add such a statistic",
        )
