"""Sizes, times and lists in words."""

from __future__ import annotations

from collections.abc import Iterable


def size(count: int | float) -> str:
    """Bytes for people, in powers of 1024."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def counted(number: int, noun: str) -> str:
    """A number with its noun, as `1 weight` and `3 weights`; for nouns whose plural ends in s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def either(names: Iterable[str]) -> str:
    """What may be written, as "`a`, `b` or `c`"."""
    *others, last = [f"`{name}`" for name in names] or [""]
    return " or ".join(filter(None, (", ".join(others), last)))


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes:02d} min"
