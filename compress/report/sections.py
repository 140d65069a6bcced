"""The parts of a report, each a function from facts to what the template shows; a part without figures is left out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compress.bench.file import SideFigures
from compress.evaluate.comparison import CONTROL_ROW, UNTRAINED, Comparison, VariantResult
from compress.plan import Plan, removal
from compress.report.facts import Facts
from compress.report.svg import Series, plot
from compress.targets.full import FullGroup

LENGTHS = (1024, 2048, 4096, 8192, 32768, 131072)
MAPPED = 8192  # tokens at which the head map and the headline without an evaluation are
BINS = 5


def headline(facts: Facts) -> dict[str, Any]:
    """The ratio that the page opens with, and its conditions."""
    found: dict[str, Any] = {"name": facts.name, "model": None, "lines": []}
    comparison, chosen = facts.comparison, facts.chosen
    if comparison is not None:
        found["model"] = comparison.model
        found["conditions"] = f"{comparison.dtype} on {comparison.device}, seed {comparison.seed}"
    lengths = sorted(chosen.kv_bytes) if chosen is not None else []
    amounts = facts.plan.predicted.longest if facts.plan is not None and facts.plan.prunes else []
    if amounts:
        found["share"], found["of"] = amounts[0].share, f"of {amounts[0].of}{amounts[0].at}"
        found["lines"] += [amount_line(amount) for amount in amounts[1:] if amount.plan != amount.dense]
    elif comparison is not None and chosen is not None and lengths and lengths[-1] in comparison.dense.kv_bytes:
        length = lengths[-1]
        found["share"] = chosen.kv_bytes[length] / comparison.dense.kv_bytes[length]
        found["of"] = f"of the dense KV cache at {length:,} tokens, in allocated pages"
    elif facts.plan is not None:
        plan = facts.plan
        found["share"] = plan.cost(MAPPED, form=facts.form).held_bytes / plan.dense_cost(MAPPED).held_bytes
        found["of"] = f"of the dense KV cache at {MAPPED:,} tokens, by the plan"
    left = removal(facts.plan) if facts.plan is not None else None
    found["lines"] += [left] if left is not None else []
    if comparison is not None and chosen is not None:
        found["lines"] += [*_perplexity_line(comparison, chosen), *_recall_lines(comparison, chosen)]
        found["lines"] += _time_line(comparison, chosen)
        drop = comparison.worst_drop(chosen)
        if drop is not None:
            name, gap = drop
            found["lines"].append(f"worst of {len(chosen.tasks)} tasks: {name} {gap.difference:+.3f} ± {gap.error:.3f}")
    return found


def _perplexity_line(comparison: Comparison, chosen: VariantResult) -> list[str]:
    dense = comparison.dense.perplexity
    if dense is None or chosen.perplexity is None:
        return []
    ours = chosen.perplexity.perplexity
    others = [
        f"{row.name} {row.perplexity.perplexity:.3f}"
        for row in comparison.variants
        if row.name != chosen.name and row.perplexity is not None
    ]
    return [
        f"perplexity {ours:.3f} ({ours / dense.perplexity - 1:+.1%}); {', '.join(others)}; windows of "
        f"{dense.length:,} tokens"
    ]


def _time_line(comparison: Comparison, chosen: VariantResult) -> list[str]:
    found = chosen.latency
    if found is None or chosen is comparison.dense:
        return []
    return [
        f"time of a prefill of {found.length:,} tokens {found.prefill_share:.3f} of dense, of a decode step at batch "
        f"{found.batch} {found.decode_share:.3f}"
    ]


def _recall_lines(comparison: Comparison, chosen: VariantResult) -> list[str]:
    lines = []
    for number, own in enumerate(chosen.recall):
        others = [f"{row.name} {row.recall[number].accuracy:.2f}" for row in comparison.variants if row is not chosen]
        lines.append(f"{own.task} at {own.length:,}: {own.accuracy:.2f}; {', '.join(others)}; {len(own.items)} prompts")
    return lines


def costs(facts: Facts) -> list[dict[str, Any]]:
    """Bytes and sparsity of the plan by length, prefill and decode apart; heads that are removed compute no pair.

    Sparsity is that of Sparse Frontier (arXiv 2504.17768), counted token by token where the paper counts whole blocks.
    """
    plan = facts.plan
    if plan is None:
        return []
    rows = []
    for length in LENGTHS:
        used, dense = plan.cost(length, form=facts.form), plan.dense_cost(length)
        rows.append(
            {
                "length": length,
                "used": used.held_bytes,
                "dense": dense.held_bytes,
                "share": used.held_bytes / dense.held_bytes,
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
        all_keys = FullGroup().cost(replace(unit, native=None), MAPPED)
        for number, group in enumerate(plan.layers[layer].groups):
            kept = min(1.0, group.cost(unit, MAPPED).held_bytes / all_keys.held_bytes)
            what = group.words(native)
            told = [
                f"layer {layer}, group {number}: {what if group.removes else f'{group.target}, {what}'}",
                f"keeps {kept:.0%} at {MAPPED:,} tokens",
                *(f"{key} {values[layer][number]:.3g}" for key, values in facts.statistics.items()),
            ]
            cells.append({"kept": kept, "target": group.target, "told": told, "level": round(kept * 10)})
        rows.append(cells)
    targets = sorted({str(cell["target"]) for row in rows for cell in row})
    return {"layers": rows, "groups": len(rows[0]), "targets": targets, "length": MAPPED}


@dataclass(frozen=True)
class Chart:
    """One plot of quality: a point for every variant, over a share of what the dense model costs."""

    title: str
    x: str
    y: str
    series: list[Series]


def quality_against_bytes(all_facts: Sequence[Facts]) -> list[Chart]:
    """One chart for perplexity and one for each recall task and suite, over the share of the dense KV bytes."""
    return _quality_charts(all_facts, _share_of_bytes, "share of the dense KV bytes")


def quality_against_work(all_facts: Sequence[Facts]) -> list[Chart]:
    """The same over the pairs of query and key that a prefill computes."""
    return _quality_charts(all_facts, _share_of_pairs, "share of the dense prefill's pairs of query and key")


def quality_against_parameters(all_facts: Sequence[Facts]) -> list[Chart]:
    """The same over the parameters of the decoder layers, where heads or neurons were removed."""
    pruned = [facts for facts in all_facts if facts.comparison is not None and facts.comparison.pruned]
    return _quality_charts(pruned, _share_of_parameters, "share of the dense layers' parameters")


def drawn(charts: Sequence[Chart]) -> list[str]:
    """Charts as SVG text."""
    return [plot(chart.series, title=chart.title, x=chart.x, y=chart.y) for chart in charts]


def _share_of_bytes(facts: Facts, variant: VariantResult, length: int | None) -> float | None:
    assert facts.comparison is not None
    if length is None:
        return None
    dense, used = facts.comparison.dense.kv_bytes.get(length), variant.kv_bytes.get(length)
    return used / dense if dense and used else None


def _share_of_parameters(facts: Facts, variant: VariantResult, length: int | None) -> float | None:
    assert facts.comparison is not None
    dense, used = facts.comparison.dense.size, variant.size
    return used.block_parameters / dense.block_parameters if dense is not None and used is not None else None


def _share_of_pairs(facts: Facts, variant: VariantResult, length: int | None) -> float | None:
    if length is None:
        return None
    if variant.name in ("dense", CONTROL_ROW):
        return 1.0
    plan = facts.plans.get(variant.name.removesuffix(UNTRAINED))
    return None if plan is None else _prefill_share(plan, length)


def _quality_charts(
    all_facts: Sequence[Facts], share_of: Callable[[Facts, VariantResult, int | None], float | None], unit_of_x: str
) -> list[Chart]:
    charts: dict[str, list[Series]] = defaultdict(list)
    units: dict[str, str] = {}
    for facts in all_facts:
        if facts.comparison is None:
            continue
        prefix = f"{facts.name}: " if len(all_facts) > 1 else ""
        for variant in facts.comparison.variants:
            for name, unit, length, value, error in _qualities(variant):
                share = share_of(facts, variant, length)
                if share is not None:
                    units[name] = unit
                    bars = None if error is None else [error]
                    charts[name].append(Series(prefix + variant.name, [(share, value)], bars, line=False))
    return [Chart(name, unit_of_x, units[name], series) for name, series in charts.items() if len(series) > 1]


Quality = tuple[str, str, int | None, float, tuple[float, float] | None]


def _qualities(variant: VariantResult) -> list[Quality]:
    """(title, unit, tokens, value, interval) of all that has a length, and of the mean of the tasks that have none."""
    found: list[Quality] = []
    if variant.perplexity is not None:
        length = variant.perplexity.length
        found.append((f"perplexity at {length:,} tokens", "perplexity", length, variant.perplexity.perplexity, None))
    for recall in variant.recall:
        name = f"{recall.task} at {recall.length:,} tokens, Wilson's 95% interval"
        found.append((name, "right answers", recall.length, recall.accuracy, recall.interval))
    plain = [task for task in variant.tasks if task.length is None]
    for task in variant.tasks:
        if task.length is not None:
            value, error = task.metrics[task.main()], 1.96 * task.errors.get(task.main(), 0.0)
            title = f"{task.task}, 1.96 standard errors"
            found.append((title, "score", task.length, value, (value - error, value + error)))
    if plain and all(task.higher[task.main()] for task in plain):
        value = math.fsum(task.metrics[task.main()] for task in plain) / len(plain)
        error = 1.96 * math.hypot(*(task.errors.get(task.main(), 0.0) for task in plain)) / len(plain)
        name = plain[0].task if len(plain) == 1 else f"mean of {len(plain)} tasks"
        found.append((f"{name}, 1.96 standard errors", "score", None, value, (value - error, value + error)))
    return found


def perplexity_by_position(facts: Facts) -> str:
    """Perplexity in ranges of the position, a line a variant."""
    rows = facts.comparison.variants if facts.comparison else []
    series = [
        Series(row.name, [(float(bucket.end), bucket.perplexity) for bucket in row.perplexity.buckets])
        for row in rows
        if row.perplexity is not None
    ]
    return plot(series, title="perplexity by position", x="position up to", y="perplexity", logarithmic=True)


def recall_maps(facts: Facts) -> list[dict[str, Any]]:
    """For every task with depths: a row for each variant and length, a column for each range of depth."""
    tasks: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for variant in facts.comparison.variants if facts.comparison else []:
        for recall in variant.recall:
            cells = [_cell(count, share) for _, _, count, share in recall.by_depth(BINS)]
            tasks[recall.task].append({"variant": variant.name, "length": recall.length, "cells": cells})
        for task in variant.tasks:
            metric = task.main()
            placed = [(item.depth, item.metrics[metric]) for item in task.samples if item.depth is not None]
            if task.length is None or not placed:
                continue
            cells = []
            for number in range(BINS):
                own = [score for depth, score in placed if min(BINS - 1, int(depth * BINS)) == number]
                cells.append(_cell(len(own), math.fsum(own) / len(own) if own else None))
            name = task.task.removesuffix(f"_{task.length}")
            tasks[name].append({"variant": variant.name, "length": task.length, "cells": cells})
    heads = [f"{number / BINS:.1f} to {(number + 1) / BINS:.1f}" for number in range(BINS)]
    return [
        {"task": name, "heads": heads, "rows": sorted(rows, key=lambda row: int(row["length"]))}
        for name, rows in tasks.items()
    ]


def _cell(count: int, share: float | None) -> dict[str, Any]:
    return {"count": count, "share": share, "level": None if share is None else round(share * 10)}


def speed(facts: Facts) -> dict[str, Any] | None:
    """Plots and tables of `bench.json`: speed-up against length, and whole models."""
    if facts.bench is None:
        return None
    charts = []
    for what in ("prefill", "decode"):
        series: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for row in facts.bench.kernel:
            if row.what == what:
                series[f"plan {row.mix}, batch {row.batch}"].append((row.length, row.speedup))
        lines = [Series(name, sorted(points)) for name, points in series.items()]
        if lines:
            title = f"{what}, attention alone: speed-up over the fastest dense"
            charts.append(plot(lines, title=title, x="tokens", y="times", logarithmic=True, zero=True))
    rows = facts.bench.model_rows
    memory = [
        Series("plan", _gib_by_length([(row.length, row.plan) for row in rows])),
        Series("dense", _gib_by_length([(row.length, row.dense) for row in rows])),
    ]
    if len(rows) > 1:
        charts.append(plot(memory, title="KV cache as allocated", x="tokens", y="GiB", logarithmic=True, zero=True))
    return {
        "charts": charts,
        "models": rows,
        "break_even": facts.bench.break_even,
        "copy_bytes_per_s": facts.bench.copy_bytes_per_s,
        "machine": facts.bench.machine,
        "random": facts.bench.random_weights,
        "dtype": facts.bench.dtype,
    }


def _gib_by_length(sides: Sequence[tuple[int, SideFigures]]) -> list[tuple[float, float]]:
    return sorted((float(length), side.cache_bytes / 2**30) for length, side in sides)


def gaps(facts: Facts) -> list[dict[str, Any]]:
    """Associative recall by the tokens between a pair and its question, in ranges that grow by four."""
    found = []
    for variant in facts.comparison.variants if facts.comparison else []:
        for task in variant.tasks:
            placed = [(sample.gap, sample.metrics[task.main()]) for sample in task.samples if sample.gap is not None]
            ranges: dict[int, list[float]] = defaultdict(list)
            for gap, score in placed:
                ranges[4 ** math.ceil(math.log(max(gap, 1), 4))].append(score)
            if placed:
                cells = [(high, len(own), math.fsum(own) / len(own)) for high, own in sorted(ranges.items())]
                found.append({"variant": variant.name, "task": task.task, "cells": cells})
    return found


ENGINES = (
    ("transformers, trust_remote_code=True", "runs the plan: prefill, decode, padding, several turns, generate"),
    ("transformers, attn_implementation='sdpa' or another", "runs the dense model: right answers, nothing saved"),
    ("vLLM, SGLang, TensorRT-LLM", "put their own attention in its place: the dense model, nothing saved"),
    ("llama.cpp and other GGUF engines", "know nothing of the plan: the dense model"),
    ("assisted (speculative) decoding", "refused with a message: a freed page cannot come back"),
)
