"""The GPU check of heads that keep tokens: every kernel against float64, then time beside dense attention, and bytes.

python scripts/gpu_retain.py [FOLDER] [SECTION ...]     one GPU, under 150 s; `sweep` times launch parameters

A layer of the shape of Llama-3-8B (32 heads in 8 groups of head size 128) keeps an eighth, a quarter and a half of the
tokens before a window of 256. What a figure should be stands beside it, as it was predicted before it was measured; a
bound is the time of the fastest dense attention times the share of its pairs, or of its bytes, that stay. Writes JSON
and a table into the folder.
"""

from __future__ import annotations

import math
import multiprocessing
import sys
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).parents[1]))

from compress.bench import kernel, measure
from compress.bench.dense import dense_attention
from compress.bench.kernel import random_qkv
from compress.models.graph import graph_of
from compress.runtime.attention import plan_attention
from compress.runtime.impl import IMPLS
from compress.runtime.impl_retain import RETAIN_IMPLS
from compress.runtime.mixer import Kinds, LayerFacts
from compress.runtime.mixer_retain import RetainMixer
from compress.runtime.paged_cache import PagedCache
from compress.runtime.reference import Rows
from compress.runtime.span import PAGE, Span
from compress.runtime.step import Step
from compress.targets.retain import RetainGroup
from compress.targets.unit import Unit
from scripts.gpu_check import COLD, LINES, error, poison, run_sections, say
from scripts.gpu_models import HIDDEN, LLAMA, NEURONS
from scripts.gpu_retain_training import training_rows

DEVICE = torch.device("cuda")
BF16, F32 = torch.bfloat16, torch.float32
MOST = {BF16: 6e-3, F32: 1e-5}  # norm of the difference over the norm: one rounding to bfloat16 is .0017
SHARES = (0.125, 0.25, 0.5)
WINDOW = 256
LENGTHS = (8192, 32768, 65536)  # of a prefill
CACHES = ((32768, 1), (131072, 1), (32768, 8))  # tokens of a sequence, and sequences
STEPS = 140  # tokens that are decoded one by one in the numerics, across two pages
Tensors = list[torch.Tensor]


# --- numerics


def groups_of(scorer: str) -> list[RetainGroup]:
    """Three groups: a fixed window, a growing one with a cap, and one with a sink of two pages."""
    make = partial(RetainGroup, scorer=scorer, threshold=0.0, share=0.4)
    return [
        make(sink=4, alpha=70),
        make(sink=0, alpha=1, beta=0.125, cap=(3, 0.25)),
        make(sink=70, alpha=200, cap=(90, 0.0)),
    ]


