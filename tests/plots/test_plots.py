"""Plots: the numbers that they show, and the files with their labels where matplotlib is installed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from compress.cli.app import app
from compress.errors import UserError
from compress.plan import make_plan, read_plan
from compress.plots.chart import Chart, Series, chart_svg
from compress.plots.influence import draw_influence, influence_curves
from compress.plots.spans import draw_spans, span_map
from compress.profile.key import Key
from compress.profile.store import Profile
from compress.report.facts import read_facts
from compress.report.plots import evaluation_plots, plots_side_by_side, span_length
from compress.report.sections import quality_charts
from compress.targets.full import FullGroup
from compress.targets.linear import LinearGroup
from compress.targets.window import SpanGrid, WindowGroup
from tests.report.common import PLAN, make_folder
from tests.search.synthetic import make_shape

GRID = SpanGrid(sinks=(4, 64), betas=(0.0, 0.5, 1.0))


def sliding_plan() -> Any:
    """Three layers of two groups, the first slides over 100 tokens by itself."""
    window, grown = WindowGroup(sink=4, alpha=60, beta=0.0), WindowGroup(sink=0, alpha=64, beta=0.5)
    full = FullGroup()
    return make_plan(make_shape(3, 2, (100, None, None)), [[full, full], [full, window], [grown, full]])


def made_profile(grid: SpanGrid | None = GRID) -> Profile:
    """Influence of 3 layers and 2 groups: layer * 10 + group at the smallest window, halved with every step."""
    alphas = len(GRID.alphas(256))
    first = 10.0 * torch.arange(3)[:, None] + torch.arange(2)
    table = torch.zeros(3, 2, 2, 3, alphas)
    table[:, :, 0, 0] = first[:, :, None] * 0.5 ** torch.arange(alphas)
    table[:, :, 1:] = table[:, :, :, 1:] = 1e9
    header: Any = SimpleNamespace(
        lengths=(128, 256), grid=grid, model=SimpleNamespace(native_windows=(None, 100, None))
    )
    return Profile(Path("p"), header, {Key("influence", "absolute", 256): table})


def labels(svg: Path) -> str:
    """All text of a plot."""
    return " | ".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg.read_text(encoding="utf-8")))


def test_the_map_of_spans_counts_the_keys_that_are_seen() -> None:
    assert span_map(sliding_plan(), 256) == [[100, 100], [256, 64], [64 + 128, 256]]
    assert span_map(sliding_plan(), 80) == [[80, 80], [80, 64], [80, 80]]


def test_influence_curves_are_means_over_groups_of_fixed_windows() -> None:
    curves = influence_curves(made_profile())
    assert curves is not None
    assert (curves.length, curves.sink, curves.windows) == (256, 4, [64, 128, 192, 256])
    assert curves.losses == {0: [0.5, 0.25, 0.125, 0.0625], 2: [20.5, 10.25, 5.125, 2.5625]}


@pytest.mark.parametrize("grid", [None, SpanGrid(betas=(0.5, 1.0))])
def test_without_fixed_windows_there_are_no_curves(grid: SpanGrid | None) -> None:
    assert influence_curves(made_profile(grid)) is None
    assert influence_curves(made_profile(), kind="joint") is None


def test_charts_of_quality_have_every_variant_with_its_share_and_interval(tmp_path: Path) -> None:
    sections = {section.cost: section for section in quality_charts([read_facts(make_folder(tmp_path / "run"))])}
    assert list(sections) == ["prefill pairs", "KV bytes"]
    charts = {chart.y: chart for chart in sections["KV bytes"].charts}
    assert list(charts) == ["perplexity", "right answers", "score"]
    for chart in charts.values():
        assert [one.label for one in chart.series] == ["dense", "plan", "uniform"]
        assert [one.points[0][0] for one in chart.series] == pytest.approx([1, 0.42, 0.45], abs=1e-5)
    plan = charts["right answers"].series[1]
    assert plan.points[0][1] == 0.8 and plan.error is not None
    assert plan.error[0] == pytest.approx((0.490, 0.943), abs=1e-3)  # Wilson, 8 of 10
    assert charts["perplexity"].series[1].error is None


def test_the_spans_are_those_at_the_longest_length_of_the_budget(tmp_path: Path) -> None:
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "pareto.json").write_text(json.dumps({"limits": {"320": {}, "1024": {}, "512": {}}}))
    assert span_length(tmp_path) == 1024


def test_files_of_spans(tmp_path: Path) -> None:
    plans = {"one": sliding_plan(), "two": read_plan(PLAN)}
    svg, png = draw_spans(plans, 256, tmp_path / "a.b" / "spans")
    assert (svg.name, png.name) == ("spans.svg", "spans.png")
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 5_000
    text = labels(svg)
    assert all(word in text for word in ("one", "two", "layer", "head group", "tokens seen at 256", "slides by itself"))
    assert text.split(" | ").count("s") == 2  # both groups of the layer that slides
    before = svg.read_bytes()
    assert draw_spans(plans, 256, tmp_path / "a.b" / "spans")[0].read_bytes() == before
    text = labels(draw_spans({"two": plans["two"]}, 2048, tmp_path / "spans")[0])
    assert "slides" not in text and "+" not in text.split(" | ")
    linear = make_plan(plans["one"].model, [[FullGroup()] * 2, [LinearGroup(), FullGroup()], [LinearGroup()] * 2])
    text = labels(draw_spans({"linear": linear}, 256, tmp_path / "spans")[0])
    assert text.split(" | ").count("+") == 3 and "+: a state stands for the others" in text


def test_files_of_influence(tmp_path: Path) -> None:
    curves = influence_curves(made_profile())
    assert curves is not None
    svg, png = draw_influence(curves, tmp_path / "influence")
    assert png.read_bytes().startswith(b"\x89PNG")
    text = labels(svg)
    assert "layer 0" in text and "layer 2" in text and "layer 1" not in text
    assert "influence lost at 256 tokens, sink 4" in text and "window, tokens" in text
    assert {"64", "128", "256"} <= set(text.split(" | "))


def test_files_of_quality(tmp_path: Path) -> None:
    svg, png = evaluation_plots(make_folder(tmp_path / "run"))
    assert svg == tmp_path / "run" / "plots" / "quality.svg" and png.stat().st_size > 5_000
    text = labels(svg)
    for word in (
        "perplexity at 2,048 tokens",
        "passkey at 2,048 tokens",
        "mqar at 2,048 tokens",
        "share of the dense KV bytes",
    ):
        assert word in text
    assert all(text.split(" | ").count(name) == 3 for name in ("dense", "plan", "uniform"))


def test_several_folders_side_by_side(tmp_path: Path) -> None:
    first, second = make_folder(tmp_path / "a-run"), make_folder(tmp_path / "other" / "a-run")
    third = tmp_path / "c-run"
    shutil.copytree(first, third)
    (third / "plan.json").unlink()
    out = tmp_path / "both"
    page = str(tmp_path / "page.html")
    result = CliRunner().invoke(app, ["report", *map(str, (first, second, third)), "--out", page, "--plots", str(out)])
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == [
        page,
        *(str(out / f"{name}.{kind}") for name in ("spans", "quality") for kind in ("svg", "png")),
    ]
    assert str(first) in labels(out / "spans.svg") and "c-run" not in labels(out / "spans.svg")
    assert "c-run: plan" in labels(out / "quality.svg")


def test_charts_in_a_page_bring_nothing_with_them_and_are_the_same_every_time() -> None:
    chart = Chart("a & b", "tokens", "times", [Series("one", [(1024, 1), (4096, 3)], [(0.5, 1.5), (2, 4)])], True)
    first, other = chart_svg(chart, "a"), chart_svg(chart, "b")
    assert first.startswith("<svg viewBox") and chart_svg(chart, "a") == first
    assert "http" not in first and "url(" not in first and "metadata" not in first and "#0b5cad" not in first
    assert ">1k<" in first and ">4k<" in first and "<title>a &amp; b</title>" in first and "var(--c0)" in first
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (first, other)]
    assert ids[0] and not ids[0] & ids[1] and set(re.findall(r'href="#([^"]+)"', first)) <= ids[0]
    assert chart_svg(Chart("none", "x", "y", [Series("one", [(1.0, float("inf"))])]), "c") == ""


def test_folders_with_nothing_to_draw_are_an_error(tmp_path: Path) -> None:
    run = make_folder(tmp_path / "run")
    (run / "plan.json").unlink()
    (run / "evaluation.json").unlink()
    with pytest.raises(UserError, match="neither a plan nor an evaluation"):
        plots_side_by_side([read_facts(run)], tmp_path)
