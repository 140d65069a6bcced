#!/usr/bin/env python3
"""Recovery in one process, in several, and with the weights spread over them (FSDP2): their losses, and what they take.

    python -m scripts.recover_processes --model smollm2.gguf --text train.txt --processes 2 --shard

Each case is a launch of its own (`torchrun` for several processes) that trains the same pruned model on the same
batches. Without dropout the losses of all cases are those of one process, to rounding. Prints a line a case.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from compress.data.text import tokenise
from compress.models.families import layers_of
from compress.models.load import load_model
from compress.models.pruning import Kept, prune
from compress.train.curve import Curve
from compress.train.recovery import recover
from compress.train.settings import RecoverSettings


def train(options: argparse.Namespace, folder: Path) -> None:
    """One process of one case."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = f"cuda:{rank}" if torch.cuda.is_available() else "cpu"
    if device != "cpu":
        torch.cuda.set_device(device)
    loaded = load_model(options.model, dtype=options.dtype, device=device)
    config: Any = loaded.model.config
    groups, neurons = config.num_key_value_heads, config.intermediate_size
    stays = Kept(tuple(range(groups)), tuple(range(0, neurons - neurons % 2, 2)))
    prune(loaded.model, [stays] * len(layers_of(loaded.model)))
    tokens = tokenise(loaded.tokenizer, Path(options.text).read_text(encoding="utf-8"))
    settings = RecoverSettings(
        steps=options.steps,
        batch_size=options.batch,
        length=options.length,
        train=options.train,
        dropout=0.0,
        shard=options.spread,
        save_every=10**6,
    )
    recover(loaded.model, settings, tokens, folder, seed=0)
    if device != "cpu":
        (folder / f"peak-{rank}").write_text(str(torch.cuda.max_memory_allocated()))


def launch(options: argparse.Namespace, folder: Path, processes: int, spread: bool) -> dict[str, Any]:
    """Run one case and read what it left."""
    start = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    if processes > 1:
        start += ["--nproc-per-node", str(processes)]
    command = [*start, "-m", "scripts.recover_processes", *sys.argv[1:], "--child", str(folder)]
    done = subprocess.run([*command, "--spread"] if spread else command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{processes} processes{', spread' if spread else ''} failed:\n{done.stderr[-3000:]}")
    steps = Curve(folder / "loss.jsonl").steps()
    return {
        "losses": [step["loss"] for step in steps],
        "seconds": median(step["seconds"] for step in steps[1:] or steps),
        "peaks": [int(path.read_text()) for path in sorted(folder.glob("peak-*"))],
    }


def main() -> None:
    """All cases, beside one process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo/smollm2-135m")
    parser.add_argument("--text", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--train", choices=("lora", "full"), default="lora")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--shard", action="store_true", help="also with weights spread over the GPUs")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--spread", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        train(options, options.child)
        return
    cases = [(1, False), (options.processes, False), *([(options.processes, True)] if options.shard else [])]
    first: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, (processes, spread) in enumerate(cases):
            found = launch(options, Path(scratch) / str(number), processes, spread)
            first = first or found["losses"]
            gap = max(abs(own - other) for own, other in zip(found["losses"], first, strict=True))
            told = {
                "processes": processes,
                "spread": spread,
                "train": options.train,
                "first_loss": found["losses"][0],
                "last_loss": found["losses"][-1],
                "largest_gap_to_one_process": gap,
                "seconds_a_step": found["seconds"],
                "peak_gib": [round(peak / 2**30, 2) for peak in found["peaks"]],
            }
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