def trained(mixer: RetainMixer, seed: int = 0) -> None:
    """Random parameters in place of those that judge all tokens alike."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    for parameter in mixer.parameters():
        size = 1.0 if parameter.ndim < 2 or parameter.shape[-1] == 3 else parameter.shape[-1] ** -0.5
        parameter.requires_grad_(False)
        parameter.copy_(size * torch.randn(parameter.shape, device=DEVICE, generator=generator))


def exact_scores(mixer: RetainMixer, key: Any, value: Any, hidden: Any) -> torch.Tensor:
    """What the scorer says of the tokens of one sequence, `[G, T]`, in float64 from the same numbers."""
    place = torch.arange(1, key.shape[1] + 1, device=DEVICE, dtype=torch.float64).log()
    norms = [x.double().norm(dim=-1).log() for x in (key, value)]
    given = {name: parameter.double() for name, parameter in mixer.scorer.named_parameters()}
    if not given:
        return norms[1]
    before = "linear." if "linear.weight" in given else ""
    weight, scalars, bias = (given[before + name] for name in ("weight", "scalars", "bias"))
    found = weight @ hidden.double().T + scalars[:, :1] * place + bias[:, None]
    found += scalars[:, 1:2] * norms[0] + scalars[:, 2:] * norms[1]
    if "into" in given:
        middle = torch.einsum("gwh,th->gtw", given["into"], hidden.double()) + given["into_bias"][:, None]
        found += (torch.nn.functional.gelu(middle) * given["out"][:, None]).sum(-1)
    return found


def exact_layer(mixer: RetainMixer, sequence: Tensors) -> torch.Tensor:
    """Outputs `[H, T, D]` of one sequence by the rule as it is written, in float64."""
    query, key, value, hidden = sequence
    share, tokens, outputs = query.shape[0] // key.shape[0], query.shape[1], []
    scores, at = exact_scores(mixer, key, value, hidden), torch.arange(query.shape[1], device=DEVICE)
    for number, entry in enumerate(mixer.groups):
        span, count, flags = mixer.spans[number], 0, []
        for j, one in enumerate(scores[number].tolist()):
            cap = j + 1 if entry["cap"] is None else entry["cap"][0] + int(entry["cap"][1] * (j + 1))
            chosen = j >= span.sink and one >= mixer.thresholds[number] and count < cap
            count += chosen
            flags.append(chosen or j < span.sink)
        kept = torch.tensor(flags, device=DEVICE)
        seen = (at <= at[:, None]) & (kept | (at >= mixer.windows[number].first(at)[:, None]))
        for head in range(number * share, (number + 1) * share):
            logits = query[head].double() @ key[number].double().T * query.shape[-1] ** -0.5
            outputs.append(logits.masked_fill(~seen, -torch.inf).softmax(-1) @ value[number].double())
    return torch.stack(outputs)[:, :tokens]


def part_thresholds(mixer: RetainMixer, sequences: list[Tensors]) -> None:
    """Thresholds in the widest gaps of scores, of 40 to 60% of tokens, so that no rounding takes a token across."""
    scores = torch.cat([exact_scores(mixer, *one[1:]) for one in sequences], dim=1).sort(dim=1).values
    some = scores[:, int(scores.shape[1] * 0.4) : int(scores.shape[1] * 0.6)]
    place = (some[:, 1:] - some[:, :-1]).argmax(1, keepdim=True)
    mixer.thresholds = tuple(((some.gather(1, place) + some.gather(1, place + 1)) / 2).flatten().tolist())


class Case:
    """A layer on three sequences, two of them padded, whose padding is NaN; and what it gives in float64."""

    def __init__(self, dtype: torch.dtype, dim: int, share: int, columns: int, scorer: str) -> None:
        entries, hidden = [group.model_dump(mode="json") for group in groups_of(scorer)], 192
        self.kinds = Kinds(entries, LayerFacts(0, dim, hidden, share, None))
        mixer = self.kinds.only
        assert isinstance(mixer, RetainMixer)
        self.mixer = mixer.to(DEVICE, dtype)
        trained(self.mixer)
        counts, make = (columns, columns - 77, columns // 2), partial(torch.randn, device=DEVICE)
        self.valid = torch.zeros(len(counts), columns, dtype=torch.bool, device=DEVICE)
        for row, count in enumerate(counts):
            self.valid[row, columns - count :] = True
        self.valid[2, -5:] = False  # and padding behind it
        heads = (share * 3, 3, 3)
        made = [make(3, columns, n, dim).to(dtype).transpose(1, 2) for n in heads] + [
            make(3, columns, hidden).to(dtype)
        ]
        self.sequences = [[x[row][..., self.valid[row], :] for x in made] for row in range(3)]
        part_thresholds(self.mixer, self.sequences)
        self.exact = [exact_layer(self.mixer, one) for one in self.sequences]
        hide = ~self.valid
        self.made = [x.masked_fill(hide[:, None, :, None], torch.nan) for x in made[:3]]
        self.made.append(made[3].masked_fill(hide[..., None], torch.nan))

    def step(self, cache: PagedCache | None, start: int, stop: int) -> torch.Tensor:
        """Outputs `[B, H, T, D]` of the columns from one to the other, behind those before."""
        query, key, value = (x[:, :, start:stop] for x in self.made[:3])
        valid = self.valid[:, start:stop]
        given = None if bool(valid.all()) else valid
        step = Step.begin(cache, given, len(valid), stop - start, DEVICE)
        step.impl, step.hidden = "triton", self.made[3][:, start:stop]
        if cache is not None:
            key, value = cache.update(key, value, 0)
        module: Any = SimpleNamespace(compress_kinds=self.kinds, layer_idx=0)
        out = plan_attention(module, query, key, value, None, compress_step=step)[0].transpose(1, 2)
        step.end()
        return out

    def worst(self, out: torch.Tensor, start: int) -> tuple[float, float]:
        """Largest error of a sequence in the columns from `start` on, and the norm of what should be zero."""
        worst, zeros = 0.0, 0.0
        for row, exact in enumerate(self.exact):
            valid = self.valid[row, start : start + out.shape[2]]
            before = int(self.valid[row, :start].sum())
            zeros += float(out[row][:, ~valid].float().norm())
            if bool(valid.any()):
                worst = max(worst, error(out[row][:, valid], exact[:, before : before + int(valid.sum())]))
        return worst, zeros

    def decode_in_graph(self, start: int, stop: int) -> torch.Tensor:
        """Columns one by one behind a prefill, in a CUDA graph over a reserved cache."""
        columns = self.valid.shape[1]
        cache = PagedCache([self.kinds], columns + 1)
        self.step(cache, 0, start)
        state: Any = cache.paged[0].states[0]
        query, key, value = (x[:, :, start : start + 1].clone() for x in self.made[:3])
        hidden, lengths = self.made[3][:, start : start + 1].clone(), torch.zeros(3, dtype=torch.int32, device=DEVICE)
        held: dict[str, torch.Tensor] = {}

        def one() -> None:
            step = Step(cache, None, None, lengths, None, 1, impl="triton", hidden=hidden)
            held["out"] = self.mixer.decode(query, key, value, state, step, scale=None)

        replay, outputs = graph_of(one), []  # with lengths of 0 the warm-up changes nothing
        for column in range(start, stop):
            for tensor, source in zip((query, key, value), self.made[:3], strict=True):
                tensor.copy_(source[:, :, column : column + 1])
            hidden.copy_(self.made[3][:, column : column + 1])
            counted = self.valid[:, : column + 1].sum(1).int()
            lengths.copy_(torch.where(self.valid[:, column], counted, 0))
            replay()
            outputs.append(held["out"].clone().transpose(1, 2))
        return torch.cat(outputs, dim=2)


def layer_case(dtype: torch.dtype, dim: int, share: int, columns: int, scorer: str) -> list[dict[str, Any]]:
    """One pass, chunks, growing decoding and decoding in a CUDA graph, each against float64."""
    case, rows, tail = Case(dtype, dim, share, columns, scorer), [], columns - STEPS
    name = f"D {dim}, {share} heads a group, {columns} tokens, {scorer}"

    def add(what: str, found: float, most: float) -> None:
        ok = found <= most
        rows.append({"what": f"{what}, {name}", "dtype": str(dtype), "error": found, "most": most, "ok": ok})
        if not ok:
            say(f"  FAILED {what}, {name} in {dtype}: {found:.2e}, and {most:.0e} is allowed")

    poison()
    for what, cache in (("one pass", None), ("one pass, cached", PagedCache([case.kinds]))):
        worst, zeros = case.worst(case.step(cache, 0, columns), 0)
        add(what, worst, MOST[dtype])
        add(f"zeros of {what}", zeros, 0.0)
        if cache is not None:
            add("bytes", float(cache.allocated_bytes() - cache.held_bytes()), 0.0)
    cache, cuts = PagedCache([case.kinds]), sorted({0, 65, tail // 2, tail - 33, tail - 32, *range(tail, columns + 1)})
    out = torch.cat([case.step(cache, a, b) for a, b in pairwise(cuts)], dim=2)
    worst, zeros = case.worst(out[:, :, :tail], 0)
    add("chunks", worst, MOST[dtype])
    add("zeros of chunks", zeros, 0.0)
    add("decode", case.worst(out[:, :, tail:], tail)[0], MOST[dtype])
    add("bytes after chunks and decode", float(cache.allocated_bytes() - cache.held_bytes()), 0.0)
    poison()
    graphed = case.decode_in_graph(tail, columns)
    worst, zeros = case.worst(graphed, tail)
    add("decode in a graph", worst, MOST[dtype])
    add("zeros of decode in a graph", zeros, 0.0)
    add("decode in a graph beside eager", error(graphed, out[:, :, tail:].double()), MOST[dtype] / 2)
    return rows


CASES: list[tuple[Any, ...]] = [
    (BF16, 128, 4, 1501, "ridge"), (BF16, 64, 3, 1003, "value_norm"), (BF16, 80, 1, 777, "ridge"),
    (BF16, 96, 7, 777, "ridge"), (BF16, 256, 2, 777, "value_norm"), (F32, 64, 3, 1003, "ridge"),
    (BF16, 128, 4, 777, "mlp"),
]  # fmt: skip
WIDE: list[tuple[Any, ...]] = [(F32, 128, 4, 777, "value_norm"), (F32, 256, 2, 500, "ridge")]


def numeric_case(case: tuple[Any, ...]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of one case, and the lines that it printed; runs in a process of its own."""
    torch.manual_seed(torch.seed() % 2**32)
    LINES.clear()
    try:
        with torch.no_grad():
            return layer_case(*case), list(LINES)
    except Exception:  # told as a failed check, and the other cases go on
        say(f"  FAILED {case}: {traceback.format_exc()}")
        return [{"what": str(case), "dtype": "", "error": math.inf, "most": 0.0, "ok": False}], list(LINES)


