"""Compares golden values: to the bit on the machine that they were made on, beyond rounding on any other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

RELATIVE, ABSOLUTE = 1e-3, 1e-6
# What is of rounding alone: hashes, and by how much two ways to one number differ.
ROUNDING = {"bits", "logit_difference"}


def differences(expected: Any, found: Any, *, exact: bool, where: str = "") -> Iterator[str]:
    """One line for every value that differs, with its place.

    Args:
        exact: hashes are compared, and numbers to the last bit; otherwise `ROUNDING` is left out and numbers that are
            no integers may differ by rounding.
    """
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        for key in sorted({*expected, *found}):
            if key in ROUNDING and not exact:
                continue
            here = f"{where}/{key}"
            if key not in expected or key not in found:
                yield f"{here}: only in what is {'found' if key in found else 'expected'}"
            else:
                yield from differences(expected[key], found[key], exact=exact, where=here)
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for number, pair in enumerate(zip(expected, found, strict=True)):
            yield from differences(*pair, exact=exact, where=f"{where}/{number}")
    elif isinstance(expected, float) and isinstance(found, int | float) and not exact:
        if not math.isclose(expected, found, rel_tol=RELATIVE, abs_tol=ABSOLUTE):
            yield f"{where}: expected {expected!r}, found {found!r}"
    elif expected != found:
        yield f"{where}: expected {str(expected)[:200]}, found {str(found)[:200]}"
