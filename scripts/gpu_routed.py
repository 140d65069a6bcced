"""The GPU check of routed heads: every kernel against float64, then the time of what tokens skip by choosing.

python scripts/gpu_routed.py [FOLDER] [SECTION ...]     one GPU, under 4 minutes

A layer of the shape of Llama-3-8B (32 heads in 8 groups of head size 128) is timed at 75% and 50% active, groups and
query heads, beside PyTorch's fastest dense attention and beside the same routed layer with all heads on. Writes JSON
and a table into the folder; where nothing is saved, the table says so.
"""

from __future__ import annotations

import math
import multiprocessing
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).parents[1]))

from compress.bench import kernel, measure
from compress.bench.kernel import Row, random_qkv, with_mix
from compress.bench.memory import attempt, decode_need, model_need, prefill_need
from compress.bench.model import model_row
from compress.bench.report import SAVED, gain_words, model_lines
from compress.bench.routed import ROUTED, RoutedCache, RoutedLayer
from compress.models.graph import graph_of
from compress.models.planned import with_runtime_plan
from compress.models.source import ModelSource
from compress.runtime import triton_routed
from compress.runtime.impl import IMPLS
from compress.runtime.impl_routed import ROUTED_IMPLS
from compress.runtime.mixer import LayerFacts
from compress.runtime.mixer_routed import RoutedMixer
from compress.runtime.pages import Pages
from compress.runtime.reference import Rows, only_active
from compress.runtime.routers import Router
from compress.runtime.span import PAGE, Span
from compress.targets.routed import RoutedGroup
from scripts.gpu_check import COLD, LINES, error, poison, run_sections, say
from scripts.gpu_models import HIDDEN, LLAMA, NEURONS, two_layers, ways_to_the_end

DEVICE = torch.device("cuda")
BF16, F32 = torch.bfloat16, torch.float32
MOST = {BF16: 5e-3, F32: 1e-5}  # norm of the difference over the norm: one rounding to bfloat16 is .0017
RULES = [Span(), Span(70, 33, 0.25), Span(4, 100, 0.0)]
CLOSE_SCORES = 3e-5  # float32 may order units otherwise whose scores are closer
LENGTHS = [2**power for power in range(11, 18)]


# --- numerics


