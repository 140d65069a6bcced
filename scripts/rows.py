"""What scripts share that train and measure rows of a table: a process a row, texts, the dense model's figures.

A row has a name. Each (row, seed) runs in a process of its own and keeps everything in FOLDER/ROW-SEED, so that a later
call goes on where one was stopped; its figures are FOLDER/ROW-SEED.json. What rows have in common (a profile, written
text, a preparation, the dense model's figures) is the row `base`, which runs first and whose folder the others start
from. Rows run in so many processes at once on each GPU, and every process sees one GPU alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml

from compress.data.text import UndividedText
from compress.evaluate.compare import compare
from compress.evaluate.measure import Measure, Variant
from compress.files import write_json, write_text
from compress.recipe.load import load_recipe
from compress.registry import measures, tasks
from compress.stages.processes import is_helper, launch
from compress.stages.session import Session, open_session
from scripts.gpu_jobs import end_all

BASE = "base"
DENSE = "dense, as it was"
ZERO_SHOT = ("local_hellaswag", "local_piqa", "local_arc_easy", "local_winogrande", "local_lambada_openai")


def arguments(description: str, rows: Iterable[str]) -> argparse.ArgumentParser:
    """The options that all such scripts have; a script adds its own."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--texts", type=Path, required=True, help="folder of books and of WikiText-2")
    add("--out", type=Path, required=True, help="folder of the runs, which a later call goes on with")
    add("--model", default="demo/smollm2-135m")
    add("--device", default="auto")
    add("--dtype", default="bfloat16")
    add("--rows", default=",".join(rows), help="which rows, by commas; `base` makes only what they share")
    add("--seeds", default="0", help="of training, by commas; texts and prompts of the measures stay the same")
    add("--minutes", type=float, default=9.0, help="stop here, with all states saved")
    add("--at-once", type=int, default=3, help="rows that run at once on each device")
    add("--written", type=int, default=4_000_000, help="tokens of training text that the model writes; 0 for none")
    add("--written-length", type=int, default=1024, help="tokens of a document that the model writes")
    add("--length", type=int, default=2048, help="tokens of a training sequence")
    add("--batch", type=int, default=32, help="sequences of a step of the joint training")
    add("--micro", type=int, default=16, help="sequences in a pass of the joint training; fewer where rows share a GPU")
    add("--windows", type=int, default=64, help="windows of text at the shortest length, fewer at longer ones")
    add("--prompts", type=int, default=50, help="prompts of each kind and length")
    add("--held-out", default="14263_katrine.txt", help="the book that is measured on")
    add("--zero-shot", type=Path, help="folder of task files for lm-eval, in lm_eval_tasks/, and of the data they name")
    add("--items", type=int, default=500, help="first items of every zero-shot task")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of every row's recipe")
    parser.set_defaults(base_processes=1)  # a script whose `base` can run in several has an option for it
    add("--child", help=argparse.SUPPRESS)
    add("--seed", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def main(
    options: argparse.Namespace,
    rows: Collection[str],
    run_row: Callable[[argparse.Namespace, str, int], None],
    print_table: Callable[[Path], None],
    once: Collection[str] = (),
    first: Collection[str] = (),
) -> None:
    """Run the rows that are asked for, and print the table; in the process of a row run that one.

    Args:
        rows: names of all rows.
        run_row: does a row's work, that of `base` as well.
        print_table: prints what is in the folder.
        once: rows that run with the first seed alone.
        first: rows that the others start from, and that run before them, named or not.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")  # of what is float32 beside bfloat16: features and states in training
    if options.child:
        options.texts, options.out = options.texts.resolve(), options.out.resolve()
        if options.zero_shot is not None:
            os.chdir(options.zero_shot)  # the task files name their data from here
        run_row(options, options.child, options.seed)
        return
    end = time.monotonic() + 60 * options.minutes
    named = [name for name in options.rows.split(",") if name != BASE]
    if unknown := set(named) - set(rows):
        sys.exit(f"no row {', '.join(sorted(unknown))}; rows are {', '.join(rows)}")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    opening = [(row, seed) for seed in seeds for row in (BASE, *first)]
    asked = [(row, seed) for seed in seeds for row in named if seed == seeds[0] or row not in once]
    if not first:
        supervise([*opening, *asked], options, end)
    elif supervise(opening, options, end):
        supervise(asked, options, end)
    print_table(options.out)


def figures(options: argparse.Namespace, row: str, seed: int) -> Path:
    """The file of a row's figures; it is there when the row is done."""
    return Path(options.out / f"{row}-{seed}.json")


def shared_is_ready(options: argparse.Namespace, seed: int) -> None:
    """Let the other rows of a seed start from the folder of `base`, which goes on with its own measurements."""
    write_text(options.out / f"{BASE}-{seed}.ready", "what rows have in common is made\n")


def measure_base(
    options: argparse.Namespace, session: Session, seed: int, readings: Iterable[tuple[str, list[Measure]]]
) -> None:
    """The figures of `base`, which are the dense model's, once the other rows of the seed may start beside it."""
    shared_is_ready(options, seed)
    found = measure(options, session, None, readings)
    write_json(figures(options, BASE, seed), {"row": DENSE, "seed": seed, "cells": found})


def may_start(options: argparse.Namespace, row: str, seed: int) -> bool:
    """Whether a row finds in the folder of `base` what it starts from."""
    ready = options.out / f"{BASE}-{seed}.ready"
    return row == BASE or ready.is_file() or figures(options, BASE, seed).is_file()


def supervise(asked: Sequence[tuple[str, int]], options: argparse.Namespace, end: float) -> bool:
    """Run rows in processes of their own, so many at once, until they are done or the time is over; whether they are.

    Rows that are done are left out. One that fails is told, with the end of its log, and the others go on; those that
    wait for a base that failed are left out.
    """
    waiting = [(row, seed) for row, seed in asked if not figures(options, row, seed).is_file()]
    running, places, done = dict[tuple[str, int], Any](), dict[tuple[str, int], str | None](), True
    command = [sys.executable, *sys.argv]
    devices = devices_of(options.device)
    while waiting or running:
        while len(running) < options.at_once * len(devices) and time.monotonic() < end - 30:
            able = next((key for key in waiting if may_start(options, *key)), None)
            if able is None:
                break
            waiting.remove(able)
            row, seed = able
            taken = Counter(places[key] for key in running)
            place = places[row, seed] = min(devices, key=lambda device: taken[device])
            seen = {} if place is None else {"CUDA_VISIBLE_DEVICES": place}
            log = (options.out / f"{row}-{seed}.log").open("ab")
            child = [*command, "--child", row, "--seed", str(seed)]
            if row == BASE and options.base_processes > 1:
                start = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
                child, seen = [child[0], *start, str(options.base_processes), *child[1:]], {}
            running[row, seed] = subprocess.Popen(child, stdout=log, stderr=subprocess.STDOUT, env=os.environ | seen)
            print(f"{row}-{seed}: started" + (f" on GPU {place}" if len(devices) > 1 else ""), flush=True)
        if time.monotonic() > end:
            end_all(running.values())
        for (row, seed), process in list(running.items()):
            if process.poll() is None:
                continue
            del running[row, seed]
            finished = figures(options, row, seed).is_file()
            done = done and finished
            print(f"{row}-{seed}: {'done' if finished else f'ended with {process.returncode}'}", flush=True)
            if not finished:
                lines = (options.out / f"{row}-{seed}.log").read_text(errors="replace").splitlines()
                print("\n".join(f"    {line[:300]}" for line in lines[-6:]), flush=True)
        if not running and (time.monotonic() > end - 30 or not any(may_start(options, *key) for key in waiting)):
            return done and not waiting
        time.sleep(0.5)
    return done


def devices_of(device: str) -> list[str | None]:
    """The GPUs that rows are spread over, as CUDA_VISIBLE_DEVICES names them; None for a device by name or a CPU."""
    if device not in ("auto", "cuda") or torch.cuda.device_count() < 2:
        return [None]
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return list(named.split(",") if named else map(str, range(torch.cuda.device_count())))


class Lines:
    """Says everything in lines of a log, and of long work what is done every ten seconds."""

    def say(self, line: str) -> None:
        """One line with the time; of several processes of a row the main one's."""
        if not is_helper():
            print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)

    def progress(self, title: str) -> Any:
        """See `Reporter.progress`."""
        last = [time.monotonic()]

        def report(done: int, total: int, what: str) -> None:
            if time.monotonic() > last[0] + 10:
                last[0] = time.monotonic()
                self.say(f"{title}: {done}/{total} {what}")

        return nullcontext(report)


