"""The parts of a report, each a function from facts to what the template shows; a part without figures is left out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from compress.bench.file import SideFigures
from compress.bench.report import routed_line
from compress.evaluate.cell import Cell
from compress.evaluate.comparison import Comparison, VariantResult
from compress.evaluate.measures.size import OF_LAYERS
from compress.evaluate.tables import edge, mean_of, parts_of
from compress.evaluate.units import unit_of
from compress.limits import SHOWN_LENGTHS
from compress.plan import Plan, added, removal
from compress.plan.skipped import STORED, Skipped, chooses, skipped
from compress.plan.states import states_of
from compress.plots.chart import Chart, Series, chart_svg
from compress.plots.heads import HeadMap
from compress.plots.speed import speed_charts
from compress.report.facts import Facts
from compress.targets.full import FullGroup

MAP_LENGTH = 8192  # tokens that the head map, and the headline of a plan alone, are about


def headline(facts: Facts) -> dict[str, Any]:
    """The shares that the page opens with, and their conditions.

    Returns:
        `shares`: pairs of a share and what it is of, the most telling first; `lines`: sentences of quality and time.
    """
    comparison, chosen = facts.comparison, facts.chosen
    head: dict[str, Any] = {"name": facts.name, "model": None, "shares": _shares(facts), "lines": []}
    if comparison is not None:
        head["model"] = comparison.model
        head["conditions"] = f"{comparison.dtype} on {comparison.device}, seed {comparison.seed}"
    head["lines"] += added(facts.plan) if facts.plan is not None else []
    left = removal(facts.plan) if facts.plan is not None else None
    head["lines"] += [left] if left is not None else []
    if comparison is not None and chosen is not None:
        head["lines"] += [line for cell in chosen.cells if (line := _line(comparison, chosen, cell))]
        drop = comparison.worst_drop(chosen)
        if drop is not None:
            cell, gap = drop
            tasks = len(comparison.tasks())
            head["lines"].append(f"worst of {tasks} tasks: {cell.label} {gap.difference:+.3f} ± {gap.error:.3f}")
    return head


def _shares(facts: Facts) -> list[tuple[float, str]]:
    """What is left in every kind of the budget, by the plan, and of the cache at the longest measured length."""
    plan = facts.plan
    amounts = [] if plan is None else [amount for amount in plan.predicted.longest if amount.kind != "kv"]
    shares = [(amount.fraction, f"of {amount.of}{amount.at}") for amount in amounts]
    held = [cell for cell in facts.chosen.cells if cell.label == "KV bytes"] if facts.chosen is not None else []
    if held and facts.comparison is not None:
        cell = max(held, key=lambda cell: cell.length or 0)
        share_of_cache = cell.fraction(facts.comparison.dense.like(cell))
        if share_of_cache is not None:
            shares.append((share_of_cache, f"of the dense KV cache at {cell.length:,} tokens, as allocated"))
    elif plan is not None:
        share_of_cache = plan.cost(MAP_LENGTH, form=facts.form).held_bytes / plan.dense_cost(MAP_LENGTH).held_bytes
        shares.append((share_of_cache, f"of the dense KV cache at {MAP_LENGTH:,} tokens, by the plan"))
    return [pair for pair in shares if pair[0] != 1.0 or len(shares) == 1]


def _line(comparison: Comparison, chosen: VariantResult, cell: Cell) -> str:
    """A number in words: quality beside all other variants, a measured time as a share of the dense model's."""
    if cell.part is not None or cell.table not in ("summary", "cost"):
        return ""
    unit, fraction = unit_of(cell.unit), cell.fraction(comparison.dense.like(cell))
    if cell.table == "cost":
        return f"{cell.title}: {fraction:.3f} of dense" if cell.dense is not None and fraction is not None else ""
    if cell.axis:
        return ""
    change = f" ({unit.change(fraction)})" if unit.change is not None and fraction is not None else ""
    others = [
        f"{row.name} {unit.write(other.value)}"
        for row in comparison.variants
        if row is not chosen and (other := row.like(cell)) is not None
    ]
    parts = [f"{cell.title}: {unit.write(cell.value)}{change}", ", ".join(others), cell.note]
    return "; ".join(part for part in parts if part)


def states(facts: Facts) -> str | None:
    """What the plan's states take, in a sentence; None where it has none."""
    held = None if facts.plan is None else states_of(facts.plan, form=facts.form)
    return None if held is None else held.words


