"""Linear heads on one model, row by row beside their controls: trained, measured, and put into one table.

python scripts/linear_runs.py --texts FOLDER --out FOLDER [--rows a,b,c,d,window,dense,...] [--seeds 0,1]

Rows, all behind a window of 64 tokens and a page of the first ones:

    a        every head group linear (Hedgehog's map, prepared on attention weights, then distilled as a whole)
    b        half of the groups, those of the least error after their preparation
    c        all but the tenth that retrieves most
    d        all but the fiftieth that retrieves most
    d-refined  full, windows and linear groups in the bytes of row d, exchanged by what documents of retrieval lose
    window   row a without its states, trained on the same tokens
    c-window row c without its states, trained on the same tokens
    dense    the dense model, trained on the text of the same tokens
    lolcats  recipes/smollm2-lolcats.yaml
    undo     row a with features of queries and keys before RoPE, so that no position is new to them
    delta    row a with the gated delta rule
    taylor   row a with Based's map, 273 features; wide: with four times Hedgehog's features, 512
    a-asked  row a, trained on text that states facts and asks for them later; window-asked: its windows alone

Every row is a recipe, recipes/smollm2-hedgehog.yaml with other keys, whose stages run as in `compress run`, in a
run folder of its own: FOLDER/ROW-SEED. What rows have in common (profile, written text, preparation, the dense
model's figures) is made once, in FOLDER/base-SEED, on `--base-processes` GPUs. Rows run in `--at-once` processes on
each GPU. After `--minutes` those that still train save their state, and the same command goes on there; a row that
is done is only read. The table has every row of the folder that is done, and FOLDER/rows.json all its numbers.

FOLDER of texts has books (*.txt, in it or in pg_books/), of which one is held out, and WikiText-2's raw files in it or
in wikitext2/, if any: wiki.train*.txt is trained on, wiki.test*.txt measured on.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from compress.evaluate.measure import Measure, Variant
from compress.files import write_json, write_text
from compress.models.planned import planned_model
from compress.models.trained import load_trained
from compress.plan import Plan
from compress.registry import measures
from compress.search.measure import plan_key
from compress.stages.prepare import prepare_stage
from compress.stages.profile import profile_stage
from compress.stages.recover import train_stage
from compress.stages.search import search_stage
from compress.stages.session import Session
from compress.targets.cost import Cost
from compress.train.recovery import read_recovered
from compress.train.window_dropout import windows_only
from scripts import rows
from scripts.facts import with_facts

RECIPES = Path(__file__).parent.parent / "recipes"
HEDGEHOG = {"target": "linear", "map": "hedgehog", "sink": 4, "alpha": 64}
UNDO = HEDGEHOG | {"rope": "undo"}
DELTA = {"target": "linear", "rule": "delta", "sink": 4, "alpha": 64}
TAYLOR, WIDE = HEDGEHOG | {"map": "taylor"}, HEDGEHOG | {"features": 512}
# Of a refined row: the part of the dense cache's bytes, which is two full groups of SmolLM2's 90, and the time.
REFINED, REFINE_MINUTES = 0.0625, 3.0
# Of text with facts: how often the corpus is read, each time with other facts; characters between two statements, and
# from a statement to its question, of which every doubling is as likely as another: 75 to 7,500 tokens.
ROUNDS, STATED, GAPS = 4, 600, (300.0, 30_000.0)


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        keep: keys of the solver `keep`, which leaves head groups full.
        training: which of the trainings of `train_stage` it is.
        recipe: in recipes/, without its first word.
        asked: whether facts are stated and asked for in the text of the joint training.
        refined: whether a search exchanges full, windows and the target by what documents of retrieval lose.
    """

    keep: dict[str, Any]
    training: str = "recover"
    recipe: str = "hedgehog"
    asked: bool = False
    refined: bool = False

    @classmethod
    def of(cls, share: float, target: dict[str, Any] = HEDGEHOG, statistic: str = "retrieval", **more: Any) -> Row:
        """With so many of the groups full, those that score most."""
        return cls({"target": target, "statistic": statistic, "share": share}, **more)


