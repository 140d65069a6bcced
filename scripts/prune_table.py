#!/usr/bin/env python3
"""Pruning methods beside each other, before and after recovery, with the dense model and its control.

    python -m scripts.prune_table measure --text train.txt --test wiki.txt --requests requests.json.gz --out FOLDER
    python -m scripts.prune_table table FOLDER... --requests requests.json.gz --include TASKS

`measure` runs one job a row and seed, several at a time on one GPU, and writes a JSON file for each; what is there is
not repeated, and with `--minutes` no job is begun that would not end in time. Rows are those of `prune_choices.py`: the
same widths for every score, and `SCORE+mlp` keeps all heads; where SCORE does so anyway, it has no row of its own.
`table` counts the zero-shot answers with lm-eval's tasks and prints every seed, with paired differences to the
dense model and to the control.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import transformers

from compress.data.text import tokenise
from compress.evaluate.likelihood import answer
from compress.evaluate.perplexity import PerplexityRequest, perplexity
from compress.evaluate.requests import RequestFile, read_requests
from compress.files import write_text
from compress.models.load import load_model
from compress.models.planned import planned_model
from compress.models.pruning import block_parameters
from compress.train.recovery import recover
from compress.train.settings import RecoverSettings
from scripts.prune_choices import CONTRIBUTION, SCORES, problem_of, scores_of, solver_of, take_scores

HEADS_STAY = "+mlp"  # all parameters come from the neurons
METHODS = (*SCORES, *(f"{score}{HEADS_STAY}" for score in ("amp", "wanda_sp", "flap", "taylor", "random")))


def main() -> None:
    """One of the subcommands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("measure")
    run.add_argument("--model", default="demo/smollm2-135m")
    run.add_argument("--text", required=True, help="calibration and recovery")
    run.add_argument("--test", required=True, help="perplexity")
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--dtype", default="bfloat16")
    run.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    run.add_argument("--methods", nargs="+", default=list(METHODS))
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    run.add_argument("--steps", type=int, default=120)
    run.add_argument("--batch", type=int, default=16)
    run.add_argument("--loss", nargs="+", default=["text"])
    run.add_argument("--precision", default="auto", help="of the passes in recovery, as `recover.precision`")
    run.add_argument("--documents", type=int, default=128, help="of 512 tokens")
    run.add_argument("--windows", type=int, default=64, help="of 1,024 tokens of perplexity")
    run.add_argument("--workers", type=int, default=1)
    run.add_argument("--minutes", type=float, help="for all")
    run.add_argument("--pack", type=Path, help="a .tar.gz of rows and loss curves, written again and again")
    run.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    run.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    show = commands.add_parser("table")
    show.add_argument("folders", type=Path, nargs="+")
    show.add_argument("--out", type=Path, default=Path("table.json"))
    show.add_argument("--include", help="folder of more task files")
    for command in (run, show):
        command.add_argument("--requests", type=Path, required=True, help="of scripts/zero_shot.py")
    options = parser.parse_args()
    (measure if options.command == "measure" else table)(options)


def jobs(options: argparse.Namespace) -> list[tuple[str, float, int, str]]:
    """(method, ratio, seed, loss), the dense model first."""
    found = [("dense", 0.0, seed, loss) for seed in options.seeds for loss in options.loss if loss != "distill"]
    for seed in options.seeds:
        for ratio in options.ratios:
            found += [(method, ratio, seed, loss) for method in options.methods for loss in options.loss]
    return found