def numerics(cases: list[tuple[Any, ...]] = CASES) -> list[dict[str, Any]]:
    """Every kernel against float64; cases run side by side, as most of their time is the compiler's."""
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(8, mp_context=multiprocessing.get_context("spawn")) as pool:
        for found, lines in pool.map(numeric_case, cases):
            rows += found
            LINES.extend(lines)
    for dtype in dict.fromkeys(case[0] for case in cases):
        own = [row for row in rows if row["dtype"] == str(dtype) and row["most"] > 0]
        bad = sum(not row["ok"] for row in rows if row["dtype"] in ("", str(dtype)))
        worst: dict[str, Any] = max(own, key=lambda row: row["error"] / row["most"], default={})
        say(
            f"numerics in {dtype}: {sum(row['dtype'] == str(dtype) for row in rows)} checks, {bad} failed; the worst "
            f"error is {worst.get('error', math.nan):.1e} of {worst.get('most', math.nan):.0e} "
            f"({worst.get('what', 'no check ran')})"
        )
    return rows


# --- speed


def layer_of(share: float, scorer: str = "ridge", cap: bool = False) -> RetainMixer:
    """A mixer of eight groups whose scorer keeps that share of random tokens."""
    most = (256, min(1.0, math.ceil(share * 1.1 * 1024) / 1024)) if cap else None
    entry = RetainGroup(sink=4, alpha=WINDOW, scorer=scorer, threshold=0.0, share=share, cap=most).model_dump(
        mode="json"
    )
    mixer = RetainMixer([entry] * LLAMA.groups, LayerFacts(0, LLAMA.head_dim, HIDDEN, 4, None)).to(DEVICE, BF16)
    trained(mixer)
    for name, parameter in mixer.scorer.named_parameters():
        if "scalars" in name or "bias" in name:
            parameter.zero_()
    sample = torch.randn(1, 4096, HIDDEN, device=DEVICE, dtype=BF16)
    key = torch.randn(1, LLAMA.groups, 4096, LLAMA.head_dim, device=DEVICE, dtype=BF16)
    scores = mixer.scorer(sample, key, key, torch.arange(4096, device=DEVICE)[None])[0]
    mixer.thresholds = tuple(scores.quantile(1 - share, dim=1).tolist())
    return mixer


