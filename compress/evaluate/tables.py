"""The tables of a comparison, made of its cells alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from compress.evaluate.cell import Cell, Part
from compress.evaluate.comparison import Comparison, VariantResult
from compress.evaluate.grid import Column, Grid
from compress.evaluate.paired import Paired
from compress.evaluate.units import unit_of
from compress.registry import measures

OF_ALL = ("summary", "cost", "task", None)  # what `Cell.table` may be besides the title of a table of some variants
AXES = {
    "position": "by position of the token in its window",
    "depth": "by depth, 0 is the start (prompts)",
    "gap": "by tokens between the evidence and its question (items)",
}


def tables(comparison: Comparison, parts: bool = True) -> list[Grid]:
    """A table of quality and bytes, then costs, quality by position and depth, and tasks: what there is.

    Args:
        parts: whether to add the tables by depth; those by position are always there.
    """
    grids = [summary(comparison)]
    if _tells(comparison):
        grids.append(_wide(comparison, "cost", "parameters, time and operations"))
    grids += [_wide(comparison, title, title) for title in _titles(comparison)]
    grids += [_ranges(comparison, cell, axis) for cell, axis in _ranged(comparison) if parts or axis == "position"]
    grids += [grid for row in comparison.variants for grid in _places(row)]
    return [*grids, _tasks(comparison)] if comparison.tasks() else grids


def markdown(comparison: Comparison) -> str:
    """All tables in Markdown, with their conditions above and below."""
    return "\n\n".join(grid.markdown() for grid in tables(comparison))


def summary(comparison: Comparison) -> Grid:
    """One row a variant: bytes, and quality at every length."""
    title = f"{comparison.model}, {comparison.dtype} on {comparison.device}, seed {comparison.seed}"
    return _wide(comparison, "summary", title)


def _titles(comparison: Comparison) -> list[str]:
    """The titles of the tables of numbers that only some variants have, and no others are in."""
    named = (cell.table for row in comparison.variants for cell in row.cells)
    return [table for table in dict.fromkeys(named) if table is not None and table not in OF_ALL]


def _cells(comparison: Comparison, table: str) -> list[Cell]:
    """Cells of a table without their parts, in the order of the rows that have them, each once."""
    cells = [cell for row in comparison.variants for cell in row.cells if cell.table == table and cell.part is None]
    cells = [cell for cell in cells if cell.place is None]
    return list({cell.key: cell for cell in reversed(cells)}.values())[::-1]


def _tells(comparison: Comparison) -> bool:
    """Whether a cost was asked for, or differs between two variants."""
    for row in comparison.variants:
        for result in row.results:
            costs = [cell for cell in result.cells() if cell.table == "cost"]
            named = not measures[result.measure].always
            if any(named or _differs(comparison, cell) for cell in costs):
                return True
    return False


def _differs(comparison: Comparison, cell: Cell) -> bool:
    """Whether a cost is another than the dense model's, or one that the dense model does not have."""
    dense = comparison.dense.like(cell)
    return dense is None or cell.fraction(dense) not in (None, 1.0)


def _wide(comparison: Comparison, table: str, title: str) -> Grid:
    """A row for every variant, a column for every number, and for a perplexity one more with its change."""
    chosen = _cells(comparison, table)
    shown = [row for row in comparison.variants if table in OF_ALL or any(map(row.like, chosen))]
    columns = [Column("variant", "name")]
    for cell in chosen:
        columns.append(Column(cell.name if cell.length is None else f"{cell.name}\nat {cell.length:,}"))
        if unit_of(cell.unit).change is not None:
            columns.append(Column("over\ndense"))
    rows = [[row.name, *(text for cell in chosen for text in texts(comparison, row, cell))] for row in shown]
    words = [
        result.words()
        for row in shown
        for result in row.results
        if any(cell.table == table for cell in result.cells()) and result.words()
    ]
    return Grid(title, columns, rows, "; ".join(dict.fromkeys(words)))


def texts(comparison: Comparison, row: VariantResult, like: Cell) -> list[str]:
    """A number in words with its interval, or its share of the dense model's; then its change, for a perplexity."""
    cell, unit = row.like(like), unit_of(like.unit)
    wide = unit.change is not None
    if cell is None:
        return [""] * (1 + wide)
    text = unit.write(cell.value)
    fraction = cell.fraction(comparison.dense.like(like))
    if cell.interval is not None:
        text += f" ({unit.write(cell.interval[0])} to {unit.write(cell.interval[1])})"
    elif unit.fraction is not None and fraction is not None:
        text += f" ({unit.fraction(fraction)})"
    if unit.change is None:
        return [text]
    return [text, "" if row is comparison.dense or fraction is None else unit.change(fraction)]


def _ranged(comparison: Comparison) -> list[tuple[Cell, str]]:
    """Cells of the first table, and of those of some variants, that have parts, with the axis of the parts."""
    tables = ("summary", *_titles(comparison))
    axes = {
        (cell.label, cell.length): cell.part.axis
        for row in comparison.variants
        for cell in row.cells
        if cell.part is not None and cell.table in tables
    }
    whole = [cell for table in tables for cell in _cells(comparison, table)]
    parted = [(cell, axes[cell.label, cell.length]) for cell in whole if cell.key[:2] in axes]
    return sorted(parted, key=lambda pair: list(AXES).index(pair[1]))


