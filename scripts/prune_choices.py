#!/usr/bin/env python3
"""What to remove: perplexity of pruned models before any training, by score, and by how the budget is spread.

    python -m scripts.prune_choices --text train.txt --test wiki.txt --out choices.jsonl

A row is named SCORE or SCORE+FORM, with the forms of `FORMS`; rows that are there are not measured again.
`prune_table.py` trains such rows.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import compress.data.tasks
import compress.profile  # noqa: F401  (registers the statistics)
from compress.data.calibration import calibration_documents
from compress.data.continuation import Continuation
from compress.data.text import FileText, tokenise
from compress.evaluate.perplexity import PerplexityRequest, perplexity
from compress.models.load import load_model
from compress.models.planned import planned_model
from compress.models.pruning import block_parameters
from compress.models.shape import shape_of
from compress.profile.run import run_profile
from compress.profile.store import Profile, read_profile
from compress.registry import statistics
from compress.search.budget.budget import Budget
from compress.search.dense import Dense
from compress.search.problem import Problem
from compress.search.run import make_problem
from compress.search.solvers.allocated import Allocated
from compress.search.solvers.amp import Amp
from compress.search.solvers.ranked import Ranked

SCORES = ("amp", "wanda_sp", "flap", "taylor", "magnitude", "random")
CONTRIBUTION = "contribution"  # AMP's score with neurons weighed by their down column
FORMS: dict[str, Callable[..., Ranked]] = {
    "": Amp,  # AMP's: the budget's share of the head groups, neurons make up the rest, the same in every layer
    "mlp": lambda **given: Amp(attention=(0.0,), **given),  # all heads stay
    "query": lambda **given: Amp(unit="query", **given),  # query heads of every group instead of groups
    "layer": Allocated,  # by layer, shares of a layer's scores compared
    "standard": lambda **given: Allocated(normalise="standard", **given),  # by layer, one threshold (FLAP)
}


def problem_of(model: Any, scores: Any, share: float) -> Problem:
    """The problem of a model with a share of its parameters as budget."""
    return make_problem(Dense(shape_of(model), model.dtype.itemsize, model), scores, Budget(parameters=share), Amp())


def solver_of(row: str) -> Ranked:
    """The solver of SCORE or SCORE+FORM; FLAP's with its compensation."""
    score, _, form = row.partition("+")
    return FORMS[form](importance="amp" if score == CONTRIBUTION else score, compensate=score == "flap")


def take_scores(
    loaded: Any, text: str, folder: Path, seed: int, *, count: int, length: int, contribution: bool = False
) -> None:
    """Profiles with all scores on `count` documents of this seed; `CONTRIBUTION` has a folder of its own."""
    request = Continuation(task="continuation", length=length, count=count, answer="text", answer_tokens=length - 1)
    source = FileText(source="file", path=text)
    documents = calibration_documents(loaded, [request], source, "calibration", seed, folder / "documents")
    asked = [statistics[name](**({"seed": seed} if name == "random" else {})) for name in SCORES]
    run_profile(loaded, documents, asked, folder / f"profile-{seed}", seed=seed)
    if contribution:
        neurons = [statistics["amp"](neurons="contribution")]
        run_profile(loaded, documents, neurons, folder / f"{CONTRIBUTION}-{seed}", seed=seed)


def scores_of(row: str, folder: Path, seed: int) -> Profile:
    """The profile that a row's scores are in."""
    return read_profile(folder / f"{CONTRIBUTION if row.startswith(CONTRIBUTION) else 'profile'}-{seed}")


def main() -> None:
    """Measure all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo/smollm2-135m")
    parser.add_argument("--text", required=True, help="calibration")
    parser.add_argument("--test", required=True, help="perplexity")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--rows", nargs="+", default=[f"{s}+{f}" if f else s for f in FORMS for s in SCORES])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--documents", type=int, default=96)
    parser.add_argument("--length", type=int, default=512, help="of a document")
    parser.add_argument("--windows", type=int, default=8, help="of 1,024 tokens of perplexity")
    options = parser.parse_args()
    loaded = load_model(options.model, dtype=options.dtype, device=options.device)
    folder = options.out.parent / "scores"
    take_scores(loaded, options.text, folder, options.seed, count=options.documents, length=options.length)
    test = tokenise(loaded.tokenizer, Path(options.test).read_text(encoding="utf-8"))
    known = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {(row["row"], row["removed"]) for row in known}
    jobs = [("dense", 0.0), *((row, ratio) for ratio in options.ratios for row in options.rows)]
    for row, ratio in jobs:
        if (row, ratio) in done:
            continue
        model, note = loaded.model, ""
        if row != "dense":
            problem = problem_of(model, scores_of(row, folder, options.seed), 1 - ratio)
            (candidate,) = solver_of(row).solve(problem)
            model, note = planned_model(model, candidate.to_plan(problem, {})), candidate.note
        found = {
            "row": row,
            "removed": ratio,
            "parameter_share": block_parameters(model) / block_parameters(loaded.model),
            "perplexity": perplexity(model, test, PerplexityRequest(length=1024, windows=options.windows)).perplexity,
            "widths": note,
            "dtype": options.dtype,
            "machine": torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.machine(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        with options.out.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(f"{row:20} {ratio:4.0%} {found['parameter_share']:7.2%} {found['perplexity']:12.2f}  {note}", flush=True)


if __name__ == "__main__":
    main()