def pairs_share(mixer: RetainMixer, kept: torch.Tensor) -> float:
    """Pairs of query and key that are seen over causal pairs, all groups together, from `kept` `[1, G, T]`."""
    length = kept.shape[-1]
    at, found = torch.arange(length, device=DEVICE), 0.0
    for number, window in enumerate(mixer.windows):
        first = window.first(at)
        before = torch.cat([kept.new_zeros(1, dtype=torch.long), kept[0, number].long().cumsum(0)])
        found += float((before[first] + at + 1 - first).double().sum())
    return found / (len(mixer.windows) * length * (length + 1) / 2)


def dense_layer() -> Callable[[torch.Tensor], torch.Tensor]:
    """The matrix products of a layer's projections and MLP."""
    sizes = [(HIDDEN + 2 * LLAMA.groups * LLAMA.head_dim, HIDDEN), (HIDDEN, HIDDEN), (2 * NEURONS, HIDDEN)]
    weights = [torch.randn(size, device=DEVICE, dtype=BF16) * 0.02 for size in [*sizes, (HIDDEN, NEURONS)]]

    def run(hidden: torch.Tensor) -> torch.Tensor:
        for weight in weights[:3]:
            last = linear(hidden, weight)
        return linear(last[..., :NEURONS], weights[3])

    return run


def told(found: Mapping[str, float], expected: Mapping[str, float]) -> str:
    """Figures with what was predicted of them."""
    words = []
    for name, value in found.items():
        guess = f" (predicted {expected[name]:.3g})" if name in expected else ""
        words.append(f"{name} {value:.3g}{guess}")
    return ", ".join(words)


PREFILL = {  # share of the bound that is reached, predicted
    (8192, 0.125): 0.5, (8192, 0.25): 0.67, (8192, 0.5): 0.81, (32768, 0.125): 0.81, (32768, 0.25): 0.93,
    (32768, 0.5): 0.98, (65536, 0.125): 0.85, (65536, 0.25): 0.94, (65536, 0.5): 0.98,
}  # fmt: skip
DECODE = {
    (32768, 0.125): 0.57, (32768, 0.25): 0.74, (32768, 0.5): 0.88, (131072, 0.125): 0.8, (131072, 0.25): 0.89,
    (131072, 0.5): 0.96,
}  # fmt: skip


