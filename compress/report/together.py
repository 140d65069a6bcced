"""Several folders in one table: their evaluations side by side."""

from __future__ import annotations

from collections.abc import Sequence

from compress.evaluate.cell import Cell
from compress.evaluate.grid import Column, Grid
from compress.evaluate.tables import texts
from compress.report.facts import Facts


def side_by_side(folders: Sequence[Facts]) -> Grid | None:
    """A row for every variant of every folder, a column for every number of quality and cost.

    The dense model is shown once where its numbers are the same in all folders. None for fewer than two evaluations.
    """
    measured = [(facts.name, facts.comparison) for facts in folders if facts.comparison is not None]
    if len(measured) < 2:
        return None
    chosen: dict[object, Cell] = {}
    for _, comparison in measured:
        for row in comparison.variants:
            for cell in row.cells:
                if cell.part is None and cell.table is not None:
                    chosen.setdefault(cell.key, cell)
    columns = [Column("folder", "name"), Column("variant", "name")]
    columns += [
        Column(cell.name if cell.length is None else f"{cell.name}\nat {cell.length:,}") for cell in chosen.values()
    ]
    grid = Grid(f"{len(measured)} evaluations", columns)
    seen: set[tuple[str, ...]] = set()
    for name, comparison in measured:
        for row in comparison.variants:
            words = [" ".join(filter(None, texts(comparison, row, cell))) for cell in chosen.values()]
            shown = (row.name, *words)
            if row is comparison.dense and shown in seen:
                continue
            seen.add(shown)
            grid.rows.append([name, row.name, *words])
        grid.sections.add(len(grid.rows) - 1)
    return grid
