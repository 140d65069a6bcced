"""The page itself: facts of one or several folders through the template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from compress.report import sections
from compress.report.facts import Facts

TEMPLATE = Path(__file__).with_name("page.html.jinja")


def render(folders: Sequence[Facts], when: str, version: str) -> str:
    """One HTML document without outside resources and without JavaScript.

    Args:
        folders: in the order of the page; several are shown side by side first.
        when: the date that the page names.
    """
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["size"] = _size
    parts = [_part(facts) for facts in folders]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        parts=parts,
        charts=sections.drawn(sections.quality_against_bytes(folders)),
        work=sections.drawn(sections.quality_against_work(folders)),
        parameters=sections.drawn(sections.quality_against_parameters(folders)),
        engines=sections.ENGINES,
        when=when,
        version=version,
    )


def _part(facts: Facts) -> dict[str, Any]:
    comparison = facts.comparison
    return {
        "facts": facts,
        "headline": sections.headline(facts),
        "tables": [_table(table) for table in comparison.tables(depth=False)] if comparison is not None else [],
        "costs": sections.costs(facts),
        "map": sections.head_map(facts),
        "position": sections.perplexity_by_position(facts),
        "recall": sections.recall_maps(facts),
        "gaps": sections.gaps(facts),
        "speed": sections.speed(facts),
    }


def _table(table: Any) -> dict[str, Any]:
    """One rich table as heads and rows."""
    return {
        "title": str(table.title),
        "heads": [str(column.header).replace("\n", " ") for column in table.columns],
        "rows": list(zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True)),
        "caption": str(table.caption or ""),
    }


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