@torch.inference_mode()
def prefill_rows() -> list[dict[str, Any]]:
    """Attention of one layer in a prefill without a cache, the making of the lists included."""
    found = []
    say("prefill | length, share | ms | dense ms (fastest) | house's ms | pairs | share of the bound (predicted)")
    for length in LENGTHS:
        query, key, value = random_qkv(LLAMA, 1, length, DEVICE, BF16)
        hidden, rows = torch.randn(1, length, HIDDEN, device=DEVICE, dtype=BF16), Rows.whole(1, length)
        calls: dict[str, Callable[[], Any]] = {}
        facts: dict[float, dict[str, Any]] = {}
        impl = RETAIN_IMPLS["triton"]
        for share in SHARES:
            mixer = layer_of(share)
            step = Step(None, rows, None, None, [length], length, impl="triton", hidden=hidden)
            kept = mixer.kept(key, value, None, step)[0]
            facts[share] = {"pairs": pairs_share(mixer, kept), "kept": float(kept.double().mean())}
            attend: Any = partial(impl.prefill, query, key, value, kept, mixer.windows, rows=rows)
            calls[f"{share}"] = attend
            if impl.compact is not None:
                lists = impl.compact(key, value, kept, mixer.windows, rows, None)
                calls[f"{share} attention"] = partial(attend, lists=lists)
        calls["house"] = partial(IMPLS["triton"].prefill, query, key, value, [Span()] * LLAMA.groups)
        dense = dense_attention(query, key, value)
        spent = {n: t.median for n, t in measure.times_in_turn({**calls, **dense}, DEVICE, turns=2).items()}
        fastest = min(spent[name] for name in (*dense, "house"))
        for share in SHARES:
            ms, pairs = spent[f"{share}"], facts[share]["pairs"]
            reached = fastest * pairs / ms
            tflops = 4 * LLAMA.query_heads * LLAMA.head_dim * pairs * length * (length + 1) / 2 / ms / 1e9
            alone = spent.get(f"{share} attention", ms)
            say(
                f"prefill | {length:,}, {share} | {ms:.3f} | {fastest:.3f} | {spent['house']:.3f} | {pairs:.3f} | "
                f"{reached:.2f} ({PREFILL.get((length, share))}); {tflops:.0f} TFLOP/s; of the house's kernel "
                f"{spent['house'] * pairs / ms:.2f}; attention alone {alone:.3f}"
            )
            found.append(
                {"length": length, "share": share, "ms": spent, "reached": reached, "tflops": tflops, **facts[share]}
            )
        calls.clear()
        measure.release(DEVICE)
    from scripts.gpu_retain_sweep import short_prefill  # which needs what is here

    return found + short_prefill()


