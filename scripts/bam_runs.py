"""Several models as one on two texts, row by row beside their controls: trained, measured, and put into one table.

python scripts/bam_runs.py --texts FOLDER --out FOLDER [--pair wiki,code] [--rows A,B] [--seeds 0,1]

Two copies of a model are fine-tuned, each on one of two texts (`--pair` of WikiText-2, `wiki`, novels, `novels`, and
Python's standard library, `code`), and then become one model, which is trained on the mix of both. Rows:

    wiki, novels, code         the experts, each trained on its text
    wiki-mixed, ...            each of them, trained on the mix as the upcycled models are
    average                    the mean of their weights, trained on the mix
    dense                      the model itself, trained on the mix on the tokens of all three trainings together
    ffn                        MLP experts alone, all mixed by gates, and one attention (the mean of both)
    bam                        attention and MLP experts, all mixed by gates, each with keys and values of its own
    bam-shared                 the same with shared keys and values
    bam-top1                   as bam, with one MLP a token, as published; ffn-top1 likewise
    bam-random                 as bam-top1, with routers that start at random, as published, and not from the texts
    bam-p                      as bam-random, with MLPs times the router's share, as published
    bam-three                  as bam-random, with the model itself as a third expert, as published
    bam-routers                as bam, with its routers trained alone; ffn-routers likewise
    bam-gentle, average-gentle with a fifth of the rate in the training on the mix

bam-random, bam-p, bam-three and ffn-top1 run only where they are named. An expert reads less than two passes of its
text, and the mix has as many tokens: with more, the novels are learnt by heart (profiles/smollm2-135m/bam). With
`--fresh` the experts read the first half of their texts and the mix is of the second halves, so that no row reads again
in it what its start has read; `dense` reads all of it. WikiText-2's training part is trained on and its test part
measured on; of every novel the first nine tenths are trained on and the rest is measured
on; of the standard library's files every tenth of a shuffled order is measured on, and of the others as many are
trained on as WikiText-2's part is long. In the mix both texts have the same share: the shorter one is repeated. FOLDER
of texts has novels (*.txt, in it or in pg_books/) and WikiText-2's raw files (wiki.train*.txt and wiki.test*.txt, in it
or in wikitext2/).

The experts are trained first, everything else once they are done, in `--at-once` processes on each GPU. After
`--minutes` rows that still train save their state, and the same command goes on there; a row that is done is only read.
The table has every row of the folder that is done, and FOLDER/rows.json all its numbers. Under it are the gates of
each upcycled row on each text: the expert of a text is named by them if its gate is the highest there.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from compress.data.text import UndividedText
from compress.evaluate.measure import Measure, Variant
from compress.files import write_json, write_text
from compress.models.load import load_model
from compress.models.planned import planned_model
from compress.models.tokenizer_files import write_tokenizer
from compress.models.trained import load_trained
from compress.models.upcycle import average
from compress.plan import Plan
from compress.runtime.step import Record
from compress.stages.plan import finished_plan
from compress.stages.recover import train_stage
from compress.stages.session import Session
from compress.stages.upcycle import upcycle_stage
from compress.train.curve import Curve
from compress.train.recovery import Recovered, read_recovered, recover
from compress.train.settings import RecoverSettings
from scripts import rows

TEXTS = ("wiki", "novels", "code")
TRAINED = 0.9  # share of a novel that is trained on
NO_LIBRARY = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3"}  # folders beside the library


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        start: the row whose weights a dense model starts from, `seed` or `average`; empty for an upcycled model.
        text: what it is trained on, the text of an expert, the `mix`, or `all`, the mix of all that any row reads.
        upcycle: keys of the recipe's `upcycle`.
        routers: whether routers are trained alone.
        slower: what the highest learning rate is divided by.
        named: whether it runs only where it is named.
    """

    start: str = ""
    text: str = "mix"
    upcycle: dict[str, Any] = field(default_factory=dict)
    routers: bool = False
    slower: float = 1.0
    named: bool = False


