"""The page: all parts from real artifacts, nothing from outside, and what a browser makes of it."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from compress.cli.app import app
from compress.errors import UserError
from compress.profile.key import Key
from compress.report.facts import RetentionCurves, read_facts, retention_curves
from compress.report.page import render
from compress.report.sections import costs, head_map
from tests.report.common import PLAN, make_folder

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with a plan, an evaluation and a bench."""
    return make_folder(tmp_path / "a-run")


def test_every_part_is_there_and_nothing_from_outside(folder: Path) -> None:
    page = render([read_facts(folder)], "2026-01-02", "0")
    for part in (
        "42.0%",
        "passkey by length and depth",
        "Head map",
        "prefill sparsity",
        "By the gap to the evidence",
        "Speed and memory",
        "1,024 tokens",
        "Known limits",
        "worst of 1 tasks",
        "Recipe",
    ):
        assert part in page, part
    assert "<script" not in page and "http" not in page and "url(" not in page and "<link" not in page
    assert "&lt;b&gt;model&lt;/b&gt;" in page and "&lt;script&gt;" in page
    assert page.count('tabindex="0"') == 90  # one for each head group
    assert len(page.encode()) < 2**21
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)


def test_every_head_group_has_its_retention_curve(folder: Path) -> None:
    assert "Retention curves" not in render([read_facts(folder)], "2026-01-02", "0")
    needed = [[[0.1 * (1 + group), 0.5] for group in range(3)] if layer else [[0.0, 0.0]] * 3 for layer in range(30)]
    facts = replace(read_facts(folder), retention=RetentionCurves(512, (0.9, 0.99), needed))
    page = render([facts], "2026-01-02", "0")
    assert page.count("<polyline") == 29 * 3 and page.count('tabindex="0"') == 90 + 29 * 3
    assert 'points="0.0,24.0 2.4,2.4 12.0,0.2 24.0,0.0"' in page
    assert "layer 1, group 2; 90% of the scores in 30.0% of the keys; 99% of the scores in 50.0% of the keys" in page
    assert "90% of the scores of KVzip+ are in 10.0% to 30.0% of the keys of a head group, in 20.0% of those" in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)


def test_retention_curves_are_those_of_the_longest_documents() -> None:
    needed = torch.tensor([[[0.5, 0.1]]])
    entry = SimpleNamespace(parameters={"shares": [0.99, 0.9]})
    tensors = {Key("reconstruction", "moved", 512): needed, Key("reconstruction", "moved", 256): needed / 2}
    header = SimpleNamespace(statistics={"reconstruction": entry})
    profile: Any = SimpleNamespace(header=header, lengths=(256, 512), find=tensors.get)
    found = retention_curves(profile)
    assert found is not None and (found.length, found.shares) == (512, (0.9, 0.99))
    assert found.needed == [[[pytest.approx(0.1), 0.5]]]
    header.statistics = {}
    assert retention_curves(profile) is None


