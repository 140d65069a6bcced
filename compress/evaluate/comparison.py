"""The side-by-side result of several models on the same items: its file form, and its cells."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress.evaluate.cell import Cell, heads_words
from compress.evaluate.earlier import from_schema_1
from compress.evaluate.measure import Result
from compress.evaluate.paired import Paired, averaged
from compress.files import write_text
from compress.json_file import AGAIN, read_model, sealed
from compress.registry import measures

MOST_BYTES = 256 << 20  # every item of every task of every variant is in it
UNTRAINED = " before recovery"  # behind the name of a row that was not trained, beside one that was
CONTROL_ROW = "dense, recovered"
WINDOWS_ROW = "windows only, recovered"

if TYPE_CHECKING:
    AnyResult = Result
else:
    AnyResult = Annotated[Union[tuple(kind.result for _, kind in measures.items())], Field(discriminator="measure")]  # noqa: UP007


class VariantResult(BaseModel):
    """One row: a model variant and all that was measured on it.

    Attributes:
        results: in the order of the measures that were asked for.
        seconds: wall clock of the measurements, from the run that made them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    results: list[AnyResult] = []
    seconds: float = Field(default=0.0, ge=0)

    @functools.cached_property
    def cells(self) -> list[Cell]:
        """The cells of all results."""
        return [cell for result in self.results for cell in result.cells()]

    @functools.cached_property
    def _by_key(self) -> dict[Any, Cell]:
        return {cell.key: cell for cell in self.cells}

    def like(self, cell: Cell) -> Cell | None:
        """This variant's cell of the same label, length and part; None where it has none."""
        return self._by_key.get(cell.key)

    def of(self, measure: str) -> list[Any]:
        """The results of one measure, by its name."""
        return [result for result in self.results if result.measure == measure]


class Comparison(BaseModel):
    """Variants beside each other, the dense model first.

    Attributes:
        asked: the measures with their settings, as in the recipe.
        text: what haystacks were cut from, as in the recipe; None where nothing read it.
        versions: Python, torch, transformers, and packages that a measure ran.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)

    schema_: Literal[2] = Field(2, alias="schema")
    model: str
    fingerprint: str
    dtype: str
    device: str
    seed: int
    batch_size: int
    asked: list[dict[str, Any]] = []
    text: dict[str, Any] | None = None
    versions: dict[str, str]
    variants: list[VariantResult] = Field(min_length=1)

    @model_validator(mode="after")
    def _rows_alike(self) -> Comparison:
        keys = [cell.key for cell in self.dense.cells]
        if len(set(keys)) < len(keys):
            raise ValueError("expected every number of a variant once")
        for row in self.variants:
            for result, dense in zip(row.results, self.dense.results, strict=False):
                numbers, known = ([cell.key for cell in each.cells()] for each in (result, dense))
                if numbers and known and result.measure == dense.measure and numbers != known:
                    raise ValueError(f"variant `{row.name[:80]}`: other numbers of {result.measure} than the dense one")
            names = [[result.measure for result in part.results] for part in (row, self.dense)]
            if names[0] != names[1]:
                raise ValueError(f"variant `{row.name[:80]}`: expected results of {names[1]}, got {names[0]}")
        return self

    @property
    def dense(self) -> VariantResult:
        """The row that the others are measured against."""
        return self.variants[0]

    def write(self, path: Path) -> None:
        """Write the JSON file, atomically."""
        write_text(path, sealed(self.model_dump(mode="json", by_alias=True)))

    def against_dense(self, variant: VariantResult, cell: Cell) -> Paired | None:
        """Paired difference of a cell to the dense model's; None for the dense model, or where items are unknown."""
        mine = variant.like(cell)
        return None if mine is None or variant is self.dense else mine.against(self.dense.like(cell))

    def tasks(self) -> list[Cell]:
        """The dense model's cells of tasks."""
        return [cell for cell in self.dense.cells if cell.table == "task" and cell.part is None]

    def worst_drop(self, variant: VariantResult) -> tuple[Cell, Paired] | None:
        """The task that lost most against the dense model; None where no task can be paired."""
        drops = [(cell, self.against_dense(variant, cell)) for cell in self.tasks()]
        known = [(cell, gap) for cell, gap in drops if gap is not None]
        worst = min(known, key=lambda drop: _gain(*drop), default=None)
        return worst

    def average(self, variant: VariantResult) -> Paired | None:
        """Mean over the tasks of the paired differences to dense; None where one has none, or less is better."""
        gaps = [self.against_dense(variant, cell) for cell in self.tasks()]
        known = [gap for gap in gaps if gap is not None]
        whole = len(known) == len(gaps) > 0 and all(cell.better == "higher" for cell in self.tasks())
        return averaged(known) if whole else None

    def records(self) -> list[dict[str, Any]]:
        """Every cell of every variant as plain data, with its share of the dense model's and the paired difference."""
        return [self._record(variant, cell) for variant in self.variants for cell in variant.cells]

    def _record(self, variant: VariantResult, cell: Cell) -> dict[str, Any]:
        low, high = cell.interval if cell.interval is not None else (None, None)
        gap = self.against_dense(variant, cell)
        part, place = cell.part, cell.place
        where = "" if place is None else f"layer {place[0]}" + ("" if place[1] is None else f" group {place[1]}")
        where += "" if cell.heads is None else f" {heads_words(cell.heads)}"
        return {
            "variant": variant.name,
            "label": cell.label,
            "length": cell.length,
            "part": where if part is None else f"{part.axis} {part.low:g} to {part.high:g}",
            "value": cell.value if math.isfinite(cell.value) else None,
            "unit": cell.unit,
            "better": cell.better,
            "low": low,
            "high": high,
            "interval": cell.interval_kind,
            "error": cell.error,
            "count": cell.count,
            "share_of_dense": cell.fraction(self.dense.like(cell)),
            "difference": None if gap is None else gap.difference,
            "difference_error": None if gap is None else gap.error,
        }


def _gain(cell: Cell, gap: Paired) -> tuple[float, str]:
    return (gap.difference if cell.better == "higher" else -gap.difference), cell.label


def read_comparison(path: Path) -> Comparison:
    """Read what `Comparison.write` wrote, now or in an earlier form.

    Raises:
        UserError: the file is missing, damaged or of a newer version; all problems at once.
    """
    return read_model(
        Comparison, path, "the comparison", fix=AGAIN, most=MOST_BYTES, finite=False, prepare=from_schema_1
    )
