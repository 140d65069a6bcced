"""Cells: what a measure's result comes to. Tables, reports, plots and model cards read cells and know no measure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from compress.evaluate.paired import Paired, paired

STANDARD_ERRORS = "1.96 standard errors"


@dataclass(frozen=True)
class Part:
    """A range of a cell's items, `[low, high)`.

    Attributes:
        axis: `position` of a token in its window, `depth` of the evidence (0 is the start of the input, 1 the
            question), or `gap`, tokens between the evidence and where it is needed.
    """

    axis: Literal["position", "depth", "gap"]
    low: float
    high: float


@dataclass(frozen=True)
class Cell:
    """One number of one variant, with all that a table, a chart or a comparison with the dense model needs.

    Attributes:
        label: what was measured, as the head of its column: `perplexity`, `passkey`, `parameters`.
        unit: a key of `units.UNITS`, which says how such numbers are written.
        value: the number; infinity where a perplexity overflows.
        better: which direction is better.
        length: tokens of the input that it holds for; None where it holds for every length.
        interval: 95% interval of the value; `interval_kind` names the method.
        error: standard error of the value.
        count: items, prompts or windows that it comes from.
        items: the outcome of every item where the value is their mean, so that two variants can be paired.
        part: the range of items that it is limited to; None for the whole.
        place: layer and head group that it is of, the group None for a whole layer; None for the model. Numbers with a
            place are in a table of the variant's own, and in no other.
        heads: query heads that it is of, those of the layer in `place` that stay; None for all of them.
        table: where it is printed: a column of the first table (`summary`), a column of the table of costs (`cost`), a
            row of the last table with its difference to dense (`task`), or only in charts and files (None). Any other
            text is the title of a table whose rows are the variants that have such numbers.
        axis: for a cost, the words of an axis that quality is drawn over: `share of the dense KV bytes`.
        dense: the dense model's number where it was measured beside this one, and not in the dense variant's row.
        note: what has to be known of the number: the metric, how many items.
    """

    label: str
    unit: str
    value: float
    better: Literal["higher", "lower"]
    length: int | None = None
    interval: tuple[float, float] | None = None
    interval_kind: str = ""
    error: float | None = None
    count: int | None = None
    items: tuple[float, ...] | None = None
    part: Part | None = None
    place: tuple[int, int | None] | None = None
    heads: tuple[int, ...] | None = None
    table: str | None = None
    axis: str = ""
    dense: float | None = None
    note: str = ""

    @property
    def key(self) -> tuple[str, int | None, Part | None, tuple[int, int | None] | None, tuple[int, ...] | None]:
        """What the same cells of two variants have in common."""
        return self.label, self.length, self.part, self.place, self.heads

    @property
    def name(self) -> str:
        """The label without the length that names of suites end with."""
        return self.label.removesuffix(f"_{self.length}")

    @property
    def title(self) -> str:
        """Label and length in words."""
        return self.label if self.length is None else f"{self.name} at {self.length:,} tokens"

    def fraction(self, dense: Cell | None) -> float | None:
        """The number divided by the dense model's; None where that is missing or zero."""
        base = self.dense if self.dense is not None else None if dense is None else dense.value
        return self.value / base if base else None

    def against(self, dense: Cell | None) -> Paired | None:
        """Mean difference to the dense model over the same items; None where the items are not kept or differ."""
        return None if dense is None or self.items is None or dense.items is None else paired(self.items, dense.items)


def heads_words(heads: Sequence[int]) -> str:
    """Query heads in words: `head 3`, `heads 3 to 5`, or all of their numbers."""
    if len(heads) == 1:
        return f"head {heads[0]}"
    run = list(heads) == list(range(heads[0], heads[-1] + 1))
    return f"heads {heads[0]} to {heads[-1]}" if run else f"heads {', '.join(map(str, heads))}"


def by_part(
    cell: Cell, axis: Literal["depth", "gap"], placed: Sequence[tuple[float, float]], edges: Sequence[float]
) -> list[Cell]:
    """A cell for every range between two edges that has items: the mean of its outcomes.

    Args:
        cell: what the ranges are of; label, unit, length, direction and table are taken from it.
        placed: (place, outcome) of every item.
        edges: ascending; a place equal to the last edge belongs to the last range.
    """
    cells = []
    for low, high in pairwise(edges):
        last = high == edges[-1]
        inside = [outcome for place, outcome in placed if low <= place < high or (last and place == high)]
        if inside:
            cells.append(
                Cell(
                    cell.label,
                    cell.unit,
                    math.fsum(inside) / len(inside),
                    cell.better,
                    length=cell.length,
                    count=len(inside),
                    part=Part(axis, low, high),
                    table=cell.table,
                )
            )
    return cells
