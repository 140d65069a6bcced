"""Linear heads on one model, row by row beside their controls: trained, measured, and put into one table.

python scripts/linear_runs.py --texts FOLDER --out FOLDER [--rows a,b,c,window,dense,lolcats,delta] [--seeds 0,1]

Rows, all behind a window of 64 tokens and a page of the first ones:

    a        every head group linear (Hedgehog's map, prepared on attention weights, then distilled as a whole)
    b        half of the groups, those of the least error after their preparation
    c        all but the tenth that retrieves most
    window   row a without its states, trained on the same tokens
    dense    the dense model, trained on the same tokens
    lolcats  recipes/smollm2-lolcats.yaml
    delta    row a with the gated delta rule

Every row is a recipe, recipes/smollm2-hedgehog.yaml with other keys, whose stages run as in `compress run`, in a run
folder of its own: FOLDER/ROW-SEED. What rows have in common (profile, written text, preparation, the dense model's
figures) is made once, in FOLDER/base-SEED. Rows run in `--at-once` processes on one device. After `--minutes` those
that still train save their state, and the same command goes on there; a row that is done is only read. The table has
every row of the folder that is done, and FOLDER/rows.json all its numbers.

FOLDER of texts has books (*.txt, in it or in pg_books/), of which one is held out, and WikiText-2's raw files in it or
in wikitext2/, if any: wiki.train*.txt is trained on, wiki.test*.txt measured on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from compress.data.text import UndividedText
from compress.evaluate.compare import compare
from compress.evaluate.measure import Measure, Variant
from compress.files import write_json, write_text
from compress.models.planned import planned_model
from compress.models.trained import load_trained
from compress.plan import Plan
from compress.recipe.load import load_recipe
from compress.registry import measures
from compress.search.measure import plan_key
from compress.stages.prepare import prepare_stage
from compress.stages.profile import profile_stage
from compress.stages.recover import train_stage
from compress.stages.search import search_stage
from compress.stages.session import Session, open_session
from compress.targets.cost import Cost
from compress.train.recovery import read_recovered
from compress.train.window_dropout import windows_only

RECIPES = Path(__file__).parent.parent / "recipes"
HEDGEHOG = {"target": "linear", "map": "hedgehog", "sink": 4, "alpha": 64}
DELTA = {"target": "linear", "rule": "delta", "sink": 4, "alpha": 64}
KEEP: dict[str, Any] = {"name": "keep", "target": HEDGEHOG}
# For every row: the solver, and which of the trainings of `train_stage` it is.
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "a": (KEEP | {"statistic": "retrieval", "share": 0.0}, "recover"),
    "b": (KEEP | {"statistic": "error", "share": 0.5}, "recover"),
    "c": (KEEP | {"statistic": "retrieval", "share": 0.1}, "recover"),
    "window": (KEEP | {"statistic": "retrieval", "share": 0.0}, "windows"),
    "dense": (KEEP | {"statistic": "retrieval", "share": 0.0}, "control"),
    "lolcats": ({"name": "keep", "statistic": "retrieval", "share": 0.0}, "recover"),
    "delta": (KEEP | {"statistic": "retrieval", "share": 0.0, "target": DELTA}, "recover"),
}
BASE = "base"


def main() -> None:
    """Train and measure the rows that are asked for, and print the table."""
    options = arguments().parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")  # of what is float32 beside bfloat16: features and states in training
    if options.child:
        run_row(options, options.child, options.seed)
        return
    end = time.monotonic() + 60 * options.minutes
    rows = options.rows.split(",")
    if unknown := set(rows) - set(ROWS):
        sys.exit(f"linear_runs: no row {', '.join(sorted(unknown))}; rows are {', '.join(ROWS)}")
    for seed in map(int, options.seeds.split(",")):
        if not (options.out / f"{BASE}-{seed}.json").is_file() and not supervise([(BASE, seed)], options, end):
            break
        asked = [(row, seed) for row in rows if not (options.out / f"{row}-{seed}.json").is_file()]
        if not supervise(asked, options, end):
            break
    print_table(options.out)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--texts", type=Path, required=True, help="folder of books and of WikiText-2")
    add("--out", type=Path, required=True, help="folder of the runs, which a later call goes on with")
    add("--model", default="demo/smollm2-135m")
    add("--device", default="auto")
    add("--dtype", default="bfloat16")
    add("--rows", default=",".join(ROWS), help="which rows, by commas")
    add("--seeds", default="0", help="of training, by commas; texts and prompts of the measures stay the same")
    add("--minutes", type=float, default=9.0, help="stop here, with all states saved")
    add("--at-once", type=int, default=3, help="rows that run at once on the device")
    add("--tokens", type=int, default=42_000_000, help="of the joint training of each row")
    add("--prepare-tokens", type=int, default=8_000_000, help="of the preparation of each target")
    add("--written", type=int, default=4_000_000, help="tokens of training text that the model writes; 0 for none")
    add("--length", type=int, default=2048, help="tokens of a training sequence")
    add("--batch", type=int, default=32, help="sequences of a step of the joint training")
    add("--micro", type=int, default=4, help="sequences in a pass of the joint training; 8 where two rows share a GPU")
    add("--prepare-batch", type=int, default=16, help="sequences of a step of the preparation")
    add("--lengths", default="2048,8192", help="tokens of the measures' inputs, by commas")
    add("--windows", type=int, default=64, help="windows of text at the shortest length, fewer at longer ones")
    add("--prompts", type=int, default=50, help="prompts of each kind and length")
    add("--held-out", default="14263_katrine.txt", help="the book that is measured on")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of every row's recipe")
    add("--child", help=argparse.SUPPRESS)
    add("--seed", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def supervise(asked: Sequence[tuple[str, int]], options: argparse.Namespace, end: float) -> bool:
    """Run rows in processes of their own, so many at once, until they are done or the time is over; whether they are.

    A row that fails is told, with the end of its log, and the others go on.
    """
    waiting, running, done = list(asked), dict[tuple[str, int], Any](), True
    command = [sys.executable, __file__, *sys.argv[1:]]
    while waiting or running:
        while waiting and len(running) < options.at_once and time.monotonic() < end - 30:
            row, seed = waiting.pop(0)
            log = (options.out / f"{row}-{seed}.log").open("ab")
            child = [*command, "--child", row, "--seed", str(seed)]
            running[row, seed] = subprocess.Popen(child, stdout=log, stderr=subprocess.STDOUT)
            print(f"{row}-{seed}: started", flush=True)
        if time.monotonic() > end:
            for process in running.values():
                process.send_signal(signal.SIGTERM)
            for process in running.values():
                try:
                    process.wait(timeout=45)
                except subprocess.TimeoutExpired:
                    process.kill()
        for (row, seed), process in list(running.items()):
            if process.poll() is None:
                continue
            del running[row, seed]
            finished = (options.out / f"{row}-{seed}.json").is_file()
            done = done and (finished or time.monotonic() < end)
            print(f"{row}-{seed}: {'done' if finished else f'ended with {process.returncode}'}", flush=True)
            if not finished:
                lines = (options.out / f"{row}-{seed}.log").read_text(errors="replace").splitlines()
                print("\n".join(f"    {line[:300]}" for line in lines[-6:]), flush=True)
        if time.monotonic() > end and not running:
            return not waiting and done
        time.sleep(0.5)
    return done


class Lines:
    """Says everything in lines of a log, and of long work what is done every ten seconds."""

    def say(self, line: str) -> None:
        """One line with the time."""
        print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)

    def progress(self, title: str) -> Any:
        """See `Reporter.progress`."""
        from contextlib import nullcontext

        last = [time.monotonic()]

        def report(done: int, total: int, what: str) -> None:
            if time.monotonic() > last[0] + 10:
                last[0] = time.monotonic()
                self.say(f"{title}: {done}/{total} {what}")

        return nullcontext(report)


def run_row(options: argparse.Namespace, row: str, seed: int) -> None:
    """All stages of a row, and its figures; of `base` what the other rows have in common."""
    folder, base = options.out / f"{row}-{seed}", options.out / f"{BASE}-{seed}"
    if row != BASE and not folder.exists():
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(base, part, ignore=shutil.ignore_patterns(".lock"))
        os.rename(part, folder)
    path = options.out / f"{row}-{seed}.yaml"
    write_text(path, yaml.safe_dump(recipe_of(options, row, seed), sort_keys=False))
    with open_session(load_recipe(path, options.set), Lines()) as session:
        profile_stage(session)
        prepare_stage(session)
        if row == BASE:
            found = measure(options, session, [])
            write_json(options.out / f"{row}-{seed}.json", {"row": "dense, as it was", "seed": seed, **found})
            return
        plan = search_stage(session)
        which = ROWS[row][1]
        (weights,) = train_stage(session, which)
        record = read_recovered(weights)
        trained = variant_of(session, row, plan, which, weights)
        found = measure(options, session, [trained])
        facts: dict[str, Any] = {
            "tokens": record.tokens,
            "speed": record.tokens / record.seconds,
            "loss": record.last_loss,
        }
        full = sum(not group.words().startswith("sink") for layer in plan.layers for group in layer.groups)
        facts |= {"full groups": full, "first loss": record.first_loss, "device": record.device}
        write_json(options.out / f"{row}-{seed}.json", {"row": row, "seed": seed, **facts, **found})


def recipe_of(options: argparse.Namespace, row: str, seed: int) -> dict[str, Any]:
    """A row's recipe, as plain data."""
    lolcats = row == "lolcats"
    recipe: dict[str, Any] = yaml.safe_load(
        (RECIPES / f"smollm2-{'lolcats' if lolcats else 'hedgehog'}.yaml").read_text()
    )
    recipe |= {"model": options.model, "device": options.device, "dtype": options.dtype, "seed": seed}
    recipe["output"] = str(options.out / f"{row}-{seed}")
    source, lengths = training_text(options), sorted(map(int, options.lengths.split(",")))
    shortest = min(lengths)
    recipe["calibration"] = {
        "text": {"source": "file", "path": str(corpus(options))},
        "documents": [
            {"task": "passkey", "length": shortest, "count": 8},
            {"task": "key_value", "length": shortest, "count": 8},
        ],
    }
    recipe["prepare"] |= {"text": source, "tokens": options.prepare_tokens}
    recipe["recover"] |= {"text": source, "tokens": options.tokens, "control": False, "window_control": False}
    recipe["recover"]["save_every"] = 200
    if not lolcats:
        recipe["prepare"] |= {
            "length": options.length,
            "batch_size": options.prepare_batch,
            "targets": [HEDGEHOG, DELTA],
        }
        recipe["recover"] |= {"length": options.length, "batch_size": options.batch}
        recipe["recover"]["micro_batch"] = min(options.micro, options.batch)
    else:  # its own batches, with no more text than the other rows
        length = min(options.length, recipe["recover"]["length"])
        recipe["prepare"] |= {"length": length, "tokens": options.tokens // 2}
        recipe["recover"] |= {"length": length, "tokens": options.tokens // 2}
    recipe["search"] = {"solver": ROWS.get(row, ROWS["a"])[0], "budget": {"kv": 1.0, "lengths": [max(8192, *lengths)]}}
    recipe["evaluate"] = {"compare": ["plan"]}
    return recipe


def books(folder: Path) -> list[Path]:
    """The books of a folder of texts."""
    return sorted([*folder.glob("*.txt"), *folder.glob("pg_books/*.txt")])


def wiki(folder: Path, kind: str) -> Path | None:
    """A raw file of WikiText-2, `train` or `test`."""
    found = sorted([*folder.glob(f"wiki.{kind}*.txt"), *folder.glob(f"wikitext2/wiki.{kind}*.txt")])
    return found[0] if found else None


def held_out(options: argparse.Namespace) -> Path:
    """The book that is measured on."""
    found = [book for book in books(options.texts) if not book.name.startswith("wiki.")]
    if not found:
        sys.exit(f"linear_runs: no book (*.txt) in {options.texts}")
    return next((book for book in found if book.name == options.held_out), found[-1])


def corpus(options: argparse.Namespace) -> Path:
    """All text that is trained on, in one file: the other books, and WikiText-2's training part."""
    path: Path = options.out / "corpus.txt"
    if not path.is_file():
        held, train = held_out(options), wiki(options.texts, "train")
        parts = [book for book in books(options.texts) if book != held and not book.name.startswith("wiki.")]
        parts += [] if train is None else [train]
        write_text(path, "\n\n".join(part.read_text(encoding="utf-8", errors="replace") for part in parts or [held]))
    return path


def training_text(options: argparse.Namespace) -> dict[str, Any]:
    """The source of training text: the corpus, and beside it what the model writes."""
    own = {"source": "undivided", "path": str(corpus(options))}
    if not options.written:
        return own
    size = corpus(options).stat().st_size // 4  # tokens, about
    total = options.written + size
    share = round(options.written / total, 3)
    return {"source": "generated", "tokens": total, "length": options.length, "given": own, "share": share}


def variant_of(session: Session, row: str, plan: Plan, which: str, weights: Path) -> Variant:
    """A row's trained model."""
    dense, itemsize = session.loaded.model, session.loaded.model.dtype.itemsize

    def build() -> Any:
        if which == "control":
            import copy

            return load_trained(copy.deepcopy(dense), weights)
        model = planned_model(dense, plan)
        return load_trained(windows_only(model) if which == "windows" else model, weights)

    def cost(length: int) -> Cost:
        return session.shape.dense_cost(length, itemsize) if which == "control" else plan.cost(length, itemsize)

    return Variant(f"{row}, trained", build, f"{which} {plan_key(plan)} {read_recovered(weights).sha256}", cost)


def measure(options: argparse.Namespace, session: Session, variants: list[Variant]) -> dict[str, Any]:
    """Every figure of the dense model and of variants, by text; the dense model's are shared by all rows."""
    dense, itemsize = session.loaded.model, session.loaded.model.dtype.itemsize
    rows = [
        Variant("dense", lambda: dense, "dense", lambda length: session.shape.dense_cost(length, itemsize)),
        *variants,
    ]
    found: dict[str, Any] = {}
    for text, asked in readings(options):
        comparison = compare(
            session.loaded,
            rows,
            asked,
            seed=0,
            batch_size=min(25, options.prompts),
            cache_dir=options.out / "measured",
            progress=progress_of(f"measuring, {text}"),
        )
        for row in comparison.variants[-1:]:
            for cell in row.cells:
                if cell.part is None and cell.place is None:
                    found[f"{text}/{cell.label}/{cell.length}"] = cell.value
    return {"cells": found}


def progress_of(title: str) -> Any:
    """Lines about a long measurement."""
    with Lines().progress(title) as report:
        return report


def readings(options: argparse.Namespace) -> Iterator[tuple[str, list[Measure]]]:
    """What is measured, by the text that it reads."""
    lengths = sorted(map(int, options.lengths.split(",")))
    longest = max(lengths)

    def perplexities(source: UndividedText) -> list[Measure]:
        made = []
        for length in lengths:
            windows = max(1, min(options.windows, fitting(source, length)) * lengths[0] // length)
            made.append(measures["perplexity"](text=source, length=length, windows=windows))
        return made

    book = UndividedText(path=str(held_out(options)))
    tasks = [
        {"task": task, "length": n, "count": options.prompts} for task in ("passkey", "key_value") for n in lengths
    ]
    asked = [*perplexities(book), *measures["recall"].of([*map(parsed_task, tasks)])]
    asked.append(measures["branches"](text=book, length=longest, windows=max(1, options.windows // 16), by="model"))
    asked.append(measures["distance"](lengths=tuple(lengths), count=max(2, options.prompts // 2)))
    yield "book", asked
    test = wiki(options.texts, "test")
    if test is not None:
        yield "wikitext-2", perplexities(UndividedText(path=str(test)))


def fitting(source: UndividedText, length: int) -> int:
    """Windows that a text has at the least, of 3 characters a token."""
    return max(1, len(source.load()) // (5 * length))


def parsed_task(entry: dict[str, Any]) -> Any:
    """A recall task from its entry in a recipe."""
    from compress.registry import tasks

    return tasks.parse(entry)


def print_table(folder: Path) -> None:
    """The rows that are done, and all their numbers in `rows.json`."""
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*-*.json"))]
    if not rows:
        print("no row is done yet; run the same command again")
        return
    write_json(folder / "rows.json", rows)
    order = ["dense, as it was", *ROWS]
    rows.sort(key=lambda row: (order.index(row["row"]), row["seed"]))
    lengths = sorted(
        {int(key.split("/")[2]) for row in rows for key in row["cells"] if key.split("/")[1] == "perplexity"}
    )
    short, long = lengths[0], lengths[-1]
    dense = rows[0]["cells"].get(f"book/KV bytes/{long}")
    print(
        f"\nbook, wikitext-2: perplexity at {short:,} and {long:,} tokens; pass key, key-value: recall at both lengths"
    )
    print(f"in|out: recall of pass keys, and of words, inside and beyond the window at {long:,} tokens")
    print(f"branches: perplexity at {long:,} tokens with both branches, the window, the state, neither")
    print("bytes: of the cache, to the dense model's; speed: tokens a second in training\n")
    head = (
        "row",
        "seed",
        "book",
        "wikitext-2",
        "pass key",
        "key-value",
        "in|out",
        "words in|out",
        "branches",
        "bytes",
        "speed",
    )
    lines = [head]
    for row in rows:
        cells = row["cells"]

        def at(label: str, *places: int, text: str = "book", form: str = "{:.2f}", cells: Any = cells) -> str:
            values = [cells.get(f"{text}/{label}/{place}") for place in places]
            return " ".join("-" if value is None else form.format(value) for value in values)

        labels = {key.split("/")[1] for key in cells}
        near = [sorted(name for name in labels if name.startswith(f"pass key {end}")) for end in ("inside", "beyond")]
        words = [sorted(name for name in labels if name.startswith(f"words {end}")) for end in ("inside", "beyond")]
        branches = [f"perplexity, {name}" for name in ("full", "window only", "linear only", "none")]
        held = cells.get(f"book/KV bytes/{long}")
        share = held / dense if held and dense else math.nan
        lines.append(
            (
                row["row"],
                str(row["seed"]),
                at("perplexity", short, long),
                at("perplexity", short, long, text="wikitext-2"),
                at("passkey", short, long),
                at("key_value", short, long),
                "|".join(at(name, long) for names in near for name in names[:1]),
                "|".join(at(name, long) for names in words for name in names[:1]),
                "|".join(at(name, long, form="{:.4g}") for name in branches if name in labels) or "-",
                f"{share:.3f}",
                f"{row['speed']:,.0f}" if "speed" in row else "-",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        print("  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)))


if __name__ == "__main__":
    main()