ROWS = {
    "a": Row.of(0.0),
    "b": Row.of(0.5, statistic="error"),
    "c": Row.of(0.1),
    "d": Row.of(0.02),
    "d-refined": Row.of(0.02, refined=True),
    "window": Row.of(0.0, training="windows"),
    "c-window": Row.of(0.1, training="windows"),
    "dense": Row.of(0.0, training="control"),
    "lolcats": Row({"statistic": "retrieval", "share": 0.0}, recipe="lolcats"),
    "undo": Row.of(0.0, UNDO),
    "delta": Row.of(0.0, DELTA),
    "taylor": Row.of(0.0, TAYLOR),
    "wide": Row.of(0.0, WIDE),
    "a-asked": Row.of(0.0, asked=True),
    "window-asked": Row.of(0.0, training="windows", asked=True),
}


def main() -> None:
    """Train and measure the rows that are asked for, and print the table."""
    parser = rows.arguments((__doc__ or "").splitlines()[0], ROWS)
    add = parser.add_argument
    add("--tokens", type=int, default=42_000_000, help="of the joint training of each row")
    add("--prepare-tokens", type=int, default=8_000_000, help="of the preparation of each target")
    parser.set_defaults(length=8192, batch=8, micro=4)  # as long as what is measured: see profiles/smollm2-135m/linear
    add("--prepare-length", type=int, default=8192, help="tokens of a sequence of the preparation")
    add("--prepare-batch", type=int, default=4, help="sequences of a step of the preparation")
    add("--lengths", default="2048,8192", help="tokens of the measures' inputs, by commas")
    add("--base-processes", type=int, default=1, help="of `base`, which write text and prepare together; one a GPU")
    rows.main(parser.parse_args(), ROWS, run_row, print_table)


def run_row(options: argparse.Namespace, row: str, seed: int) -> None:
    """All stages of a row, and its figures; of `base` what the other rows have in common."""
    with rows.session_of(options, row, seed, recipe_of(options, row)) as session:
        profile_stage(session)
        prepare_stage(session)
        if session.helper:
            return
        if row == rows.BASE:
            rows.measure_base(options, session, seed, readings(options))
            return
        plan = search_stage(session)
        which = ROWS[row].training
        (weights,) = train_stage(session, which)
        record = read_recovered(weights)
        trained = variant_of(session, row, plan, which, weights)
        found = rows.measure(options, session, trained, readings(options))
        facts: dict[str, Any] = {
            "tokens": record.tokens,
            "speed": record.tokens / record.seconds,
            "loss": record.last_loss,
        }
        full = sum(not group.words().startswith("sink") for layer in plan.layers for group in layer.groups)
        facts |= {"full groups": full, "first loss": record.first_loss, "device": record.device}
        write_json(rows.figures(options, row, seed), {"row": row, "seed": seed, **facts, "cells": found})


def text_with_facts(options: argparse.Namespace) -> Path:
    """The corpus, several times in one file, with facts that are stated and asked for later."""
    path: Path = options.out / "asked.txt"
    if not path.is_file():
        rng = random.Random("facts")
        paragraphs = rows.paragraphs(rows.corpus(options)) * ROUNDS
        write_text(path, "\n\n".join(with_facts(paragraphs, rng, STATED, GAPS)))
    return path


