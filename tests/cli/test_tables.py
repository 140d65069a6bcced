"""Tables at every width: no figure loses a digit, names lose their end, and columns that do not fit move below."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from compress.cli import doctor, validate
from compress.cli.app import app
from compress.cli.tables import fitted, rich_table, show
from compress.evaluate.comparison import read_comparison
from compress.evaluate.tables import tables

WIDTHS = [40, 60, 80, None]


def printed(table: Table, width: int | None) -> str:
    """What is printed on a terminal of a width; None stands for a pipe."""
    stream = io.StringIO()
    console = Console(file=stream, width=width or 80, force_terminal=width is not None, color_system=None)
    show(table, console)
    return stream.getvalue()


def test_a_caption_wider_than_its_table_is_a_line_by_itself() -> None:
    table = Table(title="short", caption="a caption that is far wider than the table above it")
    table.add_column("n", justify="right")
    table.add_row("12345")
    lines = printed(table, None).rstrip().splitlines()
    assert lines[-1].strip() == table.caption and lines[0].strip() == "short"
    assert [line.strip() for line in printed(table, 40).rstrip().splitlines()[-2:]] == [
        "a caption that is far wider than the",
        "table above it",
    ]


def wide_table(name: str = "a-model-with-a-long-name-0.5B-instruct") -> Table:
    table = Table(title="a title", caption="a caption")
    table.add_column("variant", no_wrap=True)
    for number in range(6):
        table.add_column(f"parameters\nat {number + 1:,}024", justify="right")
    table.add_row(name, *(f"{111_980_736 + number:,} (100.00%)" for number in range(6)))
    table.add_row("plan", *(f"{98_765_432 + number:,} (87.32%)" for number in range(6)))
    return table


def figures(table: Table) -> list[str]:
    """Every word with a digit in the columns that hold figures, and in the text, but not in names."""
    columns = [column for column in table.columns if column.justify == "right" or not column.no_wrap]
    cells = [str(cell) for column in columns for cell in (column.header, *column.cells)]
    return [word for cell in cells for word in cell.split() if re.search(r"\d", word)]


@pytest.mark.parametrize("width", WIDTHS)
def test_figures_are_whole_and_lines_fit(width: int | None) -> None:
    table = wide_table()
    text = printed(table, width)
    assert all(word in text for word in figures(table)), text
    lines = text.splitlines()
    if width is not None:
        assert max(map(cell_len, lines)) <= width
        assert re.search(r"a-m\S*…\S*ruct", text)
    else:
        assert "a-model-with-a-long-name-0.5B-instruct" in text and "…" not in text
        assert len([line for line in lines if "111,980,73" in line]) == 1
    assert text.count("a title") == 1 and text.count("a caption") == 1


def test_every_part_has_the_names_and_all_columns_come_once() -> None:
    table = wide_table()
    parts = fitted(table, 40)
    assert len(parts) == 6
    assert all(str(part.columns[0].header) == "variant" and len(part.rows) == 2 for part in parts)
    heads = [str(column.header) for part in parts for column in part.columns[1:]]
    assert heads == [str(column.header) for column in table.columns[1:]]


def test_names_keep_both_ends() -> None:
    table = wide_table("/data/somebody/models/instruct-a")
    table.add_row("/data/somebody/models/instruct-b", *("1" for _ in range(6)))
    names = [str(cell) for cell in fitted(table, 40)[0].columns[0].cells]
    assert names[0].endswith("-a") and names[2].endswith("-b") and all(cell_len(name) <= 14 for name in names)


def test_what_fits_is_one_table() -> None:
    table = Table()
    table.add_column("variant", no_wrap=True)
    table.add_column("value", justify="right")
    table.add_row("plan", "1")
    assert len(fitted(table, 40)) == 1


def test_a_figure_wider_than_the_terminal_makes_a_wider_line() -> None:
    table = Table()
    table.add_column("name", no_wrap=True)
    table.add_column("value", justify="right")
    table.add_row("x", "9" * 70)
    assert "9" * 70 in printed(table, 40)


def test_names_in_brackets_are_no_markup() -> None:
    table = Table()
    table.add_column("name", no_wrap=True)
    table.add_column("value", justify="right")
    table.add_row("[red]model[/x]", "1")
    stream = io.StringIO()
    show(table, Console(file=stream, markup=False))
    assert "[red]model[/x]" in stream.getvalue()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_tables_of_an_evaluation(finished: Path, width: int | None) -> None:
    for grid in tables(read_comparison(finished.parent / "run" / "evaluation.json")):
        table = rich_table(grid)
        text = printed(table, width)
        assert all(word in text for word in figures(table)), text
        if width is not None:
            assert max(map(cell_len, text.splitlines())) <= width, text


@pytest.mark.parametrize("width", WIDTHS)
def test_every_command_prints_by_the_same_rule(
    finished: Path, width: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `inspect`, `validate` and `doctor` print; the tables are those that they make."""
    seen: list[Table] = []
    monkeypatch.setattr("compress.cli.tables.show", lambda table, console=None: seen.append(table))
    for words in (["inspect", str(finished.parent / "run")], ["inspect", str(finished.parent / "run" / "profile")]):
        assert CliRunner().invoke(app, words).exit_code == 0
    for command in (["validate", str(finished)], ["doctor"]):
        assert CliRunner().invoke(app, command).exit_code == 0
    assert len(seen) == 5
    for table in seen:
        text = printed(table, width)
        assert all(word in text for word in figures(table)), text


def test_the_commands_know_no_other_way_to_print_a_table() -> None:
    """A table that is printed directly is cut by rich to the width of the terminal."""
    folder = Path(validate.__file__).parent
    assert doctor.__file__ is not None
    for path in folder.glob("*.py"):
        if path.name != "tables.py":
            assert not re.search(r"Console\([^)]*\)\.print|console\.print", path.read_text()), path
