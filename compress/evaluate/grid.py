"""A table as data: terminals, web pages and model cards each render it in their own way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        head: lines of the head.
        kind: `figure` is justified to the right and never cut, `name` may lose its middle, `text` is wrapped.
    """

    head: str
    kind: Literal["figure", "name", "text"] = "figure"


@dataclass
class Grid:
    """Rows of text under heads.

    Attributes:
        sections: numbers of rows behind which a line is drawn.
    """

    title: str
    columns: Sequence[Column]
    rows: list[list[str]] = field(default_factory=list)
    caption: str = ""
    sections: set[int] = field(default_factory=set)

    @property
    def heads(self) -> list[str]:
        """The heads, each on one line."""
        return [column.head.replace("\n", " ") for column in self.columns]

    def markdown(self) -> str:
        """Title, table and caption in Markdown; a bar in a cell does not end it."""
        lines = [self.title, "", _line(self.heads), f"|{' --- |' * len(self.columns)}"]
        lines += [_line(row) for row in self.rows]
        return "\n".join([*lines, *(["", self.caption] if self.caption else [])])


def _line(cells: Sequence[str]) -> str:
    texts = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(texts)} |"