def recipe_of(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """A row's recipe, as plain data."""
    row = ROWS.get(name, ROWS["a"])
    recipe: dict[str, Any] = yaml.safe_load((RECIPES / f"smollm2-{row.recipe}.yaml").read_text())
    source, lengths = rows.training_text(options), sorted(map(int, options.lengths.split(",")))
    shortest = min(lengths)
    recipe["calibration"] = {
        "text": {"source": "file", "path": str(rows.corpus(options))},
        "documents": [
            {"task": "passkey", "length": shortest, "count": 8},
            {"task": "key_value", "length": shortest, "count": 8},
        ],
    }
    trained_on = rows.training_text(options, text_with_facts(options)) if row.asked else source
    recipe["prepare"] |= {"text": source, "tokens": options.prepare_tokens}
    recipe["recover"] |= {"text": trained_on, "tokens": options.tokens, "control": False, "window_control": False}
    recipe["recover"]["save_every"] = 200
    if target := row.keep.get("target"):
        recipe["prepare"] |= {
            "length": options.prepare_length,
            "batch_size": options.prepare_batch,
            "targets": [target],
        }
        recipe["recover"] |= {"length": options.length, "batch_size": options.batch}
        recipe["recover"]["micro_batch"] = min(options.micro, options.batch)
    else:  # its own batches, with no more text than the other rows
        length = min(options.length, recipe["recover"]["length"])
        recipe["prepare"] |= {"length": length, "tokens": options.tokens // 2}
        recipe["recover"] |= {"length": length, "tokens": options.tokens // 2}
    longest = max(8192, *lengths)
    recipe["search"] = {"solver": {"name": "keep", **row.keep}, "budget": {"kv": 1.0, "lengths": [longest]}}
    if row.refined:
        recipe["search"]["budget"]["kv"] = REFINED
        recipe["search"]["refine"] = {"minutes": REFINE_MINUTES, "rounds": 10, "spare": 0.02}
        recipe["calibration"]["training"] = [
            {"task": task, "length": length, "count": 4}
            for task in ("passkey", "key_value")
            for length in (shortest, longest)
        ]
    recipe["evaluate"] = {"compare": ["plan"]}
    return recipe


def variant_of(session: Session, row: str, plan: Plan, which: str, weights: Path) -> Variant:
    """A row's trained model."""
    dense, itemsize = session.loaded.model, session.loaded.model.dtype.itemsize

    def build() -> Any:
        if which == "control":
            return load_trained(copy.deepcopy(dense), weights)
        model = planned_model(dense, plan)
        return load_trained(windows_only(model) if which == "windows" else model, weights)

    def cost(length: int) -> Cost:
        return session.shape.dense_cost(length, itemsize) if which == "control" else plan.cost(length, itemsize)

    return Variant(f"{row}, trained", build, f"{which} {plan_key(plan)} {read_recovered(weights).sha256}", cost)


def readings(options: argparse.Namespace) -> Iterator[tuple[str, list[Measure]]]:
    """What is measured, by the text that it reads."""
    lengths = sorted(map(int, options.lengths.split(",")))
    longest = max(lengths)
    for name, text in rows.texts_of(options).items():
        asked = rows.perplexities(options, text, lengths)
        if name == "book":
            asked += rows.recalls(options, lengths)
            windows = max(1, options.windows // 16)
            asked.append(measures["branches"](text=text, length=longest, windows=windows, by="model"))
            asked.append(measures["distance"](lengths=tuple(lengths), count=max(2, options.prompts // 2)))
            asked += rows.zero_shot(options)
        yield name, asked


def print_table(folder: Path) -> None:
    """The rows that are done, and all their numbers in `rows.json`."""
    found = rows.read_rows(folder, list(ROWS))
    if not found:
        return
    lengths = sorted(
        {int(key.split("/")[2]) for row in found for key in row["cells"] if key.split("/")[1] == "perplexity"}
    )
    short, long = lengths[0], lengths[-1]
    dense = found[0]["cells"].get(f"book/KV bytes/{long}")
    print(
        f"\nbook, wikitext-2: perplexity at {short:,} and {long:,} tokens; pass key, key-value: recall at both lengths"
    )
    print(f"in|out: recall of pass keys, and of words, inside and beyond the window at {long:,} tokens")
    print(f"branches: perplexity at {long:,} tokens with both branches, the window, the state, neither")
    print(f"zero-shot: mean accuracy of {', '.join(name.removeprefix('local_') for name in rows.ZERO_SHOT)}")
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
        "zero-shot",
        "bytes",
        "speed",
    )
    lines = [head]
    for row in found:
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
                "-" if (mean := rows.zero_shot_mean(cells)) is None else f"{mean:.3f}",
                f"{share:.3f}",
                f"{row['speed']:,.0f}" if "speed" in row else "-",
            )
        )
    rows.print_lines(lines)


if __name__ == "__main__":
    main()
