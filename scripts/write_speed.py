"""How fast a model writes text on a GPU (`source: generated`), documents of two lengths, and where a step's time goes.

python scripts/write_speed.py [FOLDER] [--seconds 60] [--lengths 2048,8192] [--tokens 4000000]     one GPU

A model of SmolLM2-135M's shape with random weights, nothing to download. First it checks that a replayed CUDA graph
writes what steps by themselves write, most likely tokens and drawn ones, to the last token. A step's time is measured
at four places of documents of every length, from which the time of all tokens follows because it grows linearly with
the place. What was measured on an H100 is printed beside. Writes JSON and the kernels of one step into the folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))

from compress.data import sampled
from compress.data.generated import GeneratedText
from compress.models.graph import graph_of
from compress.models.shape import shape_of
from compress.runtime import reference, triton_decode, tuned
from compress.runtime.pages import Pages
from compress.runtime.span import PAGE, Span
from scripts.gpu_check import attempt, error
from scripts.gpu_models import VOCABULARY, smollm2_shape

PLACES = (1 / 8, 3 / 8, 5 / 8, 7 / 8)
STEPS = 12  # at each place
MEASURED = {2048: 69_801, 8192: 20_114}  # tokens a second on an H100, torch 2.11, four million tokens
KINDS = {
    "attention": ("_decode", "_store"),
    "joining": ("_join", "_count"),
    "products": ("gemm", "nvjet", "cutlass", "cublas", "splitK"),
    "vocabulary": ("softmax", "SoftMax", "scan", "Scan", "searchsorted", "argmax", "ArgMax", "index_fill"),
}


def main() -> None:
    """Check, measure, and print the table."""
    began = time.perf_counter()
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, default=Path(tempfile.mkdtemp()))
    parser.add_argument("--seconds", type=float, default=60, help="start nothing more after so many")
    parser.add_argument("--lengths", default="2048,8192")
    parser.add_argument("--tokens", type=int, default=4_000_000, help="that are to be written")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    loaded = made()
    free = torch.cuda.mem_get_info()[0] / 2**30
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {free:.0f} GiB free", flush=True)
    found: dict[str, Any] = {}
    works: list[tuple[str, Callable[[], Any]]] = [("check", partial(check, loaded))]
    for length in map(int, options.lengths.split(",")):
        works.append((f"{length} tokens", partial(measured, loaded, length, options)))
    for name, work in works:
        if time.perf_counter() - began > options.seconds:
            print(f"{name}: no time left", flush=True)
            continue
        attempt(found, name, work, partial(line, name), options.folder)
    print(f"all after {time.perf_counter() - began:.0f} s")
    (options.folder / "write_speed.json").write_text(json.dumps(found, indent=1))


def made() -> Any:
    """Random weights of SmolLM2-135M's shape, as `load` gives a model, with a tokenizer of as many words."""
    model = smollm2_shape(end=2)
    return SimpleNamespace(model=model, shape=shape_of(model), tokenizer=Words())


class Words:
    """What the writer asks a tokenizer for: words that are their numbers, the first three of them special."""

    all_special_ids = (0, 1, 2)
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}
    eos_token_id = 2

    def get_vocab(self) -> dict[str, int]:
        return {f"w{number}": number for number in range(VOCABULARY)}

    def batch_decode(self, rows: list[list[int]]) -> list[str]:
        return [f" w{row[0]}" for row in rows]

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": []}


def check(loaded: Any) -> dict[str, Any]:
    """Whether graph and single steps write the same tokens, most likely and drawn, and the error of attention where
    pages are counted ahead."""
    found: dict[str, Any] = {"attention": attention_error()}
    seeds = [f"0/calibration/{number}" for number in range(200)]  # more than what programs find by themselves
    for what, greedy in (("most likely", 1024), ("drawn", 4)):
        request = GeneratedText(tokens=10**6, length=80, greedy=greedy)
        writer = sampled._Writer(loaded, request)
        replayed = writer.write(seeds, lambda done: None)
        with mock.patch.object(sampled, "takes_graphs", lambda model: False):
            single = writer.write(seeds, lambda done: None)
        agree = float((replayed == single).float().mean())
        if agree != 1:
            print(f"GRAPH AND SINGLE STEPS DIFFER: {what}, {agree:.4f} of the tokens agree", flush=True)
        found[f"{what}: graph = steps"] = agree
    return found


def attention_error() -> float:
    """Error of decoding 300 sequences of all lengths, whose pages are counted ahead, against plain PyTorch in float32:
    norm of the difference over the norm."""
    batch, groups, share, numbers, dim = 300, 3, 3, 8, 64
    spans = [Span(), Span(sink=4, alpha=100, beta=0.0), Span()]
    table = torch.randperm(batch * groups * numbers, device="cuda").view(batch, groups, numbers).int()
    keys, values = torch.randn(2, table.numel(), PAGE, dim, device="cuda").bfloat16()
    lengths = torch.randint(0, numbers * PAGE + 1, (batch,), dtype=torch.int32, device="cuda")
    query = torch.randn(batch, groups * share, dim, device="cuda").bfloat16()
    made = triton_decode.decode(query, Pages(keys, values, table), lengths, spans)
    exact = reference.decode(query.float(), Pages(keys.float(), values.float(), table), lengths, spans)
    found = error(made, exact)
    if not found < 1e-2:
        print(f"ATTENTION IS WRONG WHERE PAGES ARE COUNTED AHEAD: error {found:.4f}", flush=True)
    return found