def exact_rows(query: Any, key: Any, value: Any, at: torch.Tensor) -> torch.Tensor:
    """Attention of queries `[H, T, D]` at positions `at` over keys `[G, N, D]` under RULES, in float64."""
    share, keys, found = len(query) // len(key), torch.arange(key.shape[1], device=DEVICE), []
    for head in range(len(query)):
        seen = RULES[head // share].visible(at[:, None], keys[None, :])
        scores = query[head].double() @ key[head // share].double().T * query.shape[-1] ** -0.5
        found.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value[head // share].double())
    return torch.stack(found)


def paged(key: torch.Tensor, value: torch.Tensor, lengths: list[int]) -> Pages:
    """Tokens `[B, G, N, D]` in pages of random places; what lies behind each sequence's last token is NaN."""
    batch, groups, length, dim = key.shape
    numbers = -(-length // PAGE)
    order, pools = torch.randperm(batch * groups * numbers, device=DEVICE), []
    for tokens in (key, value):
        whole = torch.nn.functional.pad(tokens, (0, 0, 0, numbers * PAGE - length)).clone()
        for row, count in enumerate(lengths):
            whole[row, :, count:] = torch.nan
        pool = torch.empty(len(order), PAGE, dim, device=DEVICE, dtype=key.dtype)
        pool[order] = whole.reshape(-1, PAGE, dim)
        pools.append(pool)
    return Pages(pools[0], pools[1], order.view(batch, groups, numbers).to(torch.int32))


class Checks:
    """Errors found so far, and which of them are too large."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, what: str, dtype: torch.dtype, found: float, most: float | None = None) -> None:
        """One error; NaN is too large."""
        most = MOST[dtype] if most is None else most
        ok = found <= most
        self.rows.append({"what": what, "dtype": str(dtype), "error": found, "most": most, "ok": ok})
        if not ok:
            say(f"  FAILED {what} in {dtype}: {found:.2e}, and {most:.0e} is allowed")


def prefill_case(checks: Checks, dtype: torch.dtype, dim: int, share: int, by_head: bool, ragged: bool) -> None:
    """Listed rows and prefill: in one piece, or ragged behind an earlier cache, what is off and padding being NaN."""
    groups, heads = len(RULES), share * len(RULES)
    past, start, count = ((0, 70), (0, 6), (517, 400)) if ragged else ((0,), (0,), (777,))
    columns, batch = 517 if ragged else 777, len(past)
    lengths = [p + c for p, c in zip(past, count, strict=True)]
    make = partial(torch.randn, device=DEVICE, dtype=dtype)
    query, key, value = make(batch, heads, columns, dim), *make(2, batch, groups, max(lengths), dim)
    active = torch.rand(batch, columns, heads if by_head else groups, device=DEVICE).transpose(1, 2) < 0.4
    active[:, -1] = False
    gates = torch.rand(active.shape, device=DEVICE)
    share_of = heads // active.shape[1]
    on, gain = (x.repeat_interleave(share_of, dim=1) for x in (active, gates.double()))
    given = query.masked_fill(~on[..., None], torch.nan)
    new = torch.full((2, batch, groups, columns, dim), torch.nan, device=DEVICE, dtype=dtype)
    for b in range(batch):
        here, then = slice(start[b], start[b] + count[b]), slice(past[b], lengths[b])
        new[0, b, :, here], new[1, b, :, here] = key[b, :, then], value[b, :, then]
        given[b, :, : start[b]] = given[b, :, start[b] + count[b] :] = torch.nan
    rows = Rows(past, start, count)
    listed, counts = triton_routed.rows_on(active, rows.tensor(DEVICE), heads, groups)
    wrong = 0
    for b in range(batch):
        of_heads = on[b, :, start[b] : start[b] + count[b]].unflatten(0, (groups, share))
        for g in range(groups):
            wanted = of_heads[g].T.flatten().nonzero().flatten()
            wrong += int(counts[b, g]) != len(wanted) or not torch.equal(listed[b, g, : len(wanted)].long(), wanted)
    name = f"D {dim}, {share} heads a group, by {'head' if by_head else 'group'}{', ragged and paged' * ragged}"
    checks.add(f"lists, {name}", dtype, float(wrong), 0.0)
    poison()
    pages = paged(key, value, list(past)) if ragged else None
    out = ROUTED_IMPLS["triton"].prefill(given, new[0], new[1], RULES, active, gates=gates, rows=rows, pages=pages)
    rest, worst = out.clone(), 0.0
    for b in range(batch):
        here, at = slice(start[b], start[b] + count[b]), torch.arange(past[b], lengths[b], device=DEVICE)
        exact = exact_rows(query[b, :, here], key[b, :, : lengths[b]], value[b, :, : lengths[b]], at)
        worst = max(worst, error(out[b, :, here], exact * (on * gain)[b, :, here, None]))
        rest[b, :, here] *= ~on[b, :, here, None]
    checks.add(f"prefill, {name}", dtype, worst)
    checks.add(f"prefill's zeros, {name}", dtype, float(rest.float().norm()), 0.0)
    if not ragged:
        every = torch.ones_like(active)
        plain = IMPLS["triton"].prefill(query, key, value, RULES)
        found = ROUTED_IMPLS["triton"].prefill(query, key, value, RULES, every)
        checks.add(f"prefill with all on is the plain kernel's, {name}", dtype, error(found, plain.double()), 1e-6)


def decode_case(checks: Checks, dtype: torch.dtype, dim: int, share: int, by_head: bool, long: bool) -> None:
    """Decode, in a CUDA graph whose flags change between replays; the pages of groups that are off are NaN."""
    groups, heads = len(RULES), share * len(RULES)
    lengths = [20011] if long else [193, 0, 321, 64, 1]
    batch, most = len(lengths), max(lengths)
    make = partial(torch.randn, device=DEVICE, dtype=dtype)
    query, key, value = make(batch, heads, dim), *make(2, batch, groups, most, dim)
    where = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    units = heads if by_head else groups
    active = torch.ones(batch, units, dtype=torch.bool, device=DEVICE)
    gates = torch.ones(batch, units, device=DEVICE)
    pages = paged(key, value, lengths)
    keys = pages.keys.clone()
    kept: dict[str, torch.Tensor] = {}

    def step() -> None:
        kept["out"], kept["lse"] = IMPLS["triton"].decode(
            query, pages, where, RULES, active=active, gates=gates, keep_lse=True
        )

    replay = graph_of(step)
    name = f"D {dim}, {share} heads a group, by {'head' if by_head else 'group'}{', long' * long}"
    for turn in ("all", "some", "none"):
        chosen = torch.rand(active.shape, device=DEVICE) < 0.4
        active.copy_(torch.ones_like(active) if turn == "all" else chosen if turn == "some" else ~chosen & chosen)
        gates.copy_(torch.rand(gates.shape, device=DEVICE))
        on, gain = (x.repeat_interleave(heads // units, dim=1) for x in (active, gates.double()))
        off = ~on.unflatten(1, (groups, share)).any(-1)
        pages.keys.copy_(keys)
        pages.keys[pages.table[off].long().flatten()] = torch.nan
        replay()
        worst, zeros = 0.0, float(kept["out"][~on].float().norm())
        for b, length in enumerate(lengths):
            if not length:
                zeros += float(kept["out"][b].float().norm())
                continue
            at = torch.tensor([length - 1], device=DEVICE)
            exact = exact_rows(query[b, :, None], key[b, :, :length], value[b, :, :length], at)[:, 0]
            worst = max(worst, error(kept["out"][b], exact * (on * gain)[b, :, None]))
        zeros += float((kept["lse"].isfinite() != (on & (where > 0)[:, None])).sum())
        checks.add(f"decode, {turn} on, {name}", dtype, worst)
        checks.add(f"decode's zeros, {turn} on, {name}", dtype, zeros, 0.0)


def router_case(checks: Checks, dtype: torch.dtype, fields: dict[str, Any], tokens: int) -> None:
    """What the router kernel chooses and its gates, against the router in float64."""
    groups, share, hidden = 8, 4, 1000
    entries = [group.model_dump() for group in RoutedGroup.layer(groups, 3, group_size=share, **fields)]
    router = Router(entries, LayerFacts(0, 128, hidden, share, None)).to(DEVICE, dtype).requires_grad_(False)
    for weight in router.parameters():
        weight.normal_(std=hidden**-0.5)
    query = torch.randn(2, groups * share, tokens, 128, device=DEVICE, dtype=dtype)
    inputs = torch.randn(2, tokens, hidden, device=DEVICE, dtype=dtype)
    fast = ROUTED_IMPLS["triton"].router
    assert fast is not None and fast.takes(router)
    on, gates = fast.route(router, query, inputs)
    exact = router.double()(query.double(), inputs.double())
    ordered = exact.logits.sort(-1, descending=True).values
    clear = ordered[..., 2] - ordered[..., 3] > CLOSE_SCORES
    name = f"{', '.join(map(str, fields.values()))}, {tokens} tokens"
    checks.add(f"choices, {name}", dtype, float((on != exact.on)[clear].sum()), 0.0)
    checks.add(f"share of tokens without a clear choice, {name}", dtype, 1 - float(clear.double().mean()), 1e-3)
    if gates is not None:
        both = (on & exact.on)[clear]
        checks.add(f"gates, {name}", dtype, error(gates[clear][both], exact.gates[clear][both]), 3e-5)


CASES: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
    (prefill_case, (BF16, 128, 4, False, False)), (prefill_case, (BF16, 128, 4, True, True)),
    (prefill_case, (BF16, 64, 3, True, False)), (prefill_case, (BF16, 64, 3, False, True)),
    (prefill_case, (BF16, 256, 1, False, False)), (prefill_case, (F32, 96, 7, True, True)),
    (prefill_case, (F32, 64, 3, False, False)), (decode_case, (BF16, 128, 4, False, True)),
    (decode_case, (BF16, 128, 4, True, True)), (decode_case, (BF16, 64, 3, True, False)),
    (decode_case, (BF16, 256, 1, False, False)), (decode_case, (F32, 96, 7, True, False)),
    (decode_case, (F32, 64, 3, False, True)), (router_case, (BF16, {"unit": "group", "shared": (0, 5)}, 1)),
    (router_case, (BF16, {"unit": "head", "shared": (1, 2, 9)}, 1001)), (router_case, (BF16, {"unit": "head"}, 1)),
    (router_case, (BF16, {"unit": "group", "router": "norm", "shared": (3,)}, 1001)),
    (router_case, (BF16, {"unit": "head", "router": "norm", "gates": "weighted"}, 1)),
    (router_case, (F32, {"unit": "group", "shared": (0, 5)}, 1001)),
    (router_case, (F32, {"unit": "head", "shared": (1, 2, 9)}, 1)),
]  # fmt: skip


def numeric_case(number: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of one case, and the lines that it printed; runs in a process of its own."""
    torch.seed()
    checks, (case, values) = Checks(), CASES[number]
    LINES.clear()
    try:
        with torch.inference_mode(), mock.patch.object(triton_routed, "SKIP_FROM", 0):
            case(checks, *values)
    except Exception:  # told as a failed check, and the other cases go on
        say(f"  FAILED {case.__name__} {values}: {traceback.format_exc()}")
        checks.rows.append({"what": f"{case.__name__} {values}", "dtype": "", "error": math.inf, "ok": False})
    return checks.rows, list(LINES)


def numerics() -> list[dict[str, Any]]:
    """Every kernel against float64; cases run side by side, as most of their time is the compiler's."""
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(8, mp_context=multiprocessing.get_context("spawn")) as pool:
        for found, lines in pool.map(numeric_case, range(len(CASES))):
            rows += found
            LINES.extend(lines)
    for dtype in (BF16, F32):
        own = [row for row in rows if row["dtype"] == str(dtype) and row["most"] > 0]
        worst = max(own, key=lambda row: row["error"] / row["most"])
        bad = sum(not row["ok"] for row in rows if row["dtype"] in ("", str(dtype)))
        say(
            f"numerics in {dtype}: {sum(row['dtype'] == str(dtype) for row in rows)} checks, {bad} failed; the worst "
            f"error is {worst['error']:.1e} of {worst['most']:.0e} ({worst['what']})"
        )
    return rows


# --- a small planned model


@torch.inference_mode()
def model_rows() -> list[dict[str, Any]]:
    """Chunks, and steps in a CUDA graph, are the prefill of a small model in float32, by kernels and plain PyTorch."""
    found = []
    length, tail = 4500, 70
    plans: list[dict[str, Any]] = [{"shared": (0,)}, {"unit": "head", "shared": (1, 2)}, {"router": "norm", "sink": 4}]
    for fields in plans:
        dense = two_layers(4)
        if "sink" in fields:
            fields = {**fields, "beta": 0.25, "alpha": 40}
        routed = [group.model_dump(mode="json") for group in RoutedGroup.layer(3, 1, group_size=2, **fields)]
        groups = [*routed, {"target": "window", "sink": 4, "alpha": 100, "beta": 0.0}]
        model = with_runtime_plan(dense, {"schema": 1, "layers": [{"groups": groups}] * 2})
        for module in model.modules():
            if isinstance(module, RoutedMixer):
                module.untie()
        errors = ways_to_the_end(model, length, tail, (1000, 3501))
        ok = max(errors.values()) < 1e-3
        say(
            f"model {fields}: chunks differ by {errors['chunked']:.1e} from one prefill, steps in a graph by "
            f"{errors['decoded_in_a_graph']:.1e}, plain PyTorch by {errors['reference']:.1e}"
            + ("" if ok else "  FAILED: more than 1e-3")
        )
        found.append({"plan": fields, "ok": ok, **errors})
    return found


# --- speed


def layer_flops(length: int) -> float:
    """Of a Llama-3-8B layer in a prefill: projections, the MLP, and attention itself."""
    weights = HIDDEN * (2 * HIDDEN + 2 * LLAMA.groups * LLAMA.head_dim) + 3 * HIDDEN * NEURONS
    return 2.0 * length * weights + attention_flops(length)


def attention_flops(length: int) -> float:
    """Of the two products of causal attention of all heads."""
    return 4.0 * LLAMA.query_heads * LLAMA.head_dim * length * (length + 1) / 2


def verdict(row: Row) -> str:
    """What was gained beside dense attention and beside all heads on, in words where it is nothing."""
    assert row.all_on is not None
    dense, whole = row.speedup, row.all_on.median / row.plan.median
    words = f"{gain_words(dense)} beside dense, {gain_words(whole)} beside all on"
    return words if max(dense, whole) >= SAVED else f"NOTHING IS SAVED: {words}"


@torch.inference_mode()
def prefill_rows() -> list[dict[str, Any]]:
    """Prefill of one layer, router included, from 2k to 128k tokens."""
    found: list[dict[str, Any]] = []
    with mock.patch.object(triton_routed, "SKIP_FROM", 0):
        for length in LENGTHS:
            take = partial(kernel.routed_prefill_rows, LLAMA, list(ROUTED), 1, length, "triton", DEVICE, BF16)
            need = 3 * prefill_need(LLAMA, 1, length, BF16)
            rows: list[Row] = attempt(f"prefill {length}", need, DEVICE, take, say) or []
            for row in rows:
                if row is rows[0]:
                    assert row.all_on is not None
                    dense = ", ".join(f"{name} {time.median:.3f}" for name, time in row.dense.items())
                    say(f"prefill of {length:,} tokens: dense {dense} ms; all heads on {row.all_on.median:.3f}")
                skipped = (1 - row.fraction) * attention_flops(length)
                unread = (1 - row.fraction) * length * LLAMA.query_heads * LLAMA.head_dim * BF16.itemsize
                say(
                    f"  {row.mix:4} {row.plan.median:9.3f} ms ({row.plan.lower:.3f} to {row.plan.upper:.3f}); skipped "
                    f"{skipped / 1e9:.1f} GFLOP ({1 - row.fraction:.1%} of attention, "
                    f"{skipped / layer_flops(length):.1%} of the layer) and {unread / 2**20:.0f} MiB of queries; they "
                    f"allow {1 / row.fraction:.2f} times: {verdict(row)}"
                )
                facts = {"flops_skipped": skipped, "layer_flops": layer_flops(length), "query_bytes_skipped": unread}
                found.append(row.values() | facts | {"bound": 1 / row.fraction})
            measure.release(DEVICE)
    for name in ROUTED:
        own = [row for row in found if row["mix"] == name]
        wins = [row["length"] for row in own if row["speedup"] >= SAVED]
        say(f"prefill {name}: faster than the fastest dense attention at {wins or 'no length'}")
    return found


def everything(query: Any, key: Any, value: Any, spans: list[Span], on: Any, gates: Any) -> torch.Tensor:
    """Attention of all rows, of which those that are off are set to zero afterwards."""
    return only_active(IMPLS["triton"].prefill(query, key, value, spans), on, gates)


@torch.inference_mode()
def short_rows() -> list[dict[str, Any]]:
    """From which length skipping is worth its launches: skipped, and everything computed and what is off set to zero.

    Launched by the host as in a model, and in a CUDA graph.
    """
    found = []
    for length in (512, 1024, 2048, 4096, 8192):
        query, key, value = random_qkv(LLAMA, 1, length, DEVICE, BF16)
        hidden = torch.randn(1, length, HIDDEN, device=DEVICE, dtype=BF16)
        spans = [Span()] * LLAMA.groups
        for name in ("R75", "R50"):
            layer = RoutedLayer(name, LLAMA, DEVICE, BF16)
            step = layer.step(query, hidden, "triton")
            on, gates = (layer.chosen.by_unit(x) for x in layer.chosen.flags(query, step) if x is not None)
            where = Rows.whole(1, length).tensor(DEVICE)
            calls: dict[str, Callable[[], Any]] = {
                "skipping": partial(ROUTED_IMPLS["triton"].prefill, query, key, value, spans, on, gates=gates),
                "everything": partial(everything, query, key, value, spans, on, gates),
                "router": partial(layer.chosen.flags, query, step),
                "router in plain PyTorch": partial(layer.chosen.choose, query, step),
                "lists": partial(triton_routed.rows_on, on, where, LLAMA.query_heads, LLAMA.groups),
            }
            with mock.patch.object(triton_routed, "SKIP_FROM", 0):
                eager = {n: t.median for n, t in measure.times_in_turn(calls, DEVICE, turns=1).items()}
                graphed = {n: measure.graphed_times(call, DEVICE, seconds=0.1).median for n, call in calls.items()}
            say(
                f"short prefill {name}, {length} tokens, us in a graph (by the host): "
                + ", ".join(f"{n} {graphed[n] * 1e3:.1f} ({eager[n] * 1e3:.1f})" for n in calls)
            )
            found.append({"mix": name, "length": length, "graphed_ms": graphed, "eager_ms": eager})
    return found


@torch.inference_mode()
def decode_rows() -> list[dict[str, Any]]:
    """A decode step of one layer, router and store included, with caches of 2k to 128k tokens that no chip keeps."""
    copy = measure.copy_bandwidth(DEVICE)
    say(f"a device copy moves {copy / 1e9:.0f} GB/s")
    found: list[dict[str, Any]] = []
    for batch, length in [*((1, length) for length in LENGTHS), (16, 2048), (16, 16384)]:
        whole = 2 * batch * LLAMA.groups * length * LLAMA.head_dim * BF16.itemsize
        copies = max(1, min(20, COLD // whole))
        take = partial(kernel.routed_decode_rows, LLAMA, list(ROUTED), batch, length, "triton", DEVICE, BF16, copies)
        need = copies * decode_need(LLAMA, batch, length, BF16)
        rows: list[Row] = attempt(f"decode {batch} x {length}", need, DEVICE, take, say) or []
        for row in rows:
            if row is rows[0]:
                assert row.all_on is not None
                dense = ", ".join(f"{name} {time.median * 1e3:.1f}" for name, time in row.dense.items())
                say(
                    f"decode, batch {batch}, cache of {length:,}: dense {dense} us; all heads on "
                    f"{row.all_on.median * 1e3:.1f}"
                )
            unread = whole - (row.kept_bytes or 0)
            flops = unread / BF16.itemsize / LLAMA.head_dim * LLAMA.query_heads / LLAMA.groups * 2 * LLAMA.head_dim
            rate = (row.kept_bytes or 0) / row.plan.median * 1e3
            say(
                f"  {row.mix:4} {row.plan.median * 1e3:7.1f} us ({row.plan.lower * 1e3:.1f} to "
                f"{row.plan.upper * 1e3:.1f}); not read {unread / 2**20:.1f} MiB ({1 - row.fraction:.1%}), skipped "
                f"{flops / 1e6:.1f} MFLOP; they allow {1 / row.fraction:.2f} times: {verdict(row)}; "
                f"{rate / copy:.2f} of a copy"
            )
            found.append(row.values() | {"bytes_not_read": unread, "flops_skipped": flops, "bound": 1 / row.fraction})
        measure.release(DEVICE)
    for name in ROUTED:
        wins = [row["length"] for row in found if (row["mix"], row["batch"]) == (name, 1) and row["speedup"] >= SAVED]
        say(f"decode {name}, batch 1: faster than the fastest dense attention at {wins or 'no length'}")
    return found


@torch.inference_mode()
def part_rows() -> list[dict[str, Any]]:
    """Where a decode step's time goes, and what it costs to compute and to write keys of groups that are off."""
    found: list[dict[str, Any]] = []
    impl = IMPLS["triton"]
    for batch, length in ((1, 8192), (16, 8192)):
        cache = RoutedCache(LLAMA, batch, length, DEVICE, BF16)
        layer = RoutedLayer("R50", LLAMA, DEVICE, BF16)
        norm = RoutedMixer(
            [group.model_dump() for group in RoutedGroup.layer(8, 2, shared=(0, 1), router="norm")],
            layer.chosen.facts,
        ).to(DEVICE)
        cache.decode(layer.chosen, "triton")
        assert cache.state is not None
        step, pages, spans = cache.step("triton"), cache.state.pages(), cache.state.spans
        on, gates = (layer.chosen.by_unit(x)[..., 0] for x in layer.chosen.flags(cache.query, step) if x is not None)
        key, value, query = cache.key[:, :, 0], cache.value[:, :, 0], cache.query[:, :, 0]
        used = Pages(pages.keys, pages.values, pages.table[:, :4].contiguous())
        calls: dict[str, Callable[[], Any]] = {
            "router": partial(layer.chosen.flags, cache.query, step),
            "router by norms": partial(norm.flags, cache.query, step),
            "router in plain PyTorch": partial(layer.chosen.choose, cache.query, step),
            "store of 8 groups": partial(impl.store_one, key, value, pages, cache.lengths, spans),
            "store of 4 groups": partial(impl.store_one, key[:, :4], value[:, :4], used, cache.lengths, spans[:4]),
            "attention of 4 of 8 groups": partial(
                impl.decode, query, pages, cache.lengths, spans, active=on, gates=gates
            ),
            "attention of 8 groups": partial(impl.decode, query, pages, cache.lengths, spans),
        }
        took = {name: measure.graphed_times(call, DEVICE, seconds=0.1).median for name, call in calls.items()}
        say(
            f"decode parts, batch {batch}, cache of {length:,}, us: "
            + ", ".join(f"{name} {ms * 1e3:.1f}" for name, ms in took.items())
        )
        found.append({"batch": batch, "length": length, "ms": took})
    for tokens in (1, 16, 8192):
        hidden = torch.randn(tokens, HIDDEN, device=DEVICE, dtype=BF16)
        spent: dict[int, float] = {}
        for groups in (8, 6, 4):
            weight = torch.randn(2 * groups * LLAMA.head_dim, HIDDEN, device=DEVICE, dtype=BF16)
            spent[groups] = measure.graphed_times(partial(linear, hidden, weight), DEVICE, seconds=0.1).median
        written = 2 * LLAMA.head_dim * BF16.itemsize
        say(
            f"keys and values of {tokens:,} tokens: projections of 8 groups take {spent[8] * 1e3:.1f} us; of the 6 or "
            f"4 that are on they would take {spent[6] * 1e3:.1f} or {spent[4] * 1e3:.1f}. Written are "
            f"{8 * written:,} bytes a token and layer, {2 * written:,} or {4 * written:,} of them for groups that are "
            "off"
        )
        found.append({"tokens": tokens, "projection_ms": spent, "bytes_of_a_group": written})
    return found


def whole_layer_rows() -> list[dict[str, Any]]:
    """A whole decoder layer at 32k tokens, as `compress bench` measures it."""
    found = []
    dense = ModelSource("llama-3-8b").layer(DEVICE, BF16)
    for name in ("R75", "R50"):
        planned = with_mix(dense, name, 32768)
        take = partial(model_row, dense, planned, "llama-3-8b, one layer", name, 1, 32768)
        row = attempt(f"layer {name}", model_need(dense, 1, 32768), DEVICE, take, say)
        if row is not None:
            for line in model_lines(row):
                say(line)
            found.append(row.values())
    return found


SECTIONS: dict[str, Callable[[], Any]] = {
    "numerics": numerics,
    "model": model_rows,
    "decode": decode_rows,
    "parts": part_rows,
    "prefill": prefill_rows,
    "short": short_rows,
    "layer": whole_layer_rows,
}


HEAD = (
    "R75 and R50: 75% and 50% of the head groups are on for a token, a quarter of all is chosen; R75h and R50h:",
    "query heads. Weights of routers and tokens are random, so that all choices come up alike",
)


def main() -> None:
    """See `run_sections`."""
    run_sections("gpu_routed", SECTIONS, list(SECTIONS), HEAD)


if __name__ == "__main__":
    main()
