#!/usr/bin/env python3
"""What it costs SmolLM2 that a plan is as an engine asks, with the head groups of a layer in their places or in any.

    scripts/serve_rows.py --out FOLDER [--length 512] [--kv 0.5]

Searches for half of the KV bytes, without `serve` and with it, and prints for each the response loss that the search
measured on held-out documents, and the loss that it predicted from the profile. SmolLM2 has three head groups a layer,
too few for slots on several ranks. So it is also searched with its keys and values repeated for each of its nine query
heads, which is the same function with nine head groups a layer. Every model has one run folder, where what one search
measured the next ones read; the plans are beside it. A few minutes of two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import nn

from compress.cli.app import app
from compress.files import write_text
from compress.models.load import load_model
from compress.plan import read_plan
from compress.search.serve import distinct

MODEL = "demo/smollm2-135m"
SERVES: dict[str, list[dict[str, Any]]] = {
    MODEL: [{"slot": 1, "spans": 3}, {"slot": 3, "spans": 3}],
    "repeated": [
        {"slot": 1, "spans": 3},
        {"slot": 3, "spans": 3},
        {"slot": 1, "spans": 3, "ranks": 3, "permute": False},
        {"slot": 1, "spans": 3, "ranks": 3},
    ],
}


@torch.no_grad()
def write_repeated(folder: Path) -> None:
    """SmolLM2 with keys and values of its own for every query head, the same for those that share them."""
    loaded = load_model(MODEL)
    config, model = loaded.model.config, loaded.model
    times = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            heads = projection.weight.view(config.num_key_value_heads, -1, config.hidden_size)
            projection.weight = nn.Parameter(heads.repeat_interleave(times, 0).flatten(0, 1))
    config.num_key_value_heads = config.num_attention_heads
    model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def recipe(model: str, output: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Two statistics that need no gradients, on few documents, and the solver of MoA."""

    def documents(**counts: int) -> list[dict[str, Any]]:
        return [{"task": task, "length": options.length, "count": count} for task, count in counts.items()]

    return {
        "schema": 1,
        "model": model,
        "device": "cpu",
        "output": str(output),
        "calibration": {
            "documents": documents(facts=2, passkey=1, key_value=1, continuation=2),
            "held_out": documents(facts=2, passkey=1, continuation=2),
        },
        "profile": {"statistics": [{"name": "retrieval"}, {"name": "hidden_mass"}]},
        "search": {
            "solver": {"name": "moa", "influence": "none", "retrieval": 1, "tables": {"hidden_mass": 1}},
            "budget": {"kv": options.kv},
        },
    }


def main() -> None:
    """Profile and search; a table of losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="run folders go here")
    parser.add_argument("--length", type=int, default=512, help="tokens of every document")
    parser.add_argument("--kv", type=float, default=0.5, help="share of the KV bytes")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    table = Table(title=f"{options.kv:.0%} of the KV bytes at {options.length} tokens")
    for head in ("groups a layer", "serve", "targets", "loss", "without", "more", "predicted", "without"):
        table.add_column(head)
    for name, serves in SERVES.items():
        model = name
        if name != MODEL:
            model = str(options.out / f"{name}-model")
            if not Path(model).exists():
                write_repeated(Path(model))
        run = options.out / Path(name).name
        file = run.with_suffix(".yaml")
        for number, serve in enumerate(serves):
            rows = recipe(model, run, options)
            rows["search"]["serve"] = {"engine": "vllm", **serve}
            file.write_text(yaml.safe_dump(rows, sort_keys=False), encoding="utf-8")
            for command in ["profile", "search"] if number == 0 else ["search"]:
                if status := app([command, str(file)], standalone_mode=False):
                    sys.exit(status)
            told = json.loads((run / "search" / "pareto.json").read_text(encoding="utf-8"))["serve"]
            plan, free = read_plan(run / "plan.json"), read_plan(run / "search" / "free.json")
            write_text(run.with_name(f"{run.name}-{number}.plan.json"), plan.to_json())
            targets = [str(len(distinct(one.layers))) for one in (plan, free)]
            words = ", ".join(f"{key}: {json.dumps(value)}" for key, value in serve.items())
            losses = [f"{told[key]:.4f}" for key in ("loss", "loss_without")]
            more = f"{told['loss'] - told['loss_without']:+.4f}"
            predicted = [f"{one.predicted.loss:.1f}" for one in (plan, free)]
            told_of = f"{targets[0]}, without {targets[1]}"
            table.add_row(str(plan.model.kv_heads), words, told_of, *losses, more, *predicted)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
