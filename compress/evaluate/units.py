"""How numbers of each unit are written, and how they are set against the dense model's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """One unit of measure.

    Attributes:
        write: a number in words.
        fraction: its share of the dense model's, in parentheses behind it; None where a share says nothing.
        change: its change against the dense model, in a column of its own; None where a difference says nothing.
    """

    write: Callable[[float], str]
    fraction: Callable[[float], str] | None = None
    change: Callable[[float], str] | None = None


def _large(value: float) -> str:
    """A number with a prefix of the powers of 1000."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 1000 or not math.isfinite(value):
            return f"{value:.4g} {prefix}".strip()
        value /= 1000
    return f"{value:.4g} E"


UNITS = {
    "bytes": Unit(lambda value: f"{value / 2**20:,.2f} MiB", lambda fraction: f"{fraction:.0%}"),
    "parameters": Unit(lambda value: f"{value:,.0f}", lambda fraction: f"{fraction:.2%}"),
    "ms": Unit(lambda value: f"{value:.4g} ms", lambda fraction: f"{fraction:.3f}"),
    "FLOPs": Unit(_large, lambda fraction: f"{fraction:.1%}"),
    "share": Unit(lambda value: f"{value:.4f}"),
    "perplexity": Unit(lambda value: f"{value:.3f}", change=lambda ratio: f"{ratio - 1:+.1%}"),
    "right answers": Unit(lambda value: f"{value:.2f}"),
    "agreement": Unit(lambda value: f"{value:.3f}"),
    "score": Unit(lambda value: f"{value:.4g}"),
    "tokens": Unit(lambda value: f"{value:,.0f} tokens"),
    "load": Unit(lambda value: f"{value:.3f}"),
    "variation": Unit(lambda value: f"{value:.3f}"),
    "units": Unit(lambda value: f"{value:.0f}"),
    "nats": Unit(lambda value: f"{value:+.4f}"),
    "relative error": Unit(lambda value: f"{value:.1e}"),
}


def unit_of(name: str) -> Unit:
    """The unit of that name; four digits for one that is not known."""
    return UNITS.get(name) or Unit(lambda value: f"{value:.4g}")