TOP = {"mlp": {"top": 1}}
RANDOM = {"texts": [], "start": "random", **TOP}
ROWS = {
    **{name: Row("seed", name) for name in TEXTS},
    **{f"{name}-mixed": Row(name) for name in TEXTS},
    "average": Row("average"),
    "dense": Row("seed", "all"),
    "ffn": Row(upcycle={"attention": "base"}),
    "bam": Row(),
    "bam-shared": Row(upcycle={"kv": "shared"}),
    "bam-top1": Row(upcycle=TOP),
    "bam-routers": Row(routers=True),
    "ffn-routers": Row(upcycle={"attention": "base"}, routers=True),
    "bam-gentle": Row(slower=5.0),
    "average-gentle": Row("average", slower=5.0),
    "ffn-top1": Row(upcycle={"attention": "base", **TOP}, named=True),
    "bam-random": Row(upcycle=RANDOM, named=True),
    "bam-p": Row(upcycle=RANDOM | {"mlp": {"top": 1, "weight": "p"}}, named=True),
    "bam-three": Row(upcycle=RANDOM | {"seed": True}, named=True),
}


def main() -> None:
    """Train and measure the rows that are asked for, and print the table."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--pair", type=pair, default=("wiki", "novels"))
    pair_named = first.parse_known_args()[0].pair
    others = {f"{name}{end}" for name in set(TEXTS) - set(pair_named) for end in ("", "-mixed")}
    usual = [name for name, row in ROWS.items() if not row.named and name not in others]
    parser = rows.arguments((__doc__ or "").splitlines()[0], usual)
    add = parser.add_argument
    add("--expert-tokens", type=int, default=409_600, help="that each expert is trained on")
    add("--tokens", type=int, default=409_600, help="of the mix that each other row is trained on")
    add("--rate", type=float, default=1e-4, help="highest learning rate of all trainings")
    add("--router-rate", type=float, default=1e-3, help="the same of routers")
    add("--balance", type=float, default=0.01, help="weight of the load balance of MLPs")
    add(
        "--balance-over",
        choices=("sequence", "pass"),
        default="pass",
        help="tokens that their load is taken over; over a sequence, every text has to use all experts",
    )
    add("--router-z", type=float, default=1e-3, help="weight of the squared log-sum-exp of their routers' logits")
    add("--router-tokens", type=int, default=32_768, help="of each expert's text that routers start from")
    add("--fresh", action="store_true", help="the mix is of text that no expert has read")
    parser.set_defaults(length=512, batch=8, micro=8, windows=128)
    add("--pair", type=pair, default=pair_named, help="the texts of the two experts, by a comma")
    options = parser.parse_args()
    if unread := others & set(options.rows.split(",")):
        parser.error(f"rows of texts that are not in --pair: {', '.join(sorted(unread))}")
    rows.main(options, ROWS, run_row, print_table, first=pair_named)


def pair(text: str) -> tuple[str, ...]:
    """Two texts by a comma."""
    names = tuple(text.split(","))
    if len(set(names)) != 2 or not set(names) <= set(TEXTS):
        raise argparse.ArgumentTypeError(f"expected two of {', '.join(TEXTS)}")
    return names


def run_row(options: argparse.Namespace, name: str, seed: int) -> None:
    """All of a row, and its figures; of `base` those of the model as it is."""
    with rows.session_of(options, name, seed, recipe_of(options, name, seed)) as session:
        if name == rows.BASE:
            rows.measure_base(options, session, seed, readings(options))
            return
        facts: dict[str, Any] = {}
        if ROWS[name].start:
            weights = options.out / f"{name}-{seed}" / "trained"
            record, variant = trained_dense(options, session, name, seed)
        else:
            plan = upcycle_stage(session)
            (weights,) = train_stage(session, "recover")
            record, variant = read_recovered(weights), upcycled(session, name, plan, weights)
            longest = {amount.kind: amount.fraction for amount in plan.predicted.longest}
            facts |= {"costs": longest, "gates": gates_of(options, session, variant.build())}
        found = rows.measure(options, session, variant, readings(options))
        steps = Curve(weights / "loss.jsonl").steps()
        facts |= {
            "tokens": record.tokens,
            "speed": record.tokens / record.seconds,
            "first loss": record.first_loss,
            "loss": record.last_loss,
            "text loss": [steps[end].get("text_loss", steps[end]["loss"]) for end in (0, -1)],
            "memory": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
            "device": record.device,
        }
        write_json(rows.figures(options, name, seed), {"row": name, "seed": seed, **facts, "cells": found})


def recipe_of(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """A row's recipe, as plain data; dense rows have it for the model and the texts alone."""
    row = ROWS.get(name, Row())
    texts = [undivided(options, expert) for expert in options.pair]
    return {
        "calibration": {"text": undivided(options, "mix")},
        "upcycle": {
            "experts": [str(expert_of(options, expert, seed)) for expert in options.pair],
            "texts": texts,
            "text_tokens": options.router_tokens,
            **row.upcycle,
        },
        "recover": {
            **training(options, options.tokens, row),
            "text": undivided(options, "mix"),
            "mixer_rate": options.router_rate,
            "objectives": [
                {"name": "text"},
                {"name": "balance", "weight": options.balance, "over": options.balance_over},
            ],
            "router_z": options.router_z,
        },
        "evaluate": {"compare": ["plan"]},
    }


