#!/usr/bin/env python3
"""Zero-shot tasks for many models, scored where lm-eval is not installed: ask here, score there, count here.

    scripts/zero_shot.py requests TASK... --include FOLDER --model M --limit 300 --out requests.json.gz
    scripts/zero_shot.py count requests.json.gz answers.json... --include FOLDER

`requests` writes the token ids of every request that lm-eval's own task objects make, split as its HFLM splits them;
`score` (imported by other scripts; torch alone) gives the log-likelihoods; `count` hands them to the tasks'
`process_results`, so that accuracies are lm-eval's own.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    """One of the two subcommands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    ask = commands.add_parser("requests")
    ask.add_argument("tasks", nargs="+")
    ask.add_argument("--model", default="demo/smollm2-135m", help="whose tokenizer")
    ask.add_argument("--limit", type=int, default=300)
    ask.add_argument("--out", type=Path, required=True)
    count = commands.add_parser("count")
    count.add_argument("requests", type=Path)
    count.add_argument("answers", type=Path, nargs="+")
    for command in (ask, count):
        command.add_argument("--include", type=Path, help="folder of more task files")
    options = parser.parse_args()
    if options.command == "requests":
        write_requests(options.tasks, options.include, options.model, options.limit, options.out)
    else:
        for path in options.answers:
            answers = json.loads(path.read_text())
            print(path, json.dumps(accuracies(read_requests(options.requests), answers, options.include)))


def instances(names: list[str], include: Path | None, limit: int) -> dict[str, tuple[Any, list[Any]]]:
    """Task objects and their log-likelihood requests, by task."""
    from lm_eval.tasks import TaskManager, get_task_dict

    manager = TaskManager(include_path=None if include is None else str(include))
    found = {}
    for name, task in get_task_dict(names, manager).items():
        task.build_all_requests(limit=limit, rank=0, world_size=1)
        found[name] = (task, list(task.instances))
    return found


def write_requests(names: list[str], include: Path | None, model: str, limit: int, out: Path) -> None:
    """All requests, tokenised."""
    from compress.models.load import load_tokenizer

    tokenizer = load_tokenizer(model)
    rows: dict[str, Any] = {"limit": limit, "tasks": {}}
    for name, (_, asked) in instances(names, include, limit).items():
        rows["tasks"][name] = [split(tokenizer, *each.args) for each in asked]
    out.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(out, "wt") as file:
        json.dump(rows, file, separators=(",", ":"))
    numbers = {name: len(asked) for name, asked in rows["tasks"].items()}
    tokens = sum(len(ids) for asked in rows["tasks"].values() for ids, _ in asked)
    print(f"{numbers}, {tokens:,} tokens, {out.stat().st_size:,} bytes")


def split(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], int]:
    """Token ids of both together, and how many of them are the continuation, as lm-eval's HFLM has it."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    return whole, len(whole) - len(tokenizer(context, add_special_tokens=False)["input_ids"])


def read_requests(path: Path) -> dict[str, Any]:
    """What `requests` wrote."""
    with gzip.open(path, "rt") as file:
        found: dict[str, Any] = json.load(file)
    return found


@torch.inference_mode()
def score(model: Any, requests: dict[str, Any], batch_tokens: int = 32768) -> dict[str, list[tuple[float, bool]]]:
    """Log-likelihood of every continuation and whether it is what greedy decoding gives, by task.

    Sequences are padded on the right, where a causal model does not see them.
    """
    device = next(model.parameters()).device
    flat = [(name, i, *request) for name, asked in requests["tasks"].items() for i, request in enumerate(asked)]
    flat.sort(key=lambda each: -len(each[2]))
    answers: dict[str, list[Any]] = {name: [None] * len(asked) for name, asked in requests["tasks"].items()}
    start = 0
    while start < len(flat):
        width = len(flat[start][2]) - 1
        rows = flat[start : start + max(1, batch_tokens // width)]
        start += len(rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        for row, (_, _, tokens, _) in enumerate(rows):
            ids[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
        hidden = model.get_decoder()(input_ids=ids.to(device), use_cache=False).last_hidden_state
        places = [
            (row, len(tokens) - 1 - count + k) for row, (_, _, tokens, count) in enumerate(rows) for k in range(count)
        ]
        picked = hidden[[row for row, _ in places], [column for _, column in places]]
        wanted = torch.tensor([token for _, _, tokens, count in rows for token in tokens[-count:]], device=device)
        likely, greedy = [], []
        for part, target in zip(picked.split(4096), wanted.split(4096), strict=True):
            logits = model.get_output_embeddings()(part).float()
            likely.append(-torch.nn.functional.cross_entropy(logits, target, reduction="none"))
            greedy.append(logits.argmax(-1) == target)
        counts = [count for _, _, _, count in rows]
        found = zip(rows, torch.cat(likely).cpu().split(counts), torch.cat(greedy).cpu().split(counts), strict=True)
        for (name, i, _, _), each, same in found:
            answers[name][i] = (float(each.sum()), bool(same.all()))
    return answers


def accuracies(
    requests: dict[str, Any], answers: dict[str, list[Any]], include: Path | None
) -> dict[str, dict[str, list[float]]]:
    """By task and metric of lm-eval, one number a document."""
    made: dict[str, dict[str, list[float]]] = {}
    for name, (task, asked) in instances(list(answers), include, requests["limit"]).items():
        by_document: dict[int, list[Any]] = {}
        for instance, answer in zip(asked, answers[name], strict=True):
            by_document.setdefault(instance.doc_id, []).append((instance, tuple(answer)))
        made[name] = {}
        for pairs in by_document.values():
            results = [answer for _, answer in sorted(pairs, key=lambda pair: pair[0].idx)]
            for metric, value in task.process_results(pairs[0][0].doc, results).items():
                made[name].setdefault(metric, []).append(float(value))
    return made


if __name__ == "__main__":
    main()