def test_folders_side_by_side(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "b-run"
    shutil.copytree(folder, other)
    result = CliRunner().invoke(app, ["report", str(folder), str(other), "--out", str(tmp_path / "both.html")])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert "2 folders side by side" in page and "b-run: plan" in page and "2 evaluations" in page
    assert page.count("<h3>Head map</h3>") == 2


def test_every_number_of_every_folder_as_a_file(folder: Path, tmp_path: Path) -> None:
    for kind in ("csv", "json"):
        options = ["--out", tmp_path / "page.html", "--cells", tmp_path / f"cells.{kind}"]
        result = CliRunner().invoke(app, ["report", str(folder), *map(str, options)])
        assert result.exit_code == 0, result.output
    records = json.loads((tmp_path / "cells.json").read_text())
    row = next(row for row in records if row["variant"] == "plan" and row["label"] == "passkey" and not row["part"])
    assert (row["folder"], row["length"], row["value"], row["count"]) == ("a-run", 2048, 0.8, 10)
    assert row["difference"] == pytest.approx(-0.1) and row["better"] == "higher"
    with (tmp_path / "cells.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(records) and rows[0].keys() == records[0].keys()


def test_only_a_bench_or_only_a_plan(folder: Path) -> None:
    (folder / "evaluation.json").unlink()
    assert "Speed and memory" in render([read_facts(folder)], "2026-01-02", "0")
    (folder / "bench.json").unlink()
    assert "by the plan" in render([read_facts(folder)], "2026-01-02", "0")


def test_the_head_map_tells_targets_apart_that_begin_alike(tmp_path: Path) -> None:
    raw = json.loads(PLAN.read_text())
    del raw["checksum"]
    retains = {"target": "retain", "scorer": "value_norm", "threshold": 0.0, "share": 0.5}
    routed = {"target": "routed", "active": 1, "of": 3}
    for number, layer in enumerate(raw["layers"]):
        layer["groups"] = [routed] * 3 if number else [{"target": "full"}, retains, {"target": "linear"}]
    (tmp_path / "plan.json").write_text(json.dumps(raw))
    found = head_map(read_facts(tmp_path))
    assert found is not None
    assert [cell["mark"] for cell in found["layers"][0]] == ["f", "re", "l"] and found["layers"][1][0]["mark"] == "ro"
    page = render([read_facts(tmp_path)], "2026-01-02", "0")
    assert page.count(">ro<span") == 3 * (len(raw["layers"]) - 1) and page.count(">re<span") == 1


def test_a_rule_by_length_is_told_and_costs_its_window(tmp_path: Path) -> None:
    raw = json.loads(PLAN.read_text())
    del raw["checksum"]
    for layer in raw["layers"]:
        layer["groups"] = [{"target": "window", "sink": 0, "alpha": 0, "beta": 0.5, "rule": "length"}] * 3
    (tmp_path / "plan.json").write_text(json.dumps(raw))
    facts = read_facts(tmp_path)
    assert next(row for row in costs(facts) if row["length"] == 8192)["share"] == 0.5
    found = head_map(facts)
    assert found is not None
    told = found["layers"][0][0]["words"]
    assert told[0].endswith("sink 0, window 0 + 0.5 of the length") and told[1] == "keeps 50% at 8,192 tokens"
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "plan.json")])
    assert "0|0+0.5N" in shown.stdout and "0|0+0.5t" not in shown.stdout


def test_wrong_folders_say_what_to_do(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_facts(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="compress run"):
        read_facts(tmp_path / "empty")
    (folder / "bench.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="damaged"):
        read_facts(folder)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_it(folder: Path, tmp_path: Path) -> None:
    """Light and dark differ, and it prints."""
    page = tmp_path / "report.html"
    page.write_text(render([read_facts(folder)], "2026-01-02", "0"), encoding="utf-8")
    assert "Head map" in browse(page, tmp_path, "--dump-dom")
    light, dark, paper = tmp_path / "light.png", tmp_path / "dark.png", tmp_path / "page.pdf"
    browse(page, tmp_path, f"--screenshot={light}", "--window-size=1200,2000")
    browse(page, tmp_path, f"--screenshot={dark}", "--window-size=1200,2000", "--force-dark-mode")
    browse(page, tmp_path, f"--print-to-pdf={paper}", "--no-pdf-header-footer")
    assert light.stat().st_size > 20_000 and dark.read_bytes() != light.read_bytes()
    assert paper.read_bytes().startswith(b"%PDF")


PROBE = """<script>
const cell = document.querySelector(".map td"), tip = cell.querySelector(".tip");
const before = getComputedStyle(tip).display;
cell.focus();
// A headless page is not always the focused one, so the rule for focus is read instead of its effect.
const rule = [...document.styleSheets[0].cssRules].find(one => (one.selectorText || "").includes("td:focus .tip"));
const found = [before, rule.style.display, document.activeElement === cell,
  [...document.querySelectorAll("a, summary")].every(one => one.tabIndex === 0),
  document.documentElement.scrollWidth <= window.innerWidth];
document.title = JSON.stringify(found);
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_keyboard_reaches_it_and_a_narrow_window_holds_it(folder: Path, tmp_path: Path) -> None:
    """A focused cell shows its figures, links and summaries can be tabbed to, and only tables scroll sideways."""
    page = tmp_path / "report.html"
    text = render([read_facts(folder)], "2026-01-02", "0")
    page.write_text(text.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    shown = browse(page, tmp_path, "--dump-dom", "--window-size=500,900")
    title = re.search(r"<title>(\[.*?\])</title>", shown)
    assert title is not None and json.loads(title.group(1)) == ["none", "block", True, True, True]


def browse(page: Path, folder: Path, *options: str) -> str:
    """One call of headless Chromium; what it prints."""
    assert CHROMIUM is not None
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    own = ["--disable-component-update", "--disable-sync", f"--user-data-dir={folder / 'browser'}"]
    call = [CHROMIUM, *quiet.split(), *own, *options, page.as_uri()]
    return subprocess.run(call, capture_output=True, text=True, timeout=120, check=True).stdout