def training(options: argparse.Namespace, tokens: int, row: Row) -> dict[str, Any]:
    """How a row is trained, as keys of `recover`."""
    return {
        "train": "mixers" if row.routers else "full",
        "length": options.length,
        "batch_size": options.batch,
        "micro_batch": min(options.micro, options.batch),
        "tokens": tokens,
        "rate": options.rate / row.slower,
        "save_every": 100,
    }


def expert_of(options: argparse.Namespace, expert: str, seed: int) -> Path:
    """Where an expert's checkpoint lies."""
    return Path(options.out / f"{expert}-{seed}" / "model")


def trained_dense(options: argparse.Namespace, session: Session, name: str, seed: int) -> tuple[Recovered, Variant]:
    """A model of the dense architecture, trained now or before; an expert's is left as a checkpoint, too."""
    row, folder = ROWS[name], options.out / f"{name}-{seed}" / "trained"
    counts = {"dense": len(options.pair) * options.expert_tokens + options.tokens}
    count = counts.get(name, options.expert_tokens if name in TEXTS else options.tokens)
    settings = RecoverSettings(**training(options, count, row))
    if not (folder / "recover.json").is_file():
        model = start_of(options, session, row.start, seed)
        source = UndividedText(path=undivided(options, row.text)["path"])
        with session.reporter.progress(name) as report:
            tokens = session.reader(report).ids(source, "calibration", settings.text_tokens)
            recover(model, settings, tokens, folder, seed=seed, progress=report)
    record = read_recovered(folder)

    def build() -> Any:
        return load_trained(copy.deepcopy(session.loaded.model), folder)

    if name in TEXTS and not (expert_of(options, name, seed) / "config.json").is_file():
        model, place = build(), expert_of(options, name, seed)
        model.save_pretrained(place)
        write_tokenizer(session.loaded.folder, session.loaded.tokenizer, place, model.config, session.reporter.say)
    dense = rows.dense_variant(session)
    return record, Variant(f"{name}, trained", build, record.sha256, dense.cost)


def start_of(options: argparse.Namespace, session: Session, start: str, seed: int) -> Any:
    """The weights that a dense row's training starts from."""
    if start == "seed":
        return copy.deepcopy(session.loaded.model)
    names = options.pair if start == "average" else (start,)
    device = str(session.loaded.model.device)
    experts = [
        load_model(str(expert_of(options, name, seed)), dtype=options.dtype, device=device).model for name in names
    ]
    return average(experts) if start == "average" else experts[0]


