"""Switches off branches of heads that have several, to see which of them does the work.

A head group behind a window has the window's softmax and a state for the keys before it. A mixer whose groups have such
branches has a setting for them, `Mixer.branches`, which no checkpoint has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from compress.runtime.mixer import Branches

WORDS: dict[Branches, str] = {"both": "full", "window": "window only", "linear": "linear only", "none": "none"}


@dataclass(frozen=True)
class Branched:
    """The groups of one layer that have branches.

    Attributes:
        groups: their numbers among the head groups of the layer that stay.
    """

    layer: int
    mixer: Any
    groups: tuple[int, ...]


def branched(model: Any) -> list[Branched]:
    """The mixers of a model whose groups have branches, layer by layer; none of a stock model."""
    return [
        Branched(layer, mixer, groups)
        for layer, kinds in enumerate(getattr(model.base_model, "compress_kinds", ()))
        for mixer, groups in zip(kinds.mixers, kinds.members, strict=True)
        if mixer.branches is not None
    ]


@contextmanager
def only(places: Sequence[Branched], branches: Branches, group: int | None = None) -> Iterator[None]:
    """Let only some branches count while it is open.

    Args:
        group: of the one layer in `places`; all groups if None.
    """
    before = [place.mixer.branches for place in places]
    for place in places:
        chosen = tuple(branches if group in (None, number) else "both" for number in place.groups)
        place.mixer.branches = branches if group is None else chosen
    try:
        yield
    finally:
        for place, setting in zip(places, before, strict=True):
            place.mixer.branches = setting