def choosing(facts: Facts) -> dict[str, Any] | None:
    """What the plan skips by letting tokens choose their heads, by length and by layer; None where they choose none."""
    plan = facts.plan
    if plan is None or not chooses(plan):
        return None
    sizes = [cell for cell in facts.chosen.cells if cell.label == OF_LAYERS] if facts.chosen is not None else []
    weights = int(sizes[0].value) if sizes else 0
    by_length = [Skipped.total(skipped(plan, length, form=facts.form), weights) for length in SHOWN_LENGTHS]
    layers = [
        {
            "layer": number,
            "what": ", ".join(dict.fromkeys(group.short(native) for group, native in row)),
            "skips": skips,
        }
        for number, (row, skips) in enumerate(
            zip(plan.groups_that_stay(), skipped(plan, MAP_LENGTH, form=facts.form), strict=True)
        )
    ]
    words = [skips.words() for skips in by_length if skips.length in (SHOWN_LENGTHS[0], SHOWN_LENGTHS[-1])]
    return {"words": [STORED, *words], "lengths": by_length, "layers": layers, "length": MAP_LENGTH}


def costs(facts: Facts) -> list[dict[str, Any]]:
    """Bytes and sparsity of the plan by length, prefill and decode apart; heads that are removed compute no pair.

    Sparsity is that of Sparse Frontier (arXiv 2504.17768), counted token by token where the paper counts whole blocks.
    """
    plan = facts.plan
    if plan is None:
        return []
    rows = []
    for length in SHOWN_LENGTHS:
        used, dense = plan.cost(length, form=facts.form), plan.dense_cost(length)
        rows.append(
            {
                "length": length,
                "used": used.held_bytes,
                "dense": dense.held_bytes,
                "share": used.held_bytes / dense.held_bytes,
                "spread": used.spread_bytes / dense.held_bytes if plan.in_expectation else None,
                "most": used.most_bytes / dense.held_bytes if plan.in_expectation else None,
                "prefill_sparsity": 1 - _prefill_share(plan, length),
                "decode_sparsity": 1 - _decode_share(plan, length),
            }
        )
    return rows


def _prefill_share(plan: Plan, length: int) -> float:
    """Pairs of query and key that a prefill computes, over all causal pairs of the dense model's query heads."""
    causal = plan.model.layers * plan.model.query_heads * length * (length + 1) // 2
    return plan.cost(length).flops / (4 * plan.model.head_dim * causal)


def _decode_share(plan: Plan, length: int) -> float:
    """Pairs that the query at the end of `length` tokens computes, over all keys of the dense model's query heads."""
    seen = 0
    for number, layer in enumerate(plan.layers):
        unit = plan.unit(number, 2, "patched")
        seen += unit.query_heads * sum(group.cost(unit, length).keys for group in layer.groups)
    return seen / (plan.model.layers * plan.model.query_heads * length)


def head_map(facts: Facts) -> dict[str, Any] | None:
    """Every head group with its target, what it keeps at 8k tokens, and the profile's figures for it."""
    if facts.plan is None:
        return None
    plan = facts.plan
    rows: list[list[dict[str, Any]]] = []
    for layer, native in enumerate(plan.model.native_windows):
        cells = []
        unit = plan.unit(layer, 2, "patched")
        all_keys = FullGroup().cost(replace(unit, native=None), MAP_LENGTH)
        for number, group in enumerate(plan.layers[layer].groups):
            kept = min(1.0, group.cost(unit, MAP_LENGTH).held_bytes / all_keys.held_bytes)
            what = group.words(native)
            words = [
                f"layer {layer}, group {number}: {what if group.removes else f'{group.target}, {what}'}",
                f"keeps {kept:.0%} at {MAP_LENGTH:,} tokens",
                *(f"{key} {values[layer][number]:.3g}" for key, values in facts.statistics.items()),
            ]
            cells.append({"kept": kept, "target": group.target, "words": words, "level": _level(kept)})
        rows.append(cells)
    targets = sorted({str(cell["target"]) for row in rows for cell in row})
    for row in rows:
        for cell in row:
            cell["mark"] = _mark(cell["target"], targets)
    return {"layers": rows, "groups": len(rows[0]), "targets": targets, "length": MAP_LENGTH}


def _mark(name: str, names: Sequence[str]) -> str:
    """So many first letters of a name as tell it from the others; all of one that begins another."""
    others = [other for other in names if other != name]
    return next((name[:end] for end in range(1, len(name)) if not any(o.startswith(name[:end]) for o in others)), name)