def measured(loaded: Any, length: int, options: Any) -> dict[str, Any]:
    """Documents at once, milliseconds of a step at every place, and what they come to; the kernels of one step."""
    with torch.inference_mode():
        request = GeneratedText(tokens=options.tokens, length=length)
        writer = sampled._Writer(loaded, request)
        count = -(-options.tokens // length)
        batch = sampled.alike(count, writer.at_once)
        began = time.perf_counter()
        documents = sampled._Documents(
            writer.model, writer.vocabulary, request, writer.device, [f"0/calibration/{n}" for n in range(batch)]
        )
        documents.begin()
        replay = documents.captured()
        torch.cuda.synchronize()
        ready = time.perf_counter() - began
        step_ms = []
        for place in PLACES:
            documents.go_to(int(place * length))
            spent = []
            for _ in range(STEPS):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                replay()
                end.record()
                torch.cuda.synchronize()
                spent.append(start.elapsed_time(end))
            step_ms.append(statistics.median(spent))
        documents.go_to(length // 2)
        attention = reading(documents, batch, length // 2)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            documents.step()
            torch.cuda.synchronize()
        table = profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=50, max_name_column_width=90)
        (options.folder / f"kernels-{length}.txt").write_text(table)
        kernels = Counter[str]()
        for event in profiler.key_averages():
            if event.self_device_time_total:
                kind = next((k for k, parts in KINDS.items() if any(part in event.key for part in parts)), "others")
                kernels[kind] += event.self_device_time_total
        mean = statistics.mean(step_ms)
        cache = documents.cache.allocated_bytes()
    # What is left in a last batch takes a step as long as a full one, about.
    batches = -(-count // batch)
    seconds = batches * (length - 2) * mean / 1e3
    return {
        "batch": batch,
        "batches": batches,
        "step_ms": step_ms,
        "mean_ms": mean,
        "full_batch_tokens_s": 1e3 * batch / mean,
        "tokens_s": options.tokens / (seconds + ready * batches),
        "measured before": MEASURED.get(length),
        "ready_s": ready,
        "cache_gb": cache / 1e9,
        "half_cache_tb_s": cache / 2 / mean / 1e9,
        "attention_tb_s": attention,
        "kernels_ms_half_way": {kind: us / 1e3 for kind, us in kernels.most_common()},
    }


def reading(documents: Any, batch: int, held: int) -> dict[str, float]:
    """Terabytes a second at which one layer's attention reads its cache behind so many tokens, by programs a
    multiprocessor of its launch."""
    layer = documents.model.model.layers[0].self_attn
    (state,), (mixer,) = documents.cache.paged[0].states, layer.compress_kinds.mixers
    config = layer.config
    query = torch.randn(batch, config.num_attention_heads, config.head_dim, device="cuda", dtype=torch.bfloat16)
    lengths = torch.full((batch,), held, dtype=torch.int32, device="cuda")
    size = 2 * batch * config.num_key_value_heads * held * config.head_dim * query.itemsize
    processors, found = torch.cuda.get_device_properties(0).multi_processor_count, {}
    configured = tuned.decode_config
    for programs in (2, 3, 4, 5):
        changed = {"programs": programs * processors}
        with mock.patch.object(triton_decode, "decode_config", lambda *args, c=changed: configured(*args) | c):
            replay = graph_of(lambda: triton_decode.decode(query, state.pages(), lengths, mixer.fixed), 20)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            replay()
            start.record()
            replay()
            end.record()
            torch.cuda.synchronize()
        found[str(programs)] = 20 * size / start.elapsed_time(end) / 1e9
    return found


def line(name: str, each: dict[str, Any]) -> str:
    """One line of the table."""
    if "mean_ms" not in each:
        return f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in each.items())
    kinds = ", ".join(f"{kind} {ms:.2f}" for kind, ms in each["kernels_ms_half_way"].items())
    read = ", ".join(f"{programs}: {speed:.2f}" for programs, speed in each["attention_tb_s"].items())
    return (
        f"{name}: {each['tokens_s']:,.0f} tokens/s (measured before: {each['measured before'] or 0:,}), "
        f"{each['full_batch_tokens_s']:,.0f} in full batches; {each['batches']} batches of {each['batch']}, "
        f"{each['mean_ms']:.2f} ms a step ({', '.join(f'{ms:.2f}' for ms in each['step_ms'])}), "
        f"cache {each['cache_gb']:.1f} GB at {each['half_cache_tb_s']:.2f} TB/s, by attention alone with so many "
        f"programs a multiprocessor {read}; ms of kernels half-way: {kinds}; "
        f"ready after {each['ready_s']:.1f} s"
    )


if __name__ == "__main__":
    main()
