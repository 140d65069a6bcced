#!/usr/bin/env python3
"""Zero-shot tasks of lm-eval on a machine that has neither lm-eval nor a network.

    scripts/zero_shot.py requests --include tasks/ --items 300 --out requests.json.gz
    scripts/zero_shot.py score requests.json.gz --model pruned/ --dtype bfloat16 --name pruned --out pruned.json
    scripts/zero_shot.py finish requests.json.gz dense.json pruned.json --include tasks/ --out comparison.json

`requests` and `finish` need lm-eval and the tasks' data, `score` neither. Tasks ask as they are written, without a chat
template. Figures and their standard errors are lm-eval's own; differences are paired over the items, to the first file
of answers, and 95% intervals are 1.96 standard errors to each side. Models of one comparison share a tokenizer.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import UserError
from compress.evaluate.requests import AnswerFile, RequestFile, read_answers, read_requests

if TYPE_CHECKING:
    from compress.evaluate.comparison import Comparison

TASKS = [
    "local_piqa",
    "local_hellaswag",
    "local_arc_easy",
    "local_arc_challenge",
    "local_winogrande",
    "local_boolq",
    "local_lambada_openai",
]


def make_requests(model: str, tasks: Sequence[str], include: str | None, items: int | None) -> RequestFile:
    """Requests of the first items of some tasks, with the token ids of a model's tokenizer."""
    from compress.evaluate.harness import HarnessRequest, quiet

    quiet()
    from compress.evaluate.replay import record
    from compress.models.load import load_config, load_tokenizer

    request = HarnessRequest(tasks=tuple(tasks), include=include, limit=items)
    return record(load_config(model), load_tokenizer(model), request, model)


def make_answers(
    asked: RequestFile, model: str, name: str, *, dtype: str, device: str, batch_tokens: int
) -> AnswerFile:
    """Score all requests with one model."""
    from compress.evaluate.likelihood import answer
    from compress.models.load import load_model

    loaded = load_model(model, dtype=dtype, device=device)
    return answer(loaded.model, asked, name, batch_tokens=batch_tokens)


def finish(asked: RequestFile, answered: Sequence[AnswerFile], include: str | None) -> Comparison:
    """lm-eval's figures of every model, with every item's, beside the first model."""
    from compress.evaluate.harness import quiet

    quiet()
    from compress.evaluate.replay import compare_answers

    return compare_answers(asked, answered, include)


def summary(asked: RequestFile) -> str:
    """Requests and tokens by task."""
    lines = []
    for task in (*asked.tasks, "all"):
        rows = [row for row in asked.requests if task in ("all", row.task)]
        read = sum(len(row.context_ids) + len(row.continuation_ids) - 1 for row in rows)
        scored = sum(len(row.continuation_ids) for row in rows)
        docs = len({(row.task, row.doc) for row in rows})
        lines.append(f"{task:22} {docs:6,} items {len(rows):7,} requests {read:9,} tokens, {scored:7,} of them scored")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run one subcommand; 2 for a user's error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    asks = commands.add_parser("requests", help="write the requests of some tasks")
    asks.add_argument("--model", default="demo/smollm2-135m", help="whose tokenizer")
    asks.add_argument("--tasks", nargs="+", default=TASKS)
    asks.add_argument("--items", type=int, help="only the first items of every task")
    scores = commands.add_parser("score", help="answer them with a model")
    scores.add_argument("requests", type=Path)
    scores.add_argument("--model", required=True)
    scores.add_argument("--name", help="in tables; the model by default")
    scores.add_argument("--dtype", default="bfloat16")
    scores.add_argument("--device", default="cuda")
    scores.add_argument("--batch-tokens", type=int, default=8192, help="tokens of a batch with padding")
    ends = commands.add_parser("finish", help="have lm-eval make figures of the answers")
    ends.add_argument("requests", type=Path)
    ends.add_argument("answers", nargs="+", type=Path, help="of several models, the one to compare with first")
    for command in (asks, ends):
        command.add_argument("--include", help="a folder of task files besides lm-eval's own")
    for command in (asks, scores, ends):
        command.add_argument("--out", type=Path, required=command is not ends)
    options = parser.parse_args(arguments)
    try:
        {"requests": _requests, "score": _score, "finish": _finish}[options.command](options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _requests(options: argparse.Namespace) -> None:
    asked = make_requests(options.model, options.tasks, options.include, options.items)
    asked.write(options.out)
    print(summary(asked))


def _score(options: argparse.Namespace) -> None:
    asked, started = read_requests(options.requests), time.perf_counter()
    settings: dict[str, Any] = {"dtype": options.dtype, "device": options.device, "batch_tokens": options.batch_tokens}
    answered = make_answers(asked, options.model, options.name or options.model, **settings)
    answered.write(options.out)
    print(f"{len(answered.answers):,} requests in {time.perf_counter() - started:.1f} s, with loading")


def _finish(options: argparse.Namespace) -> None:
    from rich.console import Console

    asked = read_requests(options.requests)
    comparison = finish(asked, [read_answers(path, asked) for path in options.answers], options.include)
    if options.out is not None:
        comparison.write(options.out)
    console = Console(width=68 + 36 * len(comparison.variants))
    console.print(comparison.tables()[-1])
    for variant in comparison.variants[1:]:
        gap = comparison.average(variant)
        if gap is not None:
            low, high = gap.interval
            console.print(f"{variant.name}: mean difference {gap.difference:+.4f}, 95% {low:+.4f} to {high:+.4f}")


if __name__ == "__main__":
    sys.exit(main())
