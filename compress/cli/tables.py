"""Tables on a terminal of any width and in a pipe: figures are never cut; names are, and columns move below.

A column that is justified to the right holds figures. One with `no_wrap` holds names, which may lose their end. Any
other holds text, which is wrapped between words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text, TextType

from compress.evaluate.grid import Grid

LEAST_NAME = 8
LEAST_TEXT = 12


@dataclass(frozen=True)
class _Width:
    """Characters that a column can do with, and those that it would take."""

    least: int
    natural: int


def rich_table(grid: Grid) -> Table:
    """A table of data for a terminal."""
    table = Table(title=grid.title, caption=grid.caption or None, pad_edge=False)
    for column in grid.columns:
        figure = column.kind == "figure"
        table.add_column(column.head, justify="right" if figure else "left", no_wrap=column.kind == "name")
    for number, row in enumerate(grid.rows):
        table.add_row(*row, end_section=number in grid.sections)
    return table


def show(table: Table | Grid, console: Console | None = None) -> None:
    """Print a table: as wide as it is into a pipe, in parts below each other where a terminal is too narrow.

    Args:
        console: where to; stdout by default.
    """
    table = rich_table(table) if isinstance(table, Grid) else table
    console = console or Console(markup=False, emoji=False)  # names in a file are no markup
    given = console.width
    limit = given if console.is_terminal else None
    for part in fitted(table, limit):
        # A word or figure that is wider than the terminal makes a line that is, rather than losing its end.
        needed = sum(column.width or 0 for column in part.columns) + _frame(part, len(part.columns))
        console.width = max(given, needed)
        above, below = (_beside(text, needed) for text in (part.title, part.caption))
        part.title, part.caption = (None if above else part.title), (None if below else part.caption)
        if above:
            console.print(above, soft_wrap=limit is None)
        console.print(part)
        if below:
            console.print(below, soft_wrap=limit is None)
    console.width = given


def _beside(text: TextType | None, width: int) -> Text | None:
    """A title or caption wider than its table, to be printed by itself: as wide as the table it would be a pile."""
    return Text(str(text), style="italic") if text and cell_len(str(text)) > width else None


def fitted(table: Table, limit: int | None) -> list[Table]:
    """The table in parts that are at most `limit` characters wide, if any name, figure and word fits at all.

    The leading columns that hold no figures are there in every part. Without a limit there is one part.
    """
    columns = table.columns
    widths = [_width(column) for column in columns]
    lead = next((number for number, column in enumerate(columns) if column.justify == "right"), 1)
    lead = min(lead, 2, len(columns) - 1)
    if limit is None:
        return [_part(table, list(range(len(columns))), [width.natural for width in widths], True, True)]
    groups: list[list[int]] = [[]]
    for number in range(lead, len(columns)):
        tried = [*range(lead), *groups[-1], number]
        if groups[-1] and sum(widths[i].least for i in tried) + _frame(table, len(tried)) > limit:
            groups.append([])
        groups[-1].append(number)
    parts = []
    for place, group in enumerate(groups):
        chosen = [*range(lead), *group]
        spare = limit - _frame(table, len(chosen)) - sum(widths[i].least for i in chosen)
        taken = {i: widths[i].least for i in chosen}
        for i in sorted(chosen, key=lambda number: not columns[number].no_wrap):  # text can be wrapped, names cannot
            more = max(0, min(spare, widths[i].natural - widths[i].least))
            spare -= more
            taken[i] += more
        parts.append(_part(table, chosen, [taken[i] for i in chosen], place == 0, place == len(groups) - 1))
    return parts


def _width(column: Column) -> _Width:
    cells = [line for cell in column.cells for line in str(cell).split("\n")]
    heads = str(column.header).split("\n")
    natural = max(map(cell_len, [*cells, *heads]), default=0)
    words = [word for line in heads for word in line.split()]
    if column.justify == "right":
        return _Width(max(map(cell_len, [*cells, *words]), default=0), natural)
    if column.no_wrap:
        return _Width(min(natural, max([LEAST_NAME, *map(cell_len, words)])), natural)
    figures = [word for line in cells for word in line.split() if re.search(r"\d", word)]
    return _Width(min(natural, max([LEAST_TEXT, *map(cell_len, figures)])), natural)


def _frame(table: Table, count: int) -> int:
    """Characters of lines and padding around so many columns."""
    _, right, _, left = table.padding
    lines = count + 1 if table.box is not None else 0
    return lines + count * (left + right) - (0 if table.pad_edge else left + right)


def _part(table: Table, chosen: list[int], widths: list[int], first: bool, last: bool) -> Table:
    """Some columns of a table in given widths; the title is on the first part, the caption on the last."""
    part = Table(
        title=table.title if first else None,
        caption=table.caption if last else None,
        box=table.box,
        pad_edge=table.pad_edge,
        padding=table.padding,
        collapse_padding=table.collapse_padding,
        show_edge=table.show_edge,
    )
    for number, width in zip(chosen, widths, strict=True):
        column = table.columns[number]
        part.add_column(
            column.header,
            justify=column.justify,
            no_wrap=column.no_wrap,
            overflow="fold",
            width=width,
        )
    cells = [
        [_cut(str(cell), width) if table.columns[number].no_wrap else cell for cell in table.columns[number].cells]
        for number, width in zip(chosen, widths, strict=True)
    ]
    for row, values in zip(table.rows, zip(*cells, strict=True), strict=True):
        part.add_row(*values, end_section=row.end_section)
    return part


def _cut(name: str, width: int) -> str:
    """A name in so many characters: both of its ends, which tell it from others, around an ellipsis."""
    if cell_len(name) <= width:
        return name
    first = set_cell_size(name, (width - 1) // 2)
    last = name
    while cell_len(last) > width - 1 - (width - 1) // 2:
        last = last[1:]
    return f"{first}…{last}"