def measure(options: argparse.Namespace) -> None:
    """All jobs: profiles first, then the jobs in as many processes as asked for."""
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    if options.worker is None:
        loaded = load_model(options.model, dtype=options.dtype, device=options.device)
        for seed in options.seeds:
            asked: dict[str, Any] = {"count": options.documents, "length": 512}
            asked["contribution"] = any(method.startswith(CONTRIBUTION) for method in options.methods)
            take_scores(loaded, options.text, options.out, seed, **asked)
        del loaded
        print(f"profiles: {time.time() - started:.1f} s", flush=True)
        arguments = [sys.executable, "-m", "scripts.prune_table", *sys.argv[1:]]
        if options.minutes is not None:
            arguments += ["--deadline", str(started + 60 * options.minutes)]
        children = [subprocess.Popen([*arguments, "--worker", str(n)]) for n in range(options.workers)]
        packed = 0
        while any(child.poll() is None for child in children):
            time.sleep(5)
            there = len(list(options.out.glob("*-*-*-*.json")))
            if options.pack is not None and there > packed:
                pack(options.out, options.pack)
                packed = there
        print(f"all: {time.time() - started:.1f} s, exits {[child.returncode for child in children]}")
        summary(options.out)
        return
    loaded = load_model(options.model, dtype=options.dtype, device=options.device)
    requests = read_requests(options.requests)
    tokens = tokenise(loaded.tokenizer, Path(options.text).read_text(encoding="utf-8"))
    test = tokenise(loaded.tokenizer, Path(options.test).read_text(encoding="utf-8"))
    longest = 0.0
    for job in jobs(options)[options.worker :: options.workers]:
        path = options.out / f"{job[0]}-{job[1]:g}-{job[2]}-{job[3]}.json"
        if path.exists():
            continue
        if options.deadline is not None and time.time() + 1.1 * longest > options.deadline:
            print(f"no time for {path.stem} and what follows it in this worker", flush=True)
            return
        row = one(loaded, options, tokens, lambda model: evaluate(model, test, requests, options.windows), *job)
        if row is None:
            continue
        longest = max(longest, row["seconds"])
        write_text(path, json.dumps(row))
        told = f"{row['before']['perplexity']:.3f} -> {row['after']['perplexity']:.3f}"
        print(f"{path.stem}: {told}, {row['recover_seconds']:.1f} s of {row['seconds']:.1f} s", flush=True)


def pack(folder: Path, target: Path) -> None:
    """Rows and loss curves as one file, which is whole at any time."""
    beside = target.with_name(f".{target.name}.part")
    with tarfile.open(beside, "w:gz", compresslevel=3) as archive:
        for path in sorted([*folder.glob("*-*-*-*.json"), *folder.glob("work/*/loss.jsonl")]):
            archive.add(path, path.relative_to(folder))
    beside.replace(target)


def summary(folder: Path) -> None:
    """A line a row, without the zero-shot tasks."""
    for path in sorted(folder.glob("*-*-*-*.json")):
        row = json.loads(path.read_text())
        share = row["parameters"] / row["dense_parameters"]
        told = f"{row['before']['perplexity']:10.2f} {row['after']['perplexity']:8.2f}"
        print(f"{path.stem:28} {share:7.2%} {told} {row['recover_seconds']:5.0f} s, {row['seconds']:5.0f} s in all")