def retention(facts: Facts) -> dict[str, Any] | None:
    """Every head group's retention curve: what share of its keys it needs for a share of their scores.

    Returns:
        `layers`: rows of cells, each with `words` and the `points` of a line in a square of 24 units, keys from left to
        right and scores from bottom to top; a cell is None where a layer slides by itself. None where nothing was
        measured.
    """
    curves = facts.retention
    if curves is None:
        return None
    rows: list[list[dict[str, Any] | None]] = []
    for layer, groups in enumerate(curves.needed):
        cells: list[dict[str, Any] | None] = []
        for number, needed in enumerate(groups):
            if not any(needed):
                cells.append(None)
                continue
            curve = [(0.0, 0.0), *zip(needed, curves.shares, strict=True), (1.0, 1.0)]
            cells.append(
                {
                    "points": " ".join(f"{24 * keys:.1f},{24 - 24 * scores:.1f}" for keys, scores in curve),
                    "words": [
                        f"layer {layer}, group {number}",
                        *(
                            f"{share:.0%} of the scores in {keys:.1%} of the keys"
                            for keys, share in zip(needed, curves.shares, strict=True)
                        ),
                    ],
                }
            )
        rows.append(cells)
    middle = min(curves.shares, key=lambda share: abs(share - 0.9))
    place = curves.shares.index(middle)
    found = sorted(needed[place] for groups in curves.needed for needed in groups if any(needed))
    words = (
        f"{middle:.0%} of the scores of KVzip+ are in {found[0]:.1%} to {found[-1]:.1%} of the keys of a head group, "
        f"in {found[len(found) // 2]:.1%} of those of the middle one"
        if found
        else "all layers slide by themselves"
    )
    return {"layers": rows, "groups": len(rows[0]), "length": curves.length, "words": words}


@dataclass(frozen=True)
class ChartSection:
    """Charts of quality over one cost.

    Attributes:
        cost: the cost, as the head of the section.
        charts: one for each measure of quality and length.
    """

    cost: str
    charts: list[Chart]

    def svgs(self, name: str) -> list[str]:
        """The charts for a page; `name` begins the ids of their parts."""
        return [chart_svg(chart, f"{name}{number}") for number, chart in enumerate(self.charts)]


def quality_charts(all_facts: Sequence[Facts], *, tabled: bool = False) -> list[ChartSection]:
    """For every cost that differs between variants, a chart of each measure of quality over the share of dense.

    Args:
        tabled: only over costs that the tables show.
    """
    measured = [facts for facts in all_facts if facts.comparison is not None]
    axes = {
        cell.label: cell.axis
        for facts in measured
        if facts.comparison is not None
        for row in facts.comparison.variants
        for cell in row.cells
        if cell.axis and (cell.table is not None or not tabled)
    }
    sections = [ChartSection(label, _charts(measured, label, axis)) for label, axis in axes.items()]
    return [section for section in sections if section.charts]


def _charts(all_facts: Sequence[Facts], cost: str, axis: str) -> list[Chart]:
    """Charts over one cost; none where every variant costs what the dense model costs."""
    series: dict[tuple[str, int | None], list[Series]] = defaultdict(list)
    titles: dict[tuple[str, int | None], tuple[str, str]] = {}
    for facts in all_facts:
        assert facts.comparison is not None
        prefix = f"{facts.name}: " if len(all_facts) > 1 else ""
        for row in facts.comparison.variants:
            for cell in _qualities(row):
                fraction = _share_of(facts.comparison, row, cost, cell.length)
                if fraction is None:
                    continue
                kind = f", {cell.interval_kind}" if cell.interval_kind else ""
                titles[cell.label, cell.length] = (f"{cell.title}{kind}", cell.unit)
                bars = None if cell.interval is None else [cell.interval]
                points = [(fraction, cell.value)]
                series[cell.label, cell.length].append(Series(prefix + row.name, points, bars, line=False))
    shares = {one.points[0][0] for group in series.values() for one in group}
    if shares <= {1.0}:
        return []
    charts = {key: group for key, group in series.items() if len(group) > 1}
    return [Chart(titles[key][0], axis, titles[key][1], group) for key, group in charts.items()]


def _qualities(row: VariantResult) -> list[Cell]:
    """The numbers of quality that have a length, and the mean of the tasks that have none."""
    whole = [cell for cell in row.cells if cell.part is None and cell.table in ("summary", "task") and not cell.axis]
    plain = [cell for cell in whole if cell.length is None]
    cells = [cell for cell in whole if cell.length is not None]
    if plain and all(cell.better == "higher" for cell in plain):
        cells.append(mean_of(plain))
    return cells


