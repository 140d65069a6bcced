"""Switches off branches of heads that have several, to see which of them does the work.

A head group behind a window has the window's softmax and a state for the keys before it. A mixer whose groups have such
branches has a setting for them, `Mixer.branches`, which no checkpoint has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from compress.runtime.mixer import Branches
from compress.runtime.step import Step

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

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


@contextmanager
def beside(model: Any, look: Callable[[Branched, QKV, Step, dict[str, Any]], None]) -> Iterator[None]:
    """Let `look` see what a forward pass gives every mixer that has branches, ahead of the mixer.

    Args:
        look: gets the queries `[B, H, T, D]`, keys and values `[B, G, T, D]`, the step, and `prefill`'s options.
    """
    with ExitStack() as undo:
        for place in branched(model):

            def prefill(
                query: Any, key: Any, value: Any, state: Any, step: Step, place: Branched = place, **options: Any
            ) -> Any:
                vars(place.mixer).pop("prefill")  # what `look` runs or copies is the plain mixer
                look(place, (query, key, value), step, options)
                return place.mixer.prefill(query, key, value, state, step, **options)

            place.mixer.prefill = prefill
            undo.callback(vars(place.mixer).pop, "prefill", None)
        yield
