"""Versions of installed packages, for records of how a number came about."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def installed(package: str) -> str | None:
    """Version of an installed package, None without it; looked up once in a process, for that reads a file."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions(*packages: str) -> dict[str, str]:
    """Versions by package, `not installed` without it: torch, transformers and this package, then those named."""
    return {name: installed(name) or "not installed" for name in ("torch", "transformers", "compress", *packages)}