def parts_of(row: VariantResult, cell: Cell, axis: str) -> list[tuple[Part, Cell]]:
    """The ranges of a cell on one axis, in order."""
    return [
        (part.part, part)
        for part in row.cells
        if part.part is not None and part.part.axis == axis and part.key[:2] == cell.key[:2]
    ]


def _ranges(comparison: Comparison, cell: Cell, axis: str) -> Grid:
    """One number in ranges of an axis, a row a variant."""
    measured = [row for row in comparison.variants if row.like(cell) is not None]
    of_dense = parts_of(measured[0], cell, axis)
    counted = axis != "position"
    columns = [Column("variant", "name")]
    for part, cell_of_part in of_dense:
        columns.append(
            Column(
                f"{edge(part.low, axis)} to {edge(part.high, axis)}" + (f" ({cell_of_part.count})" if counted else "")
            )
        )
    rows = []
    for row in measured:
        values = [row.like(cell_of_part) for _, cell_of_part in of_dense]
        texts = ["" if value is None else unit_of(value.unit).write(value.value) for value in values]
        rows.append([row.name, *texts])
    name = cell.name if cell.length is None or axis == "position" else f"{cell.name} at {cell.length:,}"
    return Grid(f"{name} {AXES[axis]}", columns, rows)


def _places(row: VariantResult) -> list[Grid]:
    """For every measure with numbers of layers or head groups: a row a layer, a column a group, numbers in a cell.

    Those of query heads are too many for a table: they are in the maps of the report, and in the records.
    """
    grids = []
    for result in row.results:
        cells = [cell for cell in result.cells() if cell.place is not None and cell.heads is None]
        placed = {(cell.place, cell.label): cell for cell in cells}
        if not placed:
            continue
        labels = list(dict.fromkeys(label for _, label in placed))
        layers = sorted({place[0] for place, _ in placed if place is not None})
        groups = sorted({place[1] for place, _ in placed if place is not None}, key=lambda n: -1 if n is None else n)
        words = [f"in a cell: {' / '.join(labels)}" if len(labels) > 1 else "", result.words(), result.notes()]
        grid = Grid(
            f"{row.name}: {', '.join(labels)}",
            [Column("layer"), *(Column("all groups" if group is None else f"group {group}") for group in groups)],
            caption="; ".join(filter(None, words)),
        )
        for layer in layers:
            by_group = [[placed.get(((layer, group), label)) for label in labels] for group in groups]
            texts = [" / ".join(unit_of(cell.unit).write(cell.value) for cell in cells if cell) for cells in by_group]
            grid.rows.append([str(layer), *texts])
        grids.append(grid)
    return grids


def edge(value: float, axis: str) -> str:
    """An end of a range in words: shares of the input with one decimal, tokens whole."""
    return f"{value:.1f}" if axis == "depth" else f"{value:,.0f}"


def _tasks(comparison: Comparison) -> Grid:
    """Tasks, a row for every task and variant, and at the end their means and what each variant lost most."""
    grid = Grid(
        "lm-eval tasks and suites",
        [Column("task", "text"), Column("variant", "name"), Column("value"), Column("difference\nto dense")],
        caption="standard errors behind the plus-minus signs; differences are paired over the same items, * where "
        "one is more than 1.96 of its own standard errors",
    )
    variants = comparison.variants
    for task in comparison.tasks():
        about = [task.label, task.note]
        for number, variant in enumerate(variants):
            # With a single row both lines stand in one cell.
            head = "\n".join(about) if len(variants) == 1 else about[number] if number < 2 else ""
            cell = variant.like(task)
            gap = comparison.against_dense(variant, task)
            grid.rows.append(
                [head, variant.name, "" if cell is None else _value(cell), "" if gap is None else _gap(gap)]
            )
        grid.sections.add(len(grid.rows) - 1)
    if len(comparison.tasks()) > 1 and all(comparison.average(variant) for variant in variants[1:]):
        means = [
            mean_of([cell for task in comparison.tasks() if (cell := row.like(task)) is not None]) for row in variants
        ]
        for number, (variant, mean) in enumerate(zip(variants, means, strict=True)):
            gap = comparison.average(variant)
            grid.rows.append(
                ["" if number else "mean", variant.name, f"{mean.value:.4g}", "" if gap is None else _gap(gap)]
            )
        grid.sections.add(len(grid.rows) - 1)
    head = "lost most"
    for variant in variants[1:]:
        drop = comparison.worst_drop(variant)
        if drop is not None:
            grid.rows.append([head, variant.name, drop[0].label, f"{drop[1].difference:+.3f}"])
            head = ""
    return grid


def _value(cell: Cell) -> str:
    text = unit_of(cell.unit).write(cell.value)
    return text if cell.error is None else f"{text} ± {cell.error:.3f}"


def mean_of(cells: Sequence[Cell]) -> Cell:
    """The mean of several tasks, each weighing the same; they share no items, so their errors are independent."""
    count = len(cells)
    value = math.fsum(cell.value for cell in cells) / count
    error = 1.96 * math.hypot(*(cell.error or 0.0 for cell in cells)) / count
    label = cells[0].label if count == 1 else f"mean of {count} tasks"
    return replace(cells[0], label=label, value=value, interval=(value - error, value + error), items=None)


def _gap(gap: Paired) -> str:
    return f"{gap.difference:+.3f} ± {gap.error:.3f}{'*' if gap.significant else ''}"
