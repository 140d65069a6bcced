"""The plots of a run folder, and of several side by side, drawn from the files that the stages left there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from compress.bench.file import Tokens
from compress.errors import UserError
from compress.json_file import read_model
from compress.plan import Plan, read_plan
from compress.plots.chart import Chart, draw_charts
from compress.plots.heads import draw_heads
from compress.plots.influence import draw_influence, influence_curves
from compress.plots.spans import draw_spans
from compress.profile.store import read_profile
from compress.report.facts import Facts, read_facts
from compress.report.sections import layer_charts, maps_of_heads, quality_charts
from compress.runfolder import RunFolder


class _Limit(BaseModel):
    """One constraint of the budget."""

    model_config = ConfigDict(extra="ignore")

    length: Tokens | None


class _Report(BaseModel):
    """What plots read of `search/pareto.json`."""

    model_config = ConfigDict(extra="ignore")

    limits: dict[Tokens, Any] | list[_Limit] = Field(min_length=1)


def search_plots(folder: Path) -> list[Path]:
    """`plots/influence`, where the profile has fixed windows, and `plots/spans`; the files. None of a pruned plan.

    Written in this order: where `spans.svg` is, all are.
    """
    run = RunFolder(folder)
    plan = read_plan(run.plan)
    if plan.prunes:
        return []
    curves = influence_curves(read_profile(run.profile))
    written = [] if curves is None else draw_influence(curves, run.plots / "influence")
    return written + draw_spans({"plan": plan}, span_length(folder), run.plots / "spans")


def evaluation_plots(folder: Path) -> list[Path]:
    """`plots/layers` and `plots/heads`, where something was measured layer by layer or head by head, and
    `plots/quality`; the files.

    Written in this order: where `quality.svg` is, all are.
    """
    facts, plots = read_facts(folder), RunFolder(folder).plots
    written = draw_charts(layer_charts(facts.comparison), plots / "layers")
    written += draw_heads(maps_of_heads(facts.comparison), plots / "heads")
    return written + draw_charts(_all_charts([facts]), plots / "quality")


def plots_side_by_side(folders: Sequence[Facts], out: Path) -> list[Path]:
    """`spans` of all plans and `quality` of all evaluations of several folders, into one folder; the files.

    Raises:
        UserError: the folders hold neither plans nor evaluations.
    """
    names = [facts.name for facts in folders]
    plans = {
        facts.name if names.count(facts.name) == 1 else str(facts.path): facts.plan
        for facts in folders
        if facts.plan is not None and not facts.plan.prunes
    }
    written = []
    if plans:
        written += draw_spans(plans, max(_longest(plan) for plan in plans.values()), out / "spans")
    written += draw_charts(_all_charts(folders), out / "quality")
    if not written:
        where = ", ".join(str(facts.path) for facts in folders)
        raise UserError("there is neither a plan nor an evaluation to draw", where=where)
    return written


def _all_charts(folders: Sequence[Facts]) -> list[Chart]:
    return [chart for section in quality_charts(folders, tabled=True) for chart in section.charts]


def span_length(folder: Path) -> int:
    """The longest length of the budget, in tokens; where it has none, that at which the plan's cost was predicted."""
    path = folder / "search" / "pareto.json"
    limits = read_model(_Report, path, "the report of the search", fix="compress search RECIPE").limits
    lengths = list(limits) if isinstance(limits, dict) else [row.length for row in limits if row.length is not None]
    return max(lengths) if lengths else _longest(read_plan(RunFolder(folder).plan))


def _longest(plan: Plan) -> int:
    """The longest length that the plan's predictions are for; 8192 for one written by hand."""
    return max(plan.predicted.lengths, default=8192)