class Decoding:
    """A decode step of one layer, with reserved caches of random numbers that are as full as the groups expect."""

    def __init__(self, mixer: RetainMixer, batch: int, length: int, copies: int) -> None:
        make = partial(torch.randn, device=DEVICE, dtype=BF16)
        self.mixer, self.batch, self.copies = mixer, batch, copies
        self.query = make(batch, LLAMA.query_heads, 1, LLAMA.head_dim)
        self.key, self.value = make(2, batch, LLAMA.groups, 1, LLAMA.head_dim)
        self.hidden = make(batch, 1, HIDDEN)
        self.lengths = torch.full((batch,), length, dtype=torch.int32, device=DEVICE)
        self.states = [mixer.state(length + PAGE) for _ in range(copies)]
        for state in self.states:
            state.begin(self.key, self.value)
            for pool in (state.keys, state.values):
                assert pool is not None
                pool.normal_()
            assert state.kept is not None
            state.kept.copy_(torch.rand(state.kept.shape, device=DEVICE) < mixer.groups[0]["share"])
            state.assume(length - 1)
        self.listed = [state.tensors["listed"].clone() for state in self.states]

    def tokens_read(self) -> int:
        """Keys that a step reads, of all sequences and groups of one cache."""
        length = int(self.lengths[0])
        windows = sum(length - window.first(length - 1) for window in self.mixer.windows)
        return int(self.listed[0].sum()) + self.batch * windows

    def step(self) -> torch.Tensor:
        """All of it, in every cache: judge, count, make room, store, attend; what the last gives."""
        for state in self.states:
            given = Step(None, None, None, self.lengths, None, 1, impl="triton", hidden=self.hidden)
            out = self.mixer.decode(self.query, self.key, self.value, state, given, scale=None)
        return out

    def again(self) -> None:
        """The same from the lists as they were, for a step in which a page leaves the windows."""
        for state, listed in zip(self.states, self.listed, strict=True):
            state.tensors["listed"].copy_(listed)
        self.step()

    def attend(self) -> torch.Tensor:
        """The attention alone."""
        for state in self.states:
            out = RETAIN_IMPLS["triton"].decode(self.query[:, :, 0], state.pages(), self.lengths, self.mixer.windows)
        return out

    def store(self) -> None:
        """The store of the token alone, as heads with a window have it."""
        for state in self.states:
            window = state.window()
            key, value = self.key[:, :, 0], self.value[:, :, 0]
            IMPLS["triton"].store_one(key, value, window, self.lengths, self.mixer.windows)

    def us(self, call: Callable[[], Any]) -> float:
        """Microseconds of one cache's part of a call, in a CUDA graph."""
        calls = max(1, 16 // self.copies)
        return measure.graphed_times(call, DEVICE, calls=calls, seconds=0.1).median * 1e3 / self.copies


def dense_decode(batch: int, length: int) -> dict[str, float]:
    """Microseconds of dense decoding by the kernels of the house and of PyTorch, out of caches that no chip keeps."""
    query = torch.randn(batch, LLAMA.query_heads, 1, LLAMA.head_dim, device=DEVICE, dtype=BF16)
    lengths, spans = torch.full((batch,), length, dtype=torch.int32, device=DEVICE), [Span()] * LLAMA.groups
    one = 2 * batch * LLAMA.groups * length * LLAMA.head_dim * 2
    copies = max(1, COLD // one)
    pools = [kernel.random_pages(spans, batch, length, LLAMA.head_dim, DEVICE, BF16) for _ in range(copies)]
    house = lambda: [IMPLS["triton"].decode(query[:, :, 0], pages, lengths, spans) for pages in pools]  # noqa: E731
    found = {"house": measure.graphed_times(house, DEVICE, calls=8, seconds=0.1).median * 1e3 / copies}
    pools.clear()
    size = (2, batch, LLAMA.groups, length, LLAMA.head_dim)
    calls = [dense_attention(query, *torch.randn(size, device=DEVICE, dtype=BF16)) for _ in range(copies)]
    for name in calls[0]:
        each = lambda n=name: [some[n]() for some in calls]  # noqa: E731
        found[name] = measure.graphed_times(each, DEVICE, calls=4, seconds=0.1).median * 1e3 / copies
    return found


@torch.inference_mode()
def decode_rows() -> list[dict[str, Any]]:
    """A decode step of one layer out of caches that no chip keeps: its attention alone, and all of it."""
    copy = measure.copy_bandwidth(DEVICE)
    found = []
    say(f"decode, in CUDA graphs; a device copy moves {copy / 1e9:.0f} GB/s")
    say("decode | length, batch, share | attention us | dense us (fastest) | house's us | bytes | share of the bound "
        "(predicted), of the copy's speed | whole step us, when a page leaves")  # fmt: skip
    for length, batch in CACHES:
        dense = dense_decode(batch, length)
        fastest = min(dense.values())
        measure.release(DEVICE)
        for share in SHARES:
            expected = round(batch * LLAMA.groups * length * share * LLAMA.head_dim * 4)
            one = Decoding(layer_of(share, cap=True), batch, length, max(1, min(16, COLD // expected)))
            size = one.tokens_read() * LLAMA.head_dim * 4
            part = one.tokens_read() / (batch * LLAMA.groups * length)
            attention, whole = one.us(one.attend), one.us(one.step)
            one.lengths -= PAGE - 1  # the first token of a page
            leaving = one.us(one.again)
            reached = fastest * part / attention
            guess = DECODE.get((length, share)) if batch == 1 else 0.9
            say(
                f"decode | {length:,}, {batch}, {share} | {attention:.1f} | {fastest:.1f} | {dense['house']:.1f} | "
                f"{size / 2**20:.0f} MiB, {part:.3f} | {reached:.2f} ({guess}), {size / attention / copy * 1e6:.2f} | "
                f"{whole:.1f}, {leaving:.1f}"
            )
            found.append(
                {"length": length, "batch": batch, "share": share, "attention_us": attention, "dense_us": dense,
                 "bytes": size, "part": part, "reached": reached, "step_us": whole, "leaving_us": leaving}
            )  # fmt: skip
            del one
            measure.release(DEVICE)
    return found


def write_all(mixer: RetainMixer, key: torch.Tensor, value: torch.Tensor, kept: torch.Tensor, rows: Rows) -> None:
    """Compact what leaves the windows in a prefill, and write all that stays into a growing cache."""
    retain, state, lists = RETAIN_IMPLS["triton"], mixer.state(None), None
    state.begin(key, value)
    if retain.compact is not None:
        lists = retain.compact(key, value, kept, mixer.windows, rows, None)
    state.write(key, value, kept, rows, IMPLS["triton"].store, lists, retain.append)


def written_again(mixer: RetainMixer, key: torch.Tensor, value: torch.Tensor, kept: torch.Tensor, rows: Rows) -> Any:
    """The same into a reserved cache that is taken for empty each time, so that a CUDA graph can hold it."""
    retain: Any = RETAIN_IMPLS["triton"]
    state = mixer.state(key.shape[2])
    state.begin(key, value)

    def write() -> None:
        state.lengths = [0]
        state.tensors["listed"].zero_()
        lists = retain.compact(key, value, kept, mixer.windows, rows, None)
        state.write(key, value, kept, rows, IMPLS["triton"].store, lists, retain.append)

    return write


CYCLES = 1.7e6  # of an H100 in a millisecond
LAYERS = 4  # that follow each other where it is measured what a cache adds to a layer of a prefill


def layers(mixer: RetainMixer, made: Tensors, matrices: float, reserve: int | None) -> Any:
    """Layers of a prefill: all that the mixer does, into caches where `reserve` is not 0, and a pause for the matrices.

    A pause of as many milliseconds, since products heat the chip, and then vary by more than a cache adds.
    """
    query, key, value, hidden = made
    length = key.shape[2]
    rows = Rows.whole(1, length)
    step = Step(None, rows, None, None, [length], length, impl="triton", hidden=hidden)
    reserved = [mixer.state(reserve) for _ in range(LAYERS)] if reserve else None
    for state in reserved or ():
        state.begin(key, value)

    def all_layers() -> None:
        for number in range(LAYERS):
            torch.cuda._sleep(int(matrices * CYCLES))
            state = None
            if reserved is not None:
                state = reserved[number]
                state.lengths = [0]
                state.tensors["listed"].zero_()
                state.tensors["count"].zero_()
            elif reserve is None:
                state = mixer.state(None)
                state.begin(key, value)
            mixer.prefill(query, key, value, state, step, scale=None, dropout=0.0)

    return all_layers


SCORER = {  # predicted percent of a layer that judging and counting take, in a prefill and in a decode step (1)
    ("ridge", 8192): 1.2, ("ridge", 32768): 0.7, ("ridge", 65536): 0.6, ("mlp", 8192): 1.9, ("mlp", 32768): 1.8,
    ("mlp", 65536): 1.6, ("ridge", 1): 0.5, ("mlp", 1): 1.9, ("value_norm", 1): 0.4,
}  # fmt: skip
CACHED = {8192: 3.0, 32768: 0.6, 65536: 0.4}  # predicted percent of a layer that a growing cache adds


@torch.inference_mode()
def part_rows() -> list[dict[str, Any]]:
    """What judging, counting and compacting take of a layer: of a prefill with a cache, and of a decode step."""
    found: list[dict[str, Any]] = []
    run = dense_layer()
    retain: Any = RETAIN_IMPLS["triton"]
    for length in LENGTHS:
        query, key, value = random_qkv(LLAMA, 1, length, DEVICE, BF16)
        hidden, rows = torch.randn(1, length, HIDDEN, device=DEVICE, dtype=BF16), Rows.whole(1, length)
        step = Step(None, rows, None, None, [length], length, impl="triton", hidden=hidden)
        for scorer in ("ridge", "mlp"):
            mixer = layer_of(0.125, scorer, cap=True)
            kept = mixer.kept(key, value, None, step)[0]

            alone: dict[str, Callable[[], Any]] = {
                "judge": partial(mixer.judge, key, value, step),
                "judge and count": partial(mixer.kept, key, value, None, step),
                "compact": partial(retain.compact, key, value, kept, mixer.windows, rows, None),
                "compact and write": written_again(mixer, key, value, kept, rows),
            }
            calls: dict[str, Callable[[], Any]] = {
                "judge and count by the host": alone["judge and count"],
                "compact and write by the host": partial(write_all, mixer, key, value, kept, rows),
                "attention": partial(retain.prefill, query, key, value, kept, mixer.windows, rows=rows),
                "matrices": partial(run, hidden),
            }
            spent = {n: measure.graphed_times(c, DEVICE, calls=4, seconds=0.05).median for n, c in alone.items()}
            spent |= {n: t.median for n, t in measure.times_in_turn(calls, DEVICE, turns=1).items()}
            layer = spent["matrices"] + spent["attention"] + spent["judge and count"]
            percent = {name: 100 * spent[name] / layer for name in alone}
            say(
                f"parts of a prefill of {length:,}, {scorer}, ms: {told(spent, {})}; % of the layer: "
                + told(percent, {"judge and count": SCORER.get((scorer, length), math.nan)})
            )
            found.append({"length": length, "scorer": scorer, "ms": spent, "percent": percent})
        mixer, made = layer_of(0.125, cap=True), [query, key, value, hidden]
        ways = {"no cache": 0, "a growing cache": None, "a reserved cache": length}
        each = {name: layers(mixer, made, spent["matrices"], reserve) for name, reserve in ways.items()}
        spent = {n: t.median / LAYERS for n, t in measure.times_in_turn(each, DEVICE, turns=2).items()}
        more = {name: 100 * (spent[name] / spent["no cache"] - 1) for name in list(ways)[1:]}
        say(
            f"a whole layer of a prefill of {length:,}, ridge, {LAYERS} in a row, a pause for the matrices, "
            f"ms: {told(spent, {})}; % more with {told(more, {'a growing cache': CACHED[length]})}"
        )
        found.append({"length": length, "layer": spent, "more": more})
        for some in (alone, calls, each):
            some.clear()
        measure.release(DEVICE)
    hidden = torch.randn(1, 1, HIDDEN, device=DEVICE, dtype=BF16)
    matrices = measure.graphed_times(partial(run, hidden), DEVICE, calls=8, seconds=0.1).median * 1e3
    for scorer in ("ridge", "mlp", "value_norm"):
        one = Decoding(layer_of(0.125, scorer, cap=True), 1, 32768, 4)
        attention, whole = one.us(one.attend), one.us(one.step)
        store = one.us(one.store)
        percent = {"judge and count": 100 * (whole - attention - store) / (matrices + whole)}
        say(
            f"parts of a decode step at 32,768, {scorer}, us: attention {attention:.1f}, all {whole:.1f}, a store "
            f"alone {store:.1f}, matrices {matrices:.1f}; % of the layer: "
            + told(percent, {"judge and count": SCORER[scorer, 1]})
        )
        found.append(
            {"scorer": scorer, "attention_us": attention, "step_us": whole, "store_us": store, "matrices_us": matrices}
            | percent
        )
    return found


@torch.inference_mode()
def byte_rows() -> list[dict[str, Any]]:
    """Bytes allocated beside those that the rule holds: growing caches after a prefill, chunks and steps."""
    found = []
    for share in SHARES:
        mixer = layer_of(share)
        kinds = Kinds(list(mixer.groups), mixer.facts)
        assert isinstance(kinds.only, RetainMixer)
        kinds.only.to(DEVICE, BF16).load_state_dict(mixer.state_dict())
        kinds.only.thresholds = mixer.thresholds
        cache, length = PagedCache([kinds]), 0
        measure.release(DEVICE)
        before, state = torch.cuda.memory_allocated(), cache.paged[0].states[0]
        for count in (16384, 8192, 8003, *[1] * 140):
            hidden = torch.randn(1, count, HIDDEN, device=DEVICE, dtype=BF16)
            query, key, value = random_qkv(LLAMA, 1, count, DEVICE, BF16)
            step = Step.begin(cache, None, 1, count, DEVICE)
            step.impl, step.hidden = "triton", hidden
            key, value = cache.update(key, value, 0)
            module: Any = SimpleNamespace(compress_kinds=kinds, layer_idx=0)
            plan_attention(module, query, key, value, None, compress_step=step)
            step.end()
            length += count
        del query, key, value, hidden, step
        measure.release(DEVICE)
        taken = torch.cuda.memory_allocated() - before
        held, allocated = state.held_bytes(), cache.allocated_bytes()
        dense = 2 * LLAMA.groups * length * LLAMA.head_dim * 2
        unit = Unit(LLAMA.query_heads // LLAMA.groups, LLAMA.head_dim)
        plan = sum(RetainGroup.model_validate(entry).cost(unit, length).held_bytes for entry in mixer.groups)
        say(
            f"bytes at {length:,}, share {share}: allocated {allocated:,}, held by the rule {held:,} "
            f"({'EQUAL' if allocated == held else 'NOT EQUAL'}), the allocator's {taken:,}; {held / dense:.3f} of "
            f"dense, the plan expects {plan / dense:.3f}"
        )
        found.append({"share": share, "allocated": allocated, "held": held, "allocator": taken, "dense": dense})
    return found


def sweep(name: str = "") -> list[dict[str, Any]]:
    """Candidates of launch parameters, of all kernels or of those of that name; see `gpu_retain_sweep`."""
    from scripts.gpu_retain_sweep import sweep_rows  # which needs what is here

    return sweep_rows(name)


SECTIONS: dict[str, Callable[[], Any]] = {
    "numerics": numerics,
    "bytes": byte_rows,
    "prefill": prefill_rows,
    "decode": decode_rows,
    "parts": part_rows,
    "training": training_rows,
    "wide": partial(numerics, WIDE),  # minutes of a compiler, so only where it is named, as what follows
    "sweep": sweep,
    **{f"sweep of {name}": partial(sweep, name) for name in ("decode", "prefill", "judge", "count", "compact", "step")},
}
HEAD = (f"a sink of one page, a window of {WINDOW} tokens by whole pages, and a share of the tokens before it",)


def main() -> None:
    """See `run_sections`."""
    run_sections("gpu_retain", SECTIONS, ("numerics", "bytes", "prefill", "decode", "parts"), HEAD)


if __name__ == "__main__":
    main()