@contextmanager
def session_of(options: argparse.Namespace, row: str, seed: int, recipe: dict[str, Any]) -> Iterator[Session]:
    """A row's run, whose folder starts as a copy of that of `base`; of `base` in each of its processes."""
    folder, base = options.out / f"{row}-{seed}", options.out / f"{BASE}-{seed}"
    if row != BASE and not folder.exists():
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(base, part, ignore=shutil.ignore_patterns(".lock"))
        os.rename(part, folder)
    path = options.out / f"{row}-{seed}.yaml"
    recipe = {**recipe, "model": options.model, "device": options.device, "dtype": options.dtype, "seed": seed}
    write_text(path, yaml.safe_dump({**recipe, "output": str(folder)}, sort_keys=False))
    launched = {"helper": is_helper(), "helpers": launch() is not None}
    with open_session(load_recipe(path, options.set), Lines(), **launched) as session:
        yield session


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
        sys.exit(f"no book (*.txt) in {options.texts}")
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


def paragraphs(file: Path) -> list[str]:
    """Of a text; its lines are paragraphs where no line is empty."""
    text = file.read_text(encoding="utf-8", errors="replace")
    return [part for part in text.split("\n\n" if "\n\n" in text else "\n") if part.strip()]


def training_text(options: argparse.Namespace, file: Path | None = None) -> dict[str, Any]:
    """The source of training text: the corpus or another file, and beside it what the model writes."""
    path = corpus(options) if file is None else file
    own = {"source": "undivided", "path": str(path)}
    if not options.written:
        return own
    size = path.stat().st_size // 4  # tokens, about
    total = options.written + size
    share = round(options.written / total, 3)
    return {"source": "generated", "tokens": total, "length": options.written_length, "given": own, "share": share}