def one(
    loaded: Any,
    options: argparse.Namespace,
    tokens: Sequence[int],
    look: Callable[[Any], dict[str, Any]],
    method: str,
    ratio: float,
    seed: int,
    loss: str,
) -> dict[str, Any] | None:
    """One row: the pruned model before and after recovery. None if a row without `HEADS_STAY` has the same plan."""
    started = time.perf_counter()
    dense = loaded.model
    plan, note = None, ""
    if method == "dense":
        model = copy.deepcopy(dense)
    else:
        problem = problem_of(dense, scores_of(method, options.out, seed), 1 - ratio)
        (candidate,) = solver_of(method).solve(problem)
        if method.endswith(HEADS_STAY):
            (other,) = solver_of(method.removesuffix(HEADS_STAY)).solve(problem)
            if other.layers == candidate.layers:
                return None
        plan, note = candidate.to_plan(problem, {}), candidate.note
        model = planned_model(dense, plan)
    left, whole = block_parameters(model), block_parameters(dense)
    before = look(model)
    settings = RecoverSettings(
        steps=options.steps, batch_size=options.batch, loss=loss, precision=options.precision, save_every=10**6
    )
    folder = options.out / "work" / f"{method}-{ratio:g}-{seed}-{loss}"
    record = recover(model, settings, tokens, folder, teacher=dense, seed=seed)
    after = look(model)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    return {
        "method": method,
        "ratio": ratio,
        "seed": seed,
        "loss": loss,
        "widths": note,
        "parameters": left,
        "dense_parameters": whole,
        "model_parameters": sum(weight.numel() for weight in model.parameters()),
        "before": before,
        "after": after,
        "first_loss": record.first_loss,
        "last_loss": record.last_loss,
        "tokens": record.tokens,
        "recover_seconds": record.seconds,
        "seconds": time.perf_counter() - started,
        "machine": torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def evaluate(model: Any, test: Sequence[int], requests: RequestFile, windows: int) -> dict[str, Any]:
    """Perplexity of the test text, and the answers to the zero-shot requests."""
    found = perplexity(model, test, PerplexityRequest(length=1024, windows=windows))
    return {"perplexity": found.perplexity, "nll": found.window_nll, "answers": answer(model, requests, "row").answers}


def table(options: argparse.Namespace) -> None:
    """Print and write the table of the rows in some folders."""
    from compress.evaluate.replay import replay  # imports lm-eval, which `measure` does not need

    requests = read_requests(options.requests)
    rows = [json.loads(path.read_text()) for folder in options.folders for path in sorted(folder.glob("*-*-*-*.json"))]
    for row in rows:
        for part in ("before", "after"):
            found = replay(requests, row[part].pop("answers"), options.include)
            row[part]["accuracy"] = {
                task.task: [sample.metrics[task.main()] for sample in task.samples] for task in found
            }
            row[part].pop("nll")
    dense = next(row for row in rows if row["method"] == "dense")["before"]
    head = ["method", "removed", "loss", "parameters", "off budget", "ppl before", "ppl after"]
    print(" | ".join([*head, "0-shot before", "0-shot after", "difference to dense (95%)", "to control", "seconds"]))
    keys = sorted({(row["ratio"], row["loss"], row["method"]) for row in rows})
    written = []
    for ratio, loss, method in keys:
        same = [row for row in rows if (row["ratio"], row["loss"], row["method"]) == (ratio, loss, method)]
        controls = {row["seed"]: row["after"] for row in rows if (row["method"], row["loss"]) == ("dense", loss)}
        pairs = [paired(row["after"], dense) for row in same]
        beside = [paired(row["after"], controls[row["seed"]]) for row in same if row["seed"] in controls]
        first = same[0]
        written.append(
            {
                "method": method,
                "removed": ratio,
                "loss": loss,
                "seeds": len(same),
                "parameters": first["parameters"],
                "off_budget": first["parameters"] / first["dense_parameters"] - (1 - ratio),
                "perplexity_before": [row["before"]["perplexity"] for row in same],
                "perplexity_after": [row["after"]["perplexity"] for row in same],
                "zero_shot_before": [average(row["before"]) for row in same],
                "zero_shot_after": [average(row["after"]) for row in same],
                "by_task_after": [{name: mean(each) for name, each in r["after"]["accuracy"].items()} for r in same],
                "to_dense": pairs,
                "to_control": beside,
                "recover_seconds": [row["recover_seconds"] for row in same],
                "widths": first["widths"],
            }
        )
        told = written[-1]
        print(
            f"{method} | {ratio:.0%} | {loss} | {first['parameters']:,} | {told['off_budget']:+.2%} | "
            f"{spread(told['perplexity_before'])} | {spread(told['perplexity_after'])} | "
            f"{spread(told['zero_shot_before'])} | {spread(told['zero_shot_after'])} | "
            f"{mean(p[0] for p in pairs):+.3f} ±{mean(p[1] for p in pairs):.3f} | "
            + (f"{mean(p[0] for p in beside):+.3f} | " if beside else "- | ")
            + f"{mean(told['recover_seconds']):.0f}"
        )
    options.out.write_text(json.dumps(written, indent=1) + "\n")


def average(part: dict[str, Any]) -> float:
    """Mean over tasks of the accuracy."""
    return mean(mean(each) for each in part["accuracy"].values())


def paired(part: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Mean over tasks of the difference on the same documents, and half of its 95% interval."""
    differences = [
        [a - b for a, b in zip(part["accuracy"][name], other["accuracy"][name], strict=True)]
        for name in part["accuracy"]
    ]
    spread_of = [stdev(each) ** 2 / len(each) for each in differences]
    return mean(mean(each) for each in differences), 1.96 * sum(spread_of) ** 0.5 / len(differences)


def spread(values: list[float]) -> str:
    """Each seed's number."""
    return " / ".join(f"{value:.3f}" if value < 10 else f"{value:.2f}" for value in values)


if __name__ == "__main__":
    main()
