"""The page itself: facts of one or several folders through the template."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from compress.bench.report import gain_words
from compress.evaluate.tables import tables
from compress.plots.chart import chart_svg
from compress.report import sections
from compress.report.facts import Facts
from compress.report.together import side_by_side

TEMPLATE = Path(__file__).with_name("page.html.jinja")


def render(folders: Sequence[Facts], when: str, version: str) -> str:
    """One HTML document without outside resources and without JavaScript.

    Args:
        folders: in the order of the page; several are shown side by side first.
        when: the date that the page names.
    """
    parts = [_part(facts, f"p{number}") for number, facts in enumerate(folders)]
    quality = [
        {"cost": section.cost, "charts": section.svgs(f"q{number}")}
        for number, section in enumerate(sections.quality_charts(folders))
    ]
    return _template().render(
        parts=parts,
        quality=quality,
        side_by_side=side_by_side(folders),
        engines=sections.engines(folders),
        when=when,
        version=version,
    )


@cache
def _template() -> jinja2.Template:
    """Compiled once, which takes longer than to render it."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["size"] = _size
    environment.filters["gain"] = gain_words
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _part(facts: Facts, name: str) -> dict[str, Any]:
    """What the template shows of one folder; `name` begins the ids of its charts' parts."""
    comparison = facts.comparison
    return {
        "id": name,
        "facts": facts,
        "headline": sections.headline(facts),
        "tables": tables(comparison, parts=False) if comparison is not None else [],
        "costs": sections.costs(facts),
        "states": sections.states(facts),
        "choosing": sections.choosing(facts),
        "layers": [
            chart_svg(chart, f"{name}layers{number}") for number, chart in enumerate(sections.layer_charts(comparison))
        ],
        "map": sections.head_map(facts),
        "retention": sections.retention(facts),
        "heads": [sections.shaded(each) for each in sections.maps_of_heads(comparison)],
        "position": sections.by_position(facts, f"{name}position"),
        "recall": sections.by_depth(facts),
        "gaps": sections.by_gap(facts),
        "speed": sections.speed(facts, f"{name}speed"),
    }


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