def dense_variant(session: Session) -> Variant:
    """The dense model as it was."""
    dense, itemsize = session.loaded.model, session.loaded.model.dtype.itemsize
    return Variant("dense", lambda: dense, "dense", lambda length: session.shape.dense_cost(length, itemsize))


def measure(
    options: argparse.Namespace,
    session: Session,
    variant: Variant | None,
    readings: Iterable[tuple[str, list[Measure]]],
) -> dict[str, float | None]:
    """Every figure of a variant, or of the dense model, as `text/figure/length`; the dense model's are measured once.

    Those of single query heads, such as their load, are `text/figure/length/layer/head,head`.

    Args:
        readings: what is measured, by the text that it reads.
    """
    rows = [dense_variant(session), *([] if variant is None else [variant])]
    found: dict[str, float | None] = {}
    for text, asked in readings:
        comparison = compare(
            session.loaded,
            rows,
            asked,
            seed=0,
            batch_size=min(25, options.prompts),
            cache_dir=options.out / "measured",
            progress=_reported(f"measuring, {text}"),
        )
        for cell in comparison.variants[-1].cells:
            if cell.part is None and cell.place is None:
                found[f"{text}/{cell.label}/{cell.length}"] = cell.value
            elif cell.place is not None and cell.heads is not None:
                heads = ",".join(map(str, cell.heads))
                found[f"{text}/{cell.label}/{cell.length}/{cell.place[0]}/{heads}"] = cell.value
    return found


def _reported(title: str) -> Any:
    with Lines().progress(title) as report:
        return report


def texts_of(options: argparse.Namespace) -> dict[str, UndividedText]:
    """The texts that are measured on, by name: the book, and WikiText-2's test part if it is there."""
    texts, test = {"book": UndividedText(path=str(held_out(options)))}, wiki(options.texts, "test")
    return texts if test is None else texts | {"wikitext-2": UndividedText(path=str(test))}


def perplexities(options: argparse.Namespace, text: UndividedText, lengths: Sequence[int]) -> list[Measure]:
    """Perplexity of a text at every length, of as many tokens at each."""
    made = []
    for length in lengths:
        fitting = max(1, len(text.load()) // (5 * length))  # windows that there are at the least
        windows = max(1, min(options.windows, fitting) * lengths[0] // length)
        made.append(measures["perplexity"](text=text, length=length, windows=windows))
    return made


def recalls(options: argparse.Namespace, lengths: Sequence[int]) -> list[Measure]:
    """Recall of pass keys and of key-value pairs at every length."""
    entries = [
        {"task": task, "length": n, "count": options.prompts} for task in ("passkey", "key_value") for n in lengths
    ]
    return measures["recall"].of([tasks.parse(entry) for entry in entries])


def zero_shot(options: argparse.Namespace) -> list[Measure]:
    """The zero-shot tasks, where a folder of them is given; a child's working directory is that folder."""
    if options.zero_shot is None:
        return []
    return [measures["lm_eval"](tasks=ZERO_SHOT, include="lm_eval_tasks", limit=options.items, batch_size=32)]


def zero_shot_mean(cells: Mapping[str, float | None]) -> float | None:
    """Mean over the zero-shot tasks in a row's figures of each one's main metric; None where one was not measured."""
    found = {key.split("/")[1]: value for key, value in cells.items()}
    values = [found.get(task) for task in ZERO_SHOT]
    return None if None in values else sum(value for value in values if value is not None) / len(values)


def read_rows(folder: Path, order: Sequence[str]) -> list[dict[str, Any]]:
    """The rows that are done, in an order of their names; all their numbers are left in `rows.json`."""
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*-*.json"))]
    if not rows:
        print("no row is done yet; run the same command again")
        return []
    places = {name: place for place, name in enumerate([DENSE, *order])}
    rows.sort(key=lambda row: (places.get(row["row"], len(places)), row["seed"]))
    write_json(folder / "rows.json", rows)
    return rows


def print_lines(lines: Sequence[Sequence[str]]) -> None:
    """A table, its head first."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        print("  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip())
