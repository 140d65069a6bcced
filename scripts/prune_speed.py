#!/usr/bin/env python3
"""Prefill and decode time of a natively pruned model over the dense one, in one process, beside the parameter ratio.

    python -m scripts.prune_speed --shape llama-3-8b --keep 0.7 --batch 8 --length 2048

Weights are drawn: times do not depend on them. Widths are those of solver `amp`. Medians; dense and pruned by turns.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import transformers

from compress.models.pruning import Kept, block_parameters
from compress.search.amp import Amp
from compress.search.budget import Budget
from compress.search.prune import pruning_problem, random_candidate
from compress.targets.apply import planned_model

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


class Nothing:
    """A profile without scores: only widths matter here."""

    lengths = ()

    def tensor(self, key: str) -> torch.Tensor:
        """There is none."""
        raise KeyError(key)


@torch.inference_mode()
def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = transformers.LlamaConfig(**SHAPES[options.shape], max_position_embeddings=8192, head_dim=None)
    with torch.device(device):
        dense = transformers.LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    problem = pruning_problem(dense, Nothing(), Budget(parameters=options.keep))
    solver = Amp()
    count = min(round((1 - options.keep) * problem.shape.kv_heads), problem.shape.kv_heads - 1)
    widths = solver.widths(problem, count)
    if widths is None:
        raise SystemExit("no such widths")
    like = [Kept(tuple(range(widths.groups)), tuple(range(widths.neurons)))] * problem.shape.layers
    candidate = random_candidate(problem, like, 0)
    pruned = planned_model(dense, candidate.to_plan(problem, {}))
    ids = torch.randint(0, config.vocab_size, (options.batch, options.length), device=device)
    models = {"dense": dense, "pruned": pruned}
    prefill = {
        name: _times(partial(model.model, ids, use_cache=False), options.repeats, device)
        for name, model in models.items()
    }
    decode = {name: _decode(model, ids, options.steps, device) for name, model in models.items()}
    total = {name: sum(weight.numel() for weight in model.parameters()) for name, model in models.items()}
    row: dict[str, Any] = {
        "shape": options.shape,
        "batch": options.batch,
        "length": options.length,
        "dtype": str(dtype),
        "kept": {"groups": widths.groups, "neurons": widths.neurons},
        "block_parameter_ratio": block_parameters(pruned) / block_parameters(dense),
        "parameter_ratio": total["pruned"] / total["dense"],
        "prefill_ms": prefill,
        "prefill_ratio": prefill["pruned"] / prefill["dense"],
        "decode_ms": decode,
        "decode_ratio": decode["pruned"] / decode["dense"],
        "machine": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(row))


def _wait(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _times(run: Callable[[], Any], repeats: int, device: str) -> float:
    """Median milliseconds, after one run that does not count."""
    run()
    found = []
    for _ in range(repeats):
        started = _wait(device)
        run()
        found.append(1000 * (_wait(device) - started))
    return median(found)


def _decode(model: Any, ids: torch.Tensor, steps: int, device: str) -> float:
    """Median milliseconds of a step of the whole batch behind `ids`, with transformers' own cache."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    name = "cache" if "cache" in model.model.forward.__code__.co_varnames else "past_key_values"
    model.model(ids, use_cache=True, **{name: cache})
    found = []
    for _ in range(steps):
        started = _wait(device)
        model(ids[:, :1], use_cache=True, **{name: cache})
        found.append(1000 * (_wait(device) - started))
    return median(found[2:])


if __name__ == "__main__":
    main()