def upcycled(session: Session, name: str, plan: Plan, weights: Path) -> Variant:
    """A row's upcycled model."""
    dense, itemsize = session.loaded.model, session.loaded.model.dtype.itemsize

    def build() -> Any:
        return load_trained(planned_model(dense, finished_plan(session)), weights)

    key = read_recovered(weights).sha256
    return Variant(f"{name}, trained", build, key, lambda length: plan.cost(length, itemsize))


@torch.no_grad()
def gates_of(options: argparse.Namespace, session: Session, model: Any) -> dict[str, dict[str, list[float]]]:
    """By text and kind, the mean over layers and tokens of every expert's gate: that of its attention, and that of its
    MLP, or how often it is chosen."""
    found: dict[str, dict[str, list[float]]] = {}
    for name in options.pair:
        text = UndividedText(path=str(text_file(options, f"{name}-test")))
        ids = torch.tensor(session.reader(None).ids(text, "evaluation", 16 * options.length))
        windows = ids[: len(ids) // options.length * options.length].view(-1, options.length)[:16]
        sums: dict[str, list[torch.Tensor]] = {}
        for window in windows:
            record = Record()
            model.base_model(input_ids=window[None].to(model.device), use_cache=False, compress_record=record)
            gates = list(record.expert_gates.values())
            mlps = [each.probs if each.mixed else each.chosen for each in record.mlp_routing.values()]
            for kind, values in (("attention", gates), ("mlp", mlps)):
                if values:
                    mean = torch.stack([each.double().mean(0).cpu() for each in values]).mean(0)
                    sums.setdefault(kind, []).append(mean)
        found[name] = {kind: torch.stack(means).mean(0).tolist() for kind, means in sums.items()}
    return found


def undivided(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """A training text, as a recipe names it."""
    return {"source": "undivided", "path": str(text_file(options, name))}


def text_file(options: argparse.Namespace, name: str) -> Path:
    """One of the texts: that of an expert, its part that is measured on (`-test`), or the `mix`."""
    path: Path = options.out / "texts" / f"{name}.txt"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        for made, text in texts_of(options).items():
            write_text(path.with_name(f"{made}.txt"), text)
    return path


def texts_of(options: argparse.Namespace) -> dict[str, str]:
    """All texts of the pair by name, the mix that they are trained on together, and the mix of `all`."""
    made, wholes, later = dict[str, str](), [], []
    for name in options.pair:
        whole, made[f"{name}-test"] = PARTS[name](options)
        made[name], behind = halves(whole) if options.fresh else (whole, whole)
        wholes.append(whole)
        later.append(behind)
    return made | {"mix": mixed(later), "all": mixed(wholes)}


def mixed(texts: list[str]) -> str:
    """Two texts in one, the shorter one repeated until both have the same share."""
    shorter, longer = sorted(texts, key=len)
    times, more = divmod(len(longer), len(shorter))
    return "\n\n".join([longer, *[shorter] * times, shorter[:more]])


def halves(text: str) -> tuple[str, str]:
    """A text in two parts of about the same length, cut where a line ends."""
    cut = text.index("\n", len(text) // 2)
    return text[:cut], text[cut:]


def of_wiki(options: argparse.Namespace) -> tuple[str, str]:
    """What is trained on of WikiText-2, and what is measured on."""
    train, test = rows.wiki(options.texts, "train"), rows.wiki(options.texts, "test")
    if train is None or test is None:
        sys.exit(f"expected wiki.train*.txt and wiki.test*.txt in {options.texts}")
    return read(train), read(test)


def of_novels(options: argparse.Namespace) -> tuple[str, str]:
    """The same of the novels."""
    novels = [read(book) for book in rows.books(options.texts) if not book.name.startswith("wiki.")]
    if not novels:
        sys.exit(f"expected novels (*.txt) in {options.texts}")
    parts = [(book[: cut_of(book)], book[cut_of(book) :]) for book in novels]
    return "\n\n".join(part for part, _ in parts), "\n\n".join(part for _, part in parts)


def of_code(options: argparse.Namespace) -> tuple[str, str]:
    """The same of Python's standard library, as this interpreter has it."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in library.rglob("*.py") if not NO_LIBRARY & set(path.relative_to(library).parts)]
    files.sort()
    random.Random(0).shuffle(files)
    train = "\n\n".join(read(path) for number, path in enumerate(files) if number % 10)
    return train[: len(of_wiki(options)[0])], "\n\n".join(read(path) for path in files[::10])


def read(path: Path) -> str:
    """A file's text."""
    return path.read_text(encoding="utf-8", errors="replace")


PARTS = {"wiki": of_wiki, "novels": of_novels, "code": of_code}


def cut_of(book: str) -> int:
    """Where the part of a novel begins that is measured on: the first paragraph behind nine tenths of it."""
    place = book.find("\n\n", int(len(book) * TRAINED))
    return place if place >= 0 else int(len(book) * TRAINED)


def readings(options: argparse.Namespace) -> Iterator[tuple[str, list[Measure]]]:
    """What is measured, by the text that it reads."""
    for name in options.pair:
        text = UndividedText(path=str(text_file(options, f"{name}-test")))
        yield name, rows.perplexities(options, text, [options.length])


def print_table(folder: Path) -> None:
    """The rows that are done, and the gates of those that have any."""
    found = rows.read_rows(folder, list(ROWS))
    if not found:
        return
    cells = [key.split("/") for key in found[0]["cells"] if "/perplexity/" in key]
    pair_named, length = [text for text, *_ in cells], int(cells[0][2])
    texts = ", ".join(pair_named)
    print(f"\n{texts}: perplexity of the parts that no row was trained on, at {length:,} tokens; mean: of the two")
    print("tokens: in this row's own training; loss: of the text, in its first and its last step; parameters, flops,")
    print("cache: beside the model's, of the layers and at the longest length that its context allows; speed: tokens a")
    print("second in training\n")
    head = ("row", "seed", *pair_named, "mean", "tokens", "loss", "parameters", "flops", "cache", "speed")
    lines: list[tuple[str, ...]] = [head]
    for row in found:
        values = [row["cells"].get(f"{name}/perplexity/{length}") for name in pair_named]
        known = [value for value in values if value is not None]
        costs = [row.get("costs", {}).get(kind, 1.0) for kind in ("parameters", "flops", "kv")]
        lines.append(
            (
                row["row"],
                str(row["seed"]),
                *("-" if value is None else f"{value:.3f}" for value in values),
                f"{sum(known) / len(known):.3f}" if len(known) == len(values) else "-",
                f"{row['tokens']:,}" if "tokens" in row else "-",
                "{:.3f} to {:.3f}".format(*row["text loss"]) if "text loss" in row else "-",
                *(f"{cost:.2f}" for cost in costs),
                f"{row['speed']:,.0f}" if "speed" in row else "-",
            )
        )
    rows.print_lines(lines)
    print()
    for row in found:
        for text, kinds in row.get("gates", {}).items():
            for kind, means in kinds.items():
                expert = pair_named.index(text) + len(means) - len(pair_named)  # the model itself is the first of three
                word = "named" if max(means) == means[expert] else "NOT named"
                shown = ", ".join(f"{mean:.3f}" for mean in means)
                what = "mean gate of attentions" if kind == "attention" else "mean gate, or share chosen, of MLPs"
                print(f"{row['row']}-{row['seed']} on {text}: {what} {shown}; the expert of {text} is {word}")


if __name__ == "__main__":
    main()