def _share_of(comparison: Comparison, row: VariantResult, cost: str, length: int | None) -> float | None:
    """A variant's share of the dense model's cost at a length; None where it is not known there."""
    cells = [cell for cell in row.cells if cell.label == cost and cell.length in (None, length)]
    return cells[0].fraction(comparison.dense.like(cells[0])) if cells else None


def by_position(facts: Facts, name: str) -> list[str]:
    """Quality in ranges of the position, a line a variant; `name` begins the ids of the charts' parts."""
    comparison = facts.comparison
    charts = []
    for cell in _parted(comparison, "position"):
        series = [
            Series(row.name, [(part.high, inside.value) for part, inside in parts_of(row, cell, "position")])
            for row in (comparison.variants if comparison is not None else [])
        ]
        charts.append(Chart(f"{cell.label} by position", "position up to", cell.unit, series, logarithmic=True))
    return [chart_svg(chart, f"{name}{number}") for number, chart in enumerate(charts)]


def layer_charts(comparison: Comparison | None) -> list[Chart]:
    """Numbers of layers and head groups, layer by layer: a chart for each measure, unit and variant that has some."""
    charts = []
    for row in comparison.variants if comparison is not None else ():
        for result in row.results:
            by_unit: dict[str, dict[str, dict[int, list[float]]]] = defaultdict(dict)
            for cell in result.cells():
                if cell.place is not None and cell.heads is None:
                    layers = by_unit[cell.unit].setdefault(cell.label, defaultdict(list))
                    layers[cell.place[0]].append(cell.value)
            for unit, series in by_unit.items():
                lines = [Series(label, _means(layers)) for label, layers in series.items()]
                title = f"{row.name}: {result.measure}, mean of a layer's groups"
                charts.append(Chart(title, "layer", unit, lines))
    return charts


def _means(layers: dict[int, list[float]]) -> list[tuple[float, float]]:
    return [(float(layer), sum(values) / len(values)) for layer, values in sorted(layers.items())]


