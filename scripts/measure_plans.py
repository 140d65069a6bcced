#!/usr/bin/env python3
"""Measures plan files of one model beside the dense model and uniform windows of the same bytes, on many prompts.

    scripts/measure_plans.py plan.json --lengths 2048 --prompts 100 --batch 25 --text wiki.txt --out table.json

Every plan gets its own uniform row: the largest window behind 64 sink tokens with no more bytes than the plan at
the longest length. Perplexity is on 2 x --windows windows: the embedded text, and --text where given.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import compress.data.tasks  # noqa: F401  (registers the tasks)
from compress.cli.tables import show
from compress.data.text import EmbeddedText, FileText
from compress.evaluate.compare import Variant, compare
from compress.evaluate.perplexity import PerplexityRequest
from compress.models.load import load_model
from compress.models.planned import planned_model
from compress.models.shape import shape_of
from compress.plan import Plan, read_plan, uniform_plan
from compress.registry import tasks
from compress.search.measure import plan_key
from compress.targets.cost import dense_kv_bytes
from compress.targets.window import WindowGroup


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="+", type=Path)
    parser.add_argument("--model", default="demo/smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048])
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tasks", nargs="+", default=["passkey", "key_value"])
    parser.add_argument("--text", help="a second text for perplexity")
    parser.add_argument("--seed", type=int, default=1, help="another seed than the recipes', which is 0")
    parser.add_argument("--keep", type=Path, help="folder of finished measurements; what is there is not repeated")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    loaded = load_model(options.model, dtype=options.dtype, device=options.device)
    shape = shape_of(loaded.model)
    itemsize, longest = loaded.model.dtype.itemsize, max(options.lengths)
    groups = shape.layers * shape.kv_heads

    def held(plan: Plan) -> dict[int, int]:
        return {length: plan.cost(length, itemsize).held_bytes for length in options.lengths}

    def variant(name: str, plan: Plan) -> Variant:
        return Variant(name, lambda: planned_model(loaded.model, plan), plan_key(plan), held(plan))

    dense = {length: dense_kv_bytes(groups, length, shape.head_dim, itemsize) for length in options.lengths}
    variants = [Variant("dense", lambda: loaded.model, "dense", dense)]
    for number, path in enumerate(options.plans):
        plan = read_plan(path, shape)
        windows = (uniform_plan(shape, WindowGroup(sink=64, alpha=alpha, beta=0.0)) for alpha in range(longest, 0, -64))
        uniform = next(each for each in windows if held(each)[longest] <= held(plan)[longest])
        variants += [variant(f"plan {number}", plan), variant(f"uniform {number}", uniform)]

    asked = [
        tasks[name](task=name, length=length, count=options.prompts)
        for length in options.lengths
        for name in options.tasks
    ]
    texts: list[Any] = [EmbeddedText(), *([FileText(path=options.text)] if options.text else [])]
    record: dict[str, Any] = {
        "machine": torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "plans": [path.name for path in options.plans],
        "comparisons": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        for number, text in enumerate(texts):
            comparison = compare(
                loaded,
                variants,
                perplexity_request=PerplexityRequest(text=text, length=longest, windows=options.windows),
                recall_requests=asked if number == 0 else [],
                recall_text=None,
                seed=options.seed,
                batch_size=options.batch,
                cache_dir=options.keep or Path(scratch),
            )
            for table in comparison.tables():
                show(table)
            record["comparisons"].append(json.loads(comparison.model_dump_json(by_alias=True)))
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
