#!/usr/bin/env python3
"""Every method at several KV budgets, from one profile: plans first, then a table of quality against bytes.

    compress profile recipes/smollm2-8k.yaml
    scripts/method_table.py recipes/smollm2-8k.yaml solve refine measure --out table --minutes 3 --text wiki.txt

`solve` writes OUT/<budget>/<method>.json where it is not there, `refine` the refinement of the best of them with every
step, and `measure` reads them and writes OUT/table.json and OUT/table.txt. Budgets are shares of the dense KV bytes at
the longest profiled length. Recall is by generation through the KV cache; every row has the same prompts.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers

from compress.data.calibration import calibration_documents
from compress.data.sample import TextSample
from compress.data.text import EmbeddedText, FileText, split_text, tokenise
from compress.errors import UserError
from compress.evaluate.perplexity import PerplexityRequest, perplexity
from compress.evaluate.recall import recall, wilson
from compress.models.load import LoadedModel, load_model
from compress.models.planned import planned_model
from compress.models.shape import shape_of
from compress.plan import ModelShape, Plan, read_plan
from compress.profile.store import read_profile
from compress.recipe.load import load_recipe
from compress.recipe.schema import Recipe
from compress.registry import solvers, tasks
from compress.search.budget.budget import Budget
from compress.search.dense import Dense
from compress.search.problem import Candidate, Problem
from compress.search.refine.refine import Refine, refine
from compress.search.run import make_problem
from compress.search.solvers.moa import Moa
from compress.stages.device import resolve_device

# Row -> solver, and whether its budget holds at all profiled lengths (as published) or at the longest alone.
METHODS: dict[str, tuple[dict[str, Any], bool]] = {
    "StreamingLLM": ({"name": "streaming"}, False),
    "uniform window": ({"name": "uniform"}, False),
    "layer-wise": ({"name": "layers"}, False),
    "DuoAttention": ({"name": "heads", "score": "gates"}, False),
    "retrieval heads": ({"name": "heads"}, False),
    "training-free windows": (
        {"name": "moa", "influence": "none", "retrieval": 1, "tables": {"hidden_mass": 1}, "points": 0},
        False,
    ),
    "MoA, length rule": ({"name": "moa", "rule": "length", "points": 0}, True),
    "MoA": ({"name": "moa", "points": 0}, True),
    "MoA, signed": ({"name": "moa", "influence": "signed", "points": 0, "time_limit": 30}, True),
    "windows, evidence x3": (
        {"name": "moa", "influence": "none", "retrieval": 3, "tables": {"hidden_mass": 1}, "points": 0},
        False,
    ),
    "MoA + evidence": ({"name": "moa", "retrieval": 1, "points": 0}, False),
}
REFINED = "refined"
HEADLINE = ("dense", "uniform window", "training-free windows", REFINED)
CELLS: list[tuple[str, dict[str, Any]]] = [
    ("pass key", {"task": "passkey", "length": 2048}),
    ("pass key", {"task": "passkey", "length": 4096}),
    ("pass key", {"task": "passkey", "length": 8192}),
    ("pass key, filler", {"task": "passkey", "length": 8192, "haystack": "filler"}),
    ("key-value, 2 lines", {"task": "key_value", "length": 8192}),
    ("multi-key, 4 lines", {"task": "key_value", "length": 8192, "lines": 4}),
]
EXTRA: list[tuple[str, dict[str, Any]]] = [
    ("pass key, filler", {"task": "passkey", "length": 4096, "haystack": "filler"}),
    ("pass key, filler", {"task": "passkey", "length": 6144, "haystack": "filler"}),
]


def main() -> None:
    """Parse, and do the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("steps", nargs="+", choices=["solve", "refine", "measure"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budgets", nargs="+", default=[".5", ".33", ".25", ".125"])
    parser.add_argument("--minutes", type=float, default=5.0, help="of each refinement")
    parser.add_argument("--weights", type=json.loads, default={}, help="of the refinement's tasks, as JSON")
    parser.add_argument("--learn", type=int, default=8, help="training documents of each length for refinement")
    parser.add_argument("--rows", nargs="+", help="only these rows, in this order")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--count", type=int, default=25, help="prompts a cell and seed")
    parser.add_argument("--headline", type=int, default=100, help="prompts a cell and seed of the headline rows")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--text", help="a second text for perplexity")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    loaded = load_model(recipe.model, dtype=recipe.dtype, device=resolve_device(recipe.device))
    shape = shape_of(loaded.model)
    for step in options.steps:
        {"solve": solve, "refine": improve, "measure": measure}[step](options, recipe, loaded, shape)


def _problem(recipe: Recipe, loaded: LoadedModel, shape: ModelShape, budget: str, every: bool) -> Problem:
    """The problem of a budget at the longest profiled length, or at every one."""
    profile = read_profile(Path(recipe.output) / "profile", shape)
    lengths = tuple(profile.lengths) if every else (max(profile.lengths),)
    dense = Dense(shape, loaded.model.dtype.itemsize, loaded.model)
    return make_problem(dense, profile, Budget(kv=float(budget), lengths=lengths), Moa())


def solve(options: argparse.Namespace, recipe: Recipe, loaded: LoadedModel, shape: ModelShape) -> None:
    """Every method's plan at every budget."""
    for budget in options.budgets:
        problems = {every: _problem(recipe, loaded, shape, budget, every) for every in (True, False)}
        for name, (solver, every) in METHODS.items():
            path = options.out / budget / f"{name}.json"
            if path.is_file():
                continue
            started = time.monotonic()
            try:
                found = solvers.parse(solver).solve(problems[every])
            except (UserError, ValueError) as error:
                print(f"{budget} {name}: none, {str(error).splitlines()[0]}", flush=True)
                continue
            best = min(found, key=lambda each: list(each.losses.values())[-1] if each.losses else 0.0)
            _write(path, best.to_plan(problems[False], {"name": name, "question": best.note, "gap": best.gap}))
            print(f"{budget} {name}: {best.note} ({time.monotonic() - started:.1f} s)", flush=True)


def improve(options: argparse.Namespace, recipe: Recipe, loaded: LoadedModel, shape: ModelShape) -> None:
    """The refinement of the best plan of every budget; first what `solve` has not done."""
    solve(options, recipe, loaded, shape)
    documents = list(_documents(recipe, loaded, options.learn))
    for budget in options.budgets:
        folder = options.out / budget
        problem = _problem(recipe, loaded, shape, budget, every=False)
        plans = {
            name: read_plan(folder / f"{name}.json", shape) for name in METHODS if (folder / f"{name}.json").is_file()
        }
        starts = {name: each.layers for name, each in plans.items() if not each.by_length and problem.fits(each.layers)}
        state = refine(
            loaded.model,
            problem,
            Refine(minutes=options.minutes, weights=options.weights),
            starts,
            starts["uniform window"],
            documents,
            folder,
            recipe.seed,
        )
        for row in state.history:
            if "start" in row:
                print(budget, json.dumps({key: _short(value) for key, value in row.items()}), flush=True)
        print(
            f"{budget} refined {state.start}: {state.first:.4f} to {state.loss:.4f} in {state.step} steps, "
            f"{len(state.history)} measurements, {state.seconds:.0f} s, "
            f"{json.dumps({task: _short(value) for task, value in state.tasks.items()})}",
            flush=True,
        )
        note = f"{state.start} refined, loss {state.first:.4f} to {state.loss:.4f}"
        refined = Candidate(state.layers(), note=note)
        _write(folder / f"{REFINED}.json", refined.to_plan(problem, {"name": REFINED, "question": note}))


def measure(options: argparse.Namespace, recipe: Recipe, loaded: LoadedModel, shape: ModelShape) -> None:
    """All cells of all plans; what was measured before is read from OUT/cells.json."""
    source: Any = recipe.calibration.text
    evaluation = tokenise(loaded.tokenizer, split_text(source.load(), "evaluation"))
    log = options.out / "cells.json"
    known: dict[str, Any] = json.loads(log.read_text()) if log.is_file() else {}
    plans: dict[tuple[str, str], Plan | None] = {("1", "dense"): None}
    for name in options.rows or [REFINED, *METHODS]:
        for budget in options.budgets:
            if (options.out / budget / f"{name}.json").is_file():
                plans[budget, name] = read_plan(options.out / budget / f"{name}.json", shape)
    sources: dict[str, Any] = {"embedded": EmbeddedText()}
    if options.text:
        sources[Path(options.text).stem] = FileText(path=options.text)
    texts = {
        label: tokenise(loaded.tokenizer, split_text(each.load(), "evaluation")) for label, each in sources.items()
    }
    made: dict[str, Any] = {}
    for (budget, name), entry in plans.items():
        model = None
        for label, cell in [*CELLS, *(EXTRA if name in HEADLINE else [])]:
            head = name in HEADLINE and cell["task"] == "passkey" and cell["length"] == 8192
            for seed in options.seeds:
                count = options.headline if head else options.count
                key = f"{budget}/{name}/{label}/{cell['length']}/{seed}/{count}"
                if key in known:
                    continue
                task = tasks[cell["task"]](count=count, **cell)
                prompts = made.setdefault(
                    f"{label}/{cell['length']}/{seed}/{count}",
                    task.make(loaded.tokenizer, evaluation, f"table/{seed}"),
                )
                model = model or (loaded.model if entry is None else planned_model(loaded.model, entry))
                result = recall(model, loaded.tokenizer, task, prompts, batch_size=options.batch)
                known[key] = {
                    "correct": [item.correct for item in result.items],
                    "depth": [round(item.depth, 4) for item in result.items],
                    "cache_bytes": result.cache_bytes,
                }
        for label, tokens in texts.items():
            key = f"{budget}/{name}/perplexity/{label}"
            if key not in known:
                model = model or (loaded.model if entry is None else planned_model(loaded.model, entry))
                found = perplexity(model, tokens, PerplexityRequest(length=8192, windows=options.windows))
                known[key] = {"perplexity": found.perplexity, "window_nll": found.window_nll}
        log.write_text(json.dumps(known))
        print(_line(budget, name, entry, known, shape, loaded), flush=True)
    lines = [_line(budget, name, entry, known, shape, loaded) for (budget, name), entry in plans.items()]
    (options.out / "table.txt").write_text("\n".join(lines) + "\n")
    record = {
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "dtype": recipe.dtype,
        "seeds": options.seeds,
        "cells": known,
    }
    (options.out / "table.json").write_text(json.dumps(record) + "\n")


def _line(
    budget: str, name: str, entry: Plan | None, known: dict[str, Any], shape: ModelShape, loaded: LoadedModel
) -> str:
    """One row: share of the bytes at 8k, perplexities, and every cell over all seeds with its interval."""
    itemsize = loaded.model.dtype.itemsize
    whole = 8192 * shape.layers * shape.kv_heads * 2 * shape.head_dim * itemsize
    share = 1.0 if entry is None else entry.cost(8192, itemsize).held_bytes / whole
    parts = [f"{budget:>5} {name:24} {share:.3f}"]
    for key, value in known.items():
        if key.startswith(f"{budget}/{name}/perplexity/"):
            dense = known[key.replace(f"{budget}/{name}/", "1/dense/")]["perplexity"]
            parts.append(
                f"{key.rsplit('/', 1)[1][:9]} {value['perplexity']:.3f} ({value['perplexity'] / dense - 1:+.1%})"
            )
    for label, cell in [*CELLS, *EXTRA]:
        by_seed: dict[str, list[bool]] = {}  # prompts of a smaller count are the first of a larger one's: once each
        for key, value in known.items():
            if key.startswith(f"{budget}/{name}/{label}/{cell['length']}/"):
                seed = key.split("/")[-2]
                by_seed[seed] = max(by_seed.get(seed, []), value["correct"], key=len)
        hits = list(chain.from_iterable(by_seed.values()))
        if hits:
            low, high = wilson(sum(hits), len(hits))
            parts.append(
                f"{label} {cell['length'] // 1024}k {sum(hits) / len(hits):.2f} ({low:.2f} to {high:.2f}, {len(hits)})"
            )
    return " | ".join(parts)


def _documents(recipe: Recipe, loaded: LoadedModel, learn: int) -> Iterator[TextSample]:
    """The profiled documents, and the first few of each length that train."""
    calibration = recipe.calibration
    for requests, most in ((calibration.documents, None), (calibration.training, learn)):
        given: Any = {"requests": requests, "text": calibration.text, "split": "calibration"}
        found = calibration_documents(loaded, seed=recipe.seed, cache_dir=Path(recipe.output) / "calibration", **given)
        for _, group in sorted(found.items()):
            yield from group[:most]


def _write(path: Path, entry: Plan) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(entry.to_json())


def _short(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