def maps_of_heads(comparison: Comparison | None) -> list[HeadMap]:
    """Numbers of query heads, a map for each variant that has some and each kind of number."""
    maps = []
    for row in comparison.variants if comparison is not None else ():
        by_label: dict[str, dict[int, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
        for cell in row.cells:
            if cell.place is not None and cell.heads is not None:
                by_label[cell.label][cell.place[0]] |= dict.fromkeys(cell.heads, cell.value)
        maps += [HeadMap(row.name, label, values) for label, values in by_label.items()]
    return maps


def shaded(each: HeadMap) -> dict[str, Any]:
    """A map of query heads for the page: a row a head, a column a layer, cells with their number in words."""
    rows = []
    for head in range(each.heads):
        values = [each.values[layer].get(head) for layer in each.layers]
        rows.append(
            [
                None if value is None else {"words": f"layer {layer}, head {head}: {value:.3f}", "level": _level(value)}
                for layer, value in zip(each.layers, values, strict=True)
            ]
        )
    return {"title": f"{each.name}: {each.what}", "layers": each.layers, "rows": rows}


def by_depth(facts: Facts) -> list[dict[str, Any]]:
    """For every task with depths: a row for each variant and length, a column for each range of depth."""
    comparison = facts.comparison
    names: dict[str, list[dict[str, Any]]] = defaultdict(list)
    heads: dict[str, dict[tuple[float, float], None]] = defaultdict(dict)
    for cell in _parted(comparison, "depth"):
        for row in comparison.variants if comparison is not None else []:
            parts = {(part.low, part.high): inside for part, inside in parts_of(row, cell, "depth")}
            heads[cell.name] |= dict.fromkeys(parts)
            names[cell.name].append({"variant": row.name, "length": cell.length, "parts": parts})
    maps = []
    for name, rows in names.items():
        edges = sorted(heads[name])
        for row_of_task in rows:
            row_of_task["cells"] = [_shade(row_of_task["parts"].get(ends)) for ends in edges]
        words = [f"{edge(low, 'depth')} to {edge(high, 'depth')}" for low, high in edges]
        rows.sort(key=lambda row: int(row["length"] or 0))
        maps.append({"task": name, "heads": words, "rows": rows})
    return maps


def _shade(cell: Cell | None) -> dict[str, Any]:
    if cell is None:
        return {"count": 0, "share": None, "level": None}
    return {"count": cell.count, "share": cell.value, "level": _level(cell.value)}


def _level(share: float) -> int:
    """Which of the page's eleven strengths of a colour a share of 0 to 1 has."""
    return round(min(1.0, max(0.0, share)) * 10)


def by_gap(facts: Facts) -> list[dict[str, Any]]:
    """Tasks by the tokens between the evidence and its question, in ranges that grow by four."""
    comparison = facts.comparison
    return [
        {
            "variant": row.name,
            "task": cell.label,
            "cells": [(part.low, part.high, inside.count, inside.value) for part, inside in parts_of(row, cell, "gap")],
        }
        for row in (comparison.variants if comparison is not None else [])
        for cell in _parted(comparison, "gap")
    ]


def _parted(comparison: Comparison | None, axis: str) -> list[Cell]:
    """The cells that have parts on an axis, each once."""
    rows = comparison.variants if comparison is not None else []
    cells = list({cell.key: cell for row in reversed(rows) for cell in reversed(row.cells)}.values())[::-1]
    parted = {cell.key[:2] for cell in cells if cell.part is not None and cell.part.axis == axis}
    return [cell for cell in cells if cell.part is None and cell.key[:2] in parted]


def speed(facts: Facts, name: str) -> dict[str, Any] | None:
    """Charts and tables of `bench.json`: speed-up against length, and whole models.

    Args:
        name: begins the ids of the charts' parts.
    """
    if facts.bench is None:
        return None
    charts = speed_charts(facts.bench.kernel)
    rows = facts.bench.model_rows
    memory = [
        Series("plan", _gib_by_length([(row.length, row.plan) for row in rows])),
        Series("dense", _gib_by_length([(row.length, row.dense) for row in rows])),
    ]
    if len(rows) > 1:
        charts.append(Chart("KV cache as allocated", "tokens", "GiB", memory, logarithmic=True, zero=True))
    return {
        "charts": [chart_svg(chart, f"{name}{number}") for number, chart in enumerate(charts)],
        "models": rows,
        "routed": list(filter(None, map(routed_line, facts.bench.kernel))),
        "choosing": any(row.prefill_speedup_of_choosing is not None for row in rows),
        "break_even": facts.bench.break_even,
        "copy_bytes_per_s": facts.bench.copy_bytes_per_s,
        "machine": facts.bench.machine,
        "random": facts.bench.random_weights,
        "dtype": facts.bench.dtype,
    }


def _gib_by_length(sides: Sequence[tuple[int, SideFigures]]) -> list[tuple[float, float]]:
    return sorted((float(length), side.cache_bytes / 2**30) for length, side in sides)


def engines(folders: Sequence[Facts]) -> list[tuple[str, str]]:
    """What each engine does with a plan; one with states, or with heads to choose from, is another model elsewhere."""
    rows = list(ENGINES)
    if any(states(facts) is not None for facts in folders):
        lost = (
            "cannot serve heads with a state: they know no such heads, and their dense attention, on weights that were "
            "trained for the state, is another model"
        )
        rows.append(("all of these but the first, for heads with a state of constant size", lost))
    if any(facts.plan is not None and chooses(facts.plan) for facts in folders):
        lost = (
            "know no routers: they use every head for every token, with a gate of 1, which is another model on weights "
            "that were trained with the choice, and saves nothing"
        )
        rows.append(("all of these but the first, for heads that tokens choose", lost))
    if any(facts.plan is not None and facts.plan.upcycle is not None for facts in folders):
        lost = "cannot serve several models as one: they know no gates on heads, and no choice among a layer's MLPs"
        rows.append(("all of these but the first, for an upcycled model", lost))
    return rows


ENGINES = (
    ("transformers, trust_remote_code=True", "runs the plan: prefill, decode, padding, several turns, generate"),
    ("transformers, attn_implementation='sdpa' or another", "runs the dense model: correct output, but no savings"),
    (
        "vLLM with the plugin plugins/vllm",
        "runs plans of full, windowed and removed heads; refuses others by name",
    ),
    (
        "vLLM, SGLang, as they are",
        "use their own attention, so they run the dense model, say so at load, and save nothing",
    ),
    ("llama.cpp and other GGUF engines", "ignore the plan and run the dense model"),
    (
        "assisted (speculative) decoding",
        "works, as target and as draft, while heads are full, windows, routed or pruned; refused with a message for "
        "heads that have a state or keep tokens, which cannot take tokens back",
    ),
)
