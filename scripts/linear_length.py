"""Long inputs of linear heads: prefill, chunks and decoding are one function, states do not drift, memory is constant.

python scripts/linear_length.py TEXT [--prepared FOLDER] [--model NAME] [--length 8192] [--generate 100000] [--out FILE]

Every head group is linear behind a window of 64 tokens, with what FOLDER (`options` of a run) has for it, else with its
untrained maps. Layers run on the queries, keys and values that they have in one pass over the text, in half precision
and in float32: the whole text at once, chunks of an odd length, and token after token. Then the model writes tokens,
and what its cache has allocated is told on the way. Writes JSON; a GPU takes Triton's kernels, a CPU plain PyTorch.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from compress.evaluate.measures.drift import drift, pass_of
from compress.models.branches import QKV, Branched, beside
from compress.models.load import load_model
from compress.models.planned import planned_model
from compress.models.prepared import attach, read_prepared
from compress.plan import uniform_plan
from compress.runtime.modeling_compress import CACHE
from compress.runtime.span import PAGE
from compress.runtime.step import Step
from compress.targets.linear import LinearGroup
from scripts.gpu_check import error

CHUNK = 1000  # no whole number of pages
TOLD = 20  # times that the memory is told


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("text", type=Path, help="a text of enough tokens")
    add("--model", default="demo/smollm2-135m")
    add("--prepared", type=Path, help="folder of prepared options; without, maps are untrained")
    add("--length", type=int, default=8192)
    add("--layers", default="0,10,20,29", help="whose prefill, chunks and decoding are compared, by commas")
    add("--generate", type=int, default=100_000, help="tokens that are written; 0 for none")
    add("--depth", type=int, help="first layers of the model, which alone write; all without")
    add("--out", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    layers = [int(number) for number in options.layers.split(",")]
    for dtype in ("float32", "bfloat16"):
        model, tokenizer = linear_model(options, dtype, device)
        ids = tokenizer(options.text.read_text(encoding="utf-8"))["input_ids"][: options.length]
        found[dtype] = compared(model, torch.tensor([ids], device=device), layers)
        for layer, errors in found[dtype].items():
            print(f"{dtype}, layer {layer}, {len(ids):,} tokens: {words(errors)}", flush=True)
    if options.generate:
        found["memory"] = written(model, options.generate, options.depth)
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def linear_model(options: argparse.Namespace, dtype: str, device: str) -> tuple[Any, Any]:
    """The model with all groups linear, and its tokenizer."""
    loaded = load_model(options.model, dtype=dtype, device=device)
    target: Any = LinearGroup(map="hedgehog", sink=4, alpha=64, beta=0.0)
    if options.prepared is not None:
        prepared = read_prepared(options.prepared)
        attach(loaded.model, prepared)
        target = prepared[0].target
    plan = uniform_plan(loaded.shape, target)
    return planned_model(loaded.model, plan, untrained=options.prepared is None), loaded.tokenizer


def compared(model: Any, ids: torch.Tensor, layers: list[int]) -> dict[int, dict[str, float]]:
    """Relative errors of the outputs of layers' heads, all tokens together, against the whole text at once; and what
    their states drift from float64."""
    found: dict[int, dict[str, float]] = {}

    def look(place: Branched, qkv: QKV, step: Step, options: dict[str, Any]) -> None:
        if place.layer in layers:
            whole = place.mixer.prefill(*qkv, None, step, **options)
            found[place.layer] = {
                "chunks": error(pieces(place.mixer, qkv, step, CHUNK, options), whole),
                "decoded": error(pieces(place.mixer, qkv, step, 1, options), whole),
                "drift": drift(place.mixer, *qkv, step, options["scale"]),
            }

    with beside(model, look), torch.inference_mode():
        model.get_decoder()(input_ids=ids, use_cache=False)
    return found


def pieces(mixer: Any, qkv: QKV, step: Step, size: int, options: dict[str, Any]) -> torch.Tensor:
    """Outputs `[1, N, H, V]` of a mixer that gets so many tokens at once, with a state between."""
    query, key, value = qkv
    state, made = mixer.state(None), []
    state.begin(key, value)
    for start in range(0, query.shape[2], size):
        some = [tensor[:, :, start : start + size] for tensor in qkv]
        now = pass_of(step, start, some[0].shape[2], query.dtype)
        if now.lengths is None:
            made.append(mixer.prefill(*some, state, now, **options))
        else:
            made.append(mixer.decode(*some, state, now, scale=options["scale"]))
    return torch.cat(made, 1)


@torch.inference_mode()
def written(model: Any, count: int, depth: int | None) -> list[dict[str, Any]]:
    """What the cache has allocated while so many tokens are written, most likely ones."""
    if depth is not None:
        del model.base_model.layers[depth:]
    cache = model.new_cache()
    token = torch.tensor([[1]], device=model.device)
    began, told = time.perf_counter(), []
    every = max(1, count // TOLD)
    for number in range(1, count + 1):
        token = model(input_ids=token, **{CACHE: cache}).logits[:, -1:].argmax(-1)
        if number % every == 0 or number == 4 * PAGE:
            told.append({"tokens": number, "bytes": cache.allocated_bytes(), "seconds": time.perf_counter() - began})
            if token.device.type == "cuda":
                told[-1]["gpu bytes"] = torch.cuda.memory_allocated()
            print(", ".join(f"{key} {value:,.0f}" for key, value in told[-1].items()), flush=True)
    return told


def words(errors: dict[str, float]) -> str:
    """One line."""
    return ", ".join(f"{name} {value:.1e}" for name, value in errors.items())


if __name__ == "__main__":
    main()
