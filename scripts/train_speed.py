"""How fast `recover` trains all weights with distillation on a GPU, and what each of its means gives.

python scripts/train_speed.py [FOLDER] [--seconds 140] [--length 8192] [--micro 4] [--steps 5]     one GPU

A model of SmolLM2-135M's shape with random weights, nothing to download; row `a` has linear heads alone and `dense`
none. Every variant trains a few steps on the same tokens, so the losses of one row have to agree to rounding. A variant
that fails is told and stops no other; those that the time does not allow are left out. Writes JSON and, of the last
variant of each row, the kernels of one step into the folder.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import statistics
import sys
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))

from compress.models.planned import planned_model
from compress.models.shape import shape_of
from compress.plan.build import uniform_plan
from compress.targets.linear import LinearGroup
from compress.train import token_losses
from compress.train.recovery import recover
from compress.train.settings import RecoverSettings
from scripts.gpu_check import attempt
from scripts.gpu_models import VOCABULARY, smollm2_shape

# name: layers are recomputed, losses by kernels, layers compiled
VARIANTS: dict[str, tuple[bool | None, bool, bool]] = {
    "before": (True, False, False),
    "kept": (None, False, False),
    "kept, losses": (None, True, False),
    "kept, losses, compiled": (None, True, True),
    "losses, compiled": (True, True, True),
}
ORDER = (
    *(("a", name) for name in ("before", "kept", "kept, losses", "kept, losses, compiled")),
    *(("dense", name) for name in ("before", "kept, losses", "kept, losses, compiled")),
    *(("a", "losses, compiled"), ("dense", "kept"), ("dense", "losses, compiled")),
)
PROFILED = "kept, losses, compiled"


def main() -> None:
    """Train every row in every variant, and print the table."""
    began = time.perf_counter()
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, default=Path(tempfile.mkdtemp()))
    parser.add_argument("--seconds", type=float, default=140)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    dense = smollm2_shape()
    text = torch.randint(0, VOCABULARY, (20 * options.length,), generator=torch.Generator().manual_seed(0)).tolist()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, ready after {since(began)} s", flush=True)
    found: dict[str, dict[str, Any]] = {}
    for row, name in ORDER:
        if time.perf_counter() - began > options.seconds:
            print(f"{row} {name}: no time left", flush=True)
            continue
        key = f"{row}: {name}"
        work = partial(measured, dense, row, name, text, options)
        attempt(found, key, work, partial(line, key, found), options.folder)
    print(f"\n{'':28}  ms/step  tokens/s  faster  peak GB  compiled s  losses of the first steps")
    for key, each in found.items():
        print(line(key, found, each))
    print(f"all after {since(began)} s")
    (options.folder / "train_speed.json").write_text(json.dumps(found, indent=1))


def measured(dense: Any, row: str, name: str, text: list[int], options: Any) -> dict[str, Any]:
    """One variant of a row: milliseconds a step, peak bytes, losses, seconds of compilation."""
    recomputed, kernels, compiled = VARIANTS[name]
    torch.manual_seed(0)
    if row == "dense":
        model = copy.deepcopy(dense)
        with torch.no_grad():  # or there is nothing to learn
            for weight in model.parameters():
                weight.add_(0.01 * torch.randn_like(weight))
    else:
        linear = LinearGroup(map="hedgehog", sink=4, alpha=64)
        model = planned_model(dense, uniform_plan(shape_of(dense), linear), untrained=True)
    settings = RecoverSettings(
        train="full",
        loss="distill",
        length=options.length,
        batch_size=2 * options.micro,
        micro_batch=options.micro,
        steps=options.steps,
        rate=3e-4,
        checkpointing=recomputed,
        compile=compiled,
    )
    times: list[float] = []
    lines: list[str] = []
    profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) if name == PROFILED else None

    def progress(done: int, total: int, what: str) -> None:
        lines.append(what)
        if done == 0:
            return
        times.append(time.perf_counter())
        if done == 1:
            torch.cuda.reset_peak_memory_stats()  # without what was claimed ahead
        if profiler is not None and done == total - 1:
            profiler.__enter__()

    folder = Path(tempfile.mkdtemp())
    began = time.perf_counter()
    reason = None if kernels else "switched off"
    refusal = token_losses.refusal if kernels else lambda *_: reason
    with mock.patch.object(token_losses, "refusal", refusal):
        recover(model, settings, text, folder, teacher=dense, progress=progress)
    peak = torch.cuda.max_memory_allocated()
    if profiler is not None:
        torch.cuda.synchronize()
        profiler.__exit__(None, None, None)
        table = profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=80)
        (options.folder / f"kernels-{row}.txt").write_text(table)
    gaps = [1000 * (b - a) for a, b in pairwise(times)]
    gaps = gaps[:-1] if profiler is not None else gaps  # the last step was profiled
    curve = [json.loads(each) for each in (folder / "loss.jsonl").read_text().splitlines()]
    seconds = [float(part) for each in lines for part in re.findall(r"compiled decoder layers in (\d+) s", each)]
    return {
        "step_ms": statistics.median(gaps),
        "tokens": 2 * options.micro * options.length,
        "peak": peak,
        "distill": [each["distill_loss"] for each in curve],
        "text": [each["text_loss"] for each in curve],
        "compiled_s": seconds[0] if seconds else None,
        "said": [each for each in lines if "compile" in each],
        "losses_refused": token_losses.refusal(torch.device("cuda", 0), torch.bfloat16) if kernels else None,
        "seconds": time.perf_counter() - began,
    }


def line(key: str, found: dict[str, Any], each: dict[str, Any]) -> str:
    """A row of the table."""
    if "error" in each:
        return f"{key:28}  {each['error'][:90]}"
    first = found.get(f"{key.split(':')[0]}: before", {}).get("step_ms")
    faster = f"{first / each['step_ms']:.2f}" if first else "-"
    losses = " ".join(f"{loss:.5g}" for loss in each["distill"][:4])
    compiled = "-" if each["compiled_s"] is None else f"{each['compiled_s']:.0f}"
    refused = f"  LOSSES IN PLAIN PYTORCH: {each['losses_refused']}" if each["losses_refused"] else ""
    return (
        f"{key:28}  {each['step_ms']:7.0f}  {1000 * each['tokens'] / each['step_ms']:8,.0f}  {faster:>6}  "
        f"{each['peak'] / 2**30:7.1f}  {compiled:>10}  {losses} | text {each['text'][0]:.5f} {each['text'][-1]:.5f}"
        f"{refused}"
    )


def since(began: float) -> str:
    """Seconds since then."""
    return f"{time.perf_counter() - began:.0f}"


if __name__ == "__main__":
    main()
