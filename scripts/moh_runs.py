"""Routed heads on one model, row by row beside their controls: trained, measured, and put into one table.

python scripts/moh_runs.py --texts FOLDER --out FOLDER [--zero-shot FOLDER] [--rows A,B] [--seeds 0,1]

Rows, all trained on the same tokens with the same losses; SHARE is the percentage of the query heads that are on:

    UNIT-SHARE-ROUTER           routed heads: units are `group` or `head`, SHARE is 90, 75 or 50, and ROUTER is
                                `two_stage`, `norm` or, as a control, `random`
    UNIT-75-ROUTER-first        shared are the first half of a layer's units, as in the paper, not those that score best
    UNIT-75-ROUTER-free         no unit is shared
    UNIT-75-two_stage-relative  routers are prepared on what is more than usual of each unit (`relative`)
    UNIT-75-two_stage-both      `relative`, and no unit is shared
    UNIT-75-two_stage-fade      what a token does not use fades over the first third of the training (`fade`)
    UNIT-75-two_stage-loose     with a tenth of the balance loss; -slow: with a third of the routers' learning rate
    UNIT-75-two_stage-eased     `fade` with a fifth of the balance loss; -eased-relative and -eased-both are besides
                                prepared as the two above
    UNIT-75-two_stage-removal   scores are the statistic `removal`: what each head adds to the loss, token by token;
                                -eased-removal: as -eased besides
    group-75-two_stage-uneven   without a balance loss; -mean: with the mean over layers of it in place of the sum
    group-75-two_stage-mixers   trains the routers alone; -lora: with low-rank updates of the projections
    pruned-SHARE                removes as many groups of each layer as `group-SHARE` has off, those that score least
    dense                       the dense model

A layer's share is made by what is off in it: `group-75` has one of three groups off in 22 of 30 layers, those where
that costs least by the score, and leaves the others dense. Half of a layer's units are shared, rounded down, as long as
one is left to choose. Where a token chooses one unit alone, its gate is 1 with the gradient of its probability, since a
weight among one says nothing. Scores are the statistic `taylor`, but of -removal; of a group the sum over its query
heads.

Every row is recipes/smollm2-moh.yaml with other keys and a plan of its own, in FOLDER/ROW-SEED. What rows have in
common (profile, written text, the routers' preparation, the dense model's figures) is made once, in FOLDER/base-SEED.
Rows run in `--at-once` processes on each GPU. After `--minutes` those that still train save their state, and the same
command goes on there; a row that is done is only read. The table has every row of the folder that is done, and
FOLDER/rows.json all its numbers; FOLDER/plots draws the load of every head, a file a row. Rows that are not at 75% run
with the first seed alone. Where no rows are named, the forms from the second line to `-lora`, and `random` at other
shares than 75%, are left out.

FOLDER of texts has books (*.txt, in it or in pg_books/), of which one is held out, and WikiText-2's raw files in it or
in wikitext2/, if any: wiki.train*.txt is trained on, wiki.test*.txt measured on.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from compress.evaluate.measure import Measure, Variant
from compress.files import write_json, write_text
from compress.models.planned import planned_model
from compress.models.trained import load_trained
from compress.plan import LayerPlan, ModelShape, Plan, plan_of_layers, read_plan
from compress.plots.heads import HeadMap, draw_heads
from compress.profile.key import Key
from compress.profile.store import Profile
from compress.registry import measures
from compress.search.measure import plan_key
from compress.stages.prepare import prepare_stage
from compress.stages.profile import profile_stage
from compress.stages.recover import train_stage
from compress.stages.session import Session
from compress.stages.stage import timed
from compress.targets.full import FullGroup
from compress.targets.pruned import PrunedGroup
from compress.targets.routed import RoutedGroup
from compress.targets.target import Target
from compress.train.curve import Curve
from compress.train.recovery import read_recovered
from scripts import rows

RECIPE = Path(__file__).parent.parent / "recipes" / "smollm2-moh.yaml"
SHARES = (90, 75, 50)
MEAN = [
    {"name": "text", "weight": 0.5},
    {"name": "distill", "weight": 0.5},
    {"name": "balance", "over": "pass", "layers": "mean"},
]
PREPARED = [
    {"target": "routed", "unit": "group", "active": 2, "of": 3},
    {"target": "routed", "unit": "head", "active": 7, "of": 9},
]
PRICED = 8192  # tokens at which a plan's reads and operations are told


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        share: of the query heads that are on, in percent.
        unit: what is routed, or removed; None for the dense model.
        router: None where units are removed.
        shared: which units are always on: half of them by the `score`, the `first` half, or `none`.
        score: the statistic that ranks units, of which the highest are always on, and layers, of which the lowest are
            routed.
        recover, prepare: keys of these sections of the recipe that differ.
    """

    share: int = 100
    unit: str | None = None
    router: str | None = None
    shared: str = "score"
    score: str = "taylor"
    recover: tuple[tuple[str, Any], ...] = ()
    prepare: tuple[tuple[str, Any], ...] = ()


def all_rows() -> dict[str, Row]:
    """Every row by its name."""
    found = {"dense": Row()} | {f"pruned-{share}": Row(share, "group") for share in SHARES}
    for unit in ("group", "head"):
        for router in ("two_stage", "norm", "random"):
            found |= {f"{unit}-{share}-{router}": Row(share, unit, router) for share in SHARES}
    for unit in ("group", "head"):
        for router in ("two_stage", "norm"):
            found[f"{unit}-75-{router}-first"] = Row(75, unit, router, "first")
            found[f"{unit}-75-{router}-free"] = Row(75, unit, router, "none")
        relative = ("objectives", [{"name": "routing", "relative": True}])
        fade, loose, less = ("fade", 0.33), ("balance", 0.001), ("balance", 0.002)
        for eased in (False, True):
            own: tuple[tuple[str, Any], ...] = (fade, less) if eased else ()
            name = f"{unit}-75-two_stage-{'eased-' if eased else ''}"
            found[f"{name}relative"] = Row(75, unit, "two_stage", recover=own, prepare=(relative,))
            found[f"{name}both"] = Row(75, unit, "two_stage", "none", recover=own, prepare=(relative,))
        slow = ("mixer_rate", 1e-3)
        forms: dict[str, tuple[tuple[str, Any], ...]]
        forms = {"fade": (fade,), "loose": (loose,), "eased": (fade, less), "slow": (slow,)}
        for form, own in forms.items():
            found[f"{unit}-75-two_stage-{form}"] = Row(75, unit, "two_stage", recover=own)
        for end, own in (("", ()), ("eased-", (fade, less))):
            found[f"{unit}-75-two_stage-{end}removal"] = Row(75, unit, "two_stage", score="removal", recover=own)
    changed: dict[str, tuple[tuple[str, Any], ...]] = {
        "uneven": (("balance", 0.0),),
        "mean": (("objectives", MEAN),),
        "mixers": (("train", "mixers"), ("rate", 3e-3)),
        "lora": (("train", "lora"), ("mixer_rate", 3e-3)),
    }
    for name, keys in changed.items():
        found[f"group-75-two_stage-{name}"] = Row(75, "group", "two_stage", recover=keys)
    return found


ROWS = all_rows()
# Those that run where none are named: without the forms beside the main ones.
MAIN = [name for name, row in ROWS.items() if name.count("-") < 3 and (row.router != "random" or row.share == 75)]


def main() -> None:
    """Train and measure the rows that are asked for, and print the table."""
    parser = rows.arguments((__doc__ or "").splitlines()[0], MAIN)
    add = parser.add_argument
    add("--tokens", type=int, default=25_000_000, help="of the joint training of each row")
    add("--prepare-tokens", type=int, default=2_000_000, help="of the preparation of each target")
    add("--prepare-batch", type=int, default=16, help="sequences of a step of the preparation")
    add("--measured-length", type=int, default=2048, help="tokens of the measures' inputs")
    rows.main(parser.parse_args(), ROWS, run_row, print_table, once=[name for name in ROWS if not at_75(ROWS[name])])


def at_75(row: Row) -> bool:
    """Whether a row runs with every seed: those at 75%, and the dense model that they are compared with."""
    return row.share in (75, 100)


def run_row(options: argparse.Namespace, name: str, seed: int) -> None:
    """All stages of a row, and its figures; of `base` what the other rows have in common."""
    row = ROWS.get(name, Row())
    with rows.session_of(options, name, seed, recipe_of(options, row)) as session:
        profile = profile_stage(session)
        prepare_stage(session)
        if name == rows.BASE:
            rows.measure_base(options, session, seed, readings(options))
            return
        plan = decided(session, row, profile)
        which = "recover" if row.unit else "control"
        (weights,) = train_stage(session, which)
        record = read_recovered(weights)
        found = rows.measure(options, session, variant_of(session, name, row, plan, weights), readings(options))
        facts = {
            "tokens": record.tokens,
            "speed": record.tokens / record.seconds,
            "first loss": record.first_loss,
            "loss": record.last_loss,
            "text loss": Curve(weights / "loss.jsonl").steps()[-1].get("text_loss"),
            "device": record.device,
        }
        write_json(
            rows.figures(options, name, seed),
            {"row": name, "seed": seed, **facts, **costs_of(session, plan), "cells": found},
        )


def recipe_of(options: argparse.Namespace, row: Row) -> dict[str, Any]:
    """A row's recipe, as plain data."""
    recipe: dict[str, Any] = yaml.safe_load(RECIPE.read_text())
    source, length = rows.training_text(options), options.measured_length
    recipe["calibration"] = {
        "text": {"source": "file", "path": str(rows.corpus(options))},
        "documents": [
            {"task": "continuation", "length": length, "count": 8, "answer": "text", "answer_tokens": length // 2}
        ],
    }
    common = {"text": source, "length": options.length}
    recipe["prepare"] |= {**common, "tokens": options.prepare_tokens, "batch_size": options.prepare_batch}
    recipe["recover"] |= {**common, "tokens": options.tokens, "batch_size": options.batch, "save_every": 200}
    recipe["recover"] |= {"micro_batch": min(options.micro, options.batch), "control": False, **dict(row.recover)}
    recipe["profile"] = {"statistics": [{"name": row.score}]}
    recipe["prepare"] |= {"targets": PREPARED, **dict(row.prepare)}
    recipe["search"] = {"solver": {"name": "keep", "statistic": "error"}, "budget": {"kv": 1.0, "lengths": [PRICED]}}
    recipe["evaluate"] = {"compare": ["plan"]}
    return recipe


def decided(session: Session, row: Row, profile: Profile) -> Plan:
    """The row's plan, in the place of the one that a search would leave."""
    run = session.run
    if not run.stage_done("search", session.search_key()):
        heads = profile.tensor(Key(row.score, "heads")).double()
        plan = plan_of(session.shape, row, heads)
        timed(session, "search", session.search_key, ["plan.json"], lambda: write_text(run.plan, plan.to_json()))
    return read_plan(run.plan, session.shape)


def plan_of(shape: ModelShape, row: Row, heads: torch.Tensor) -> Plan:
    """A row's plan.

    Args:
        heads: scores of query heads, `[layers, groups, heads of a group]`.
    """
    scores = heads.flatten(1) if row.unit == "head" else heads.sum(-1)
    counts = off_by_layer(scores, row.share)
    layers = []
    for number, off in enumerate(counts):
        groups: list[Target] = [FullGroup()] * shape.kv_heads
        if off and row.router is None:
            removed = set(scores[number].argsort(stable=True)[:off].tolist())
            groups = [PrunedGroup() if group in removed else FullGroup() for group in range(shape.kv_heads)]
        elif off:
            groups = list(routed_layer(shape, row, scores[number], off))
        layers.append(LayerPlan(groups=tuple(groups)))
    return plan_of_layers(shape, layers, provenance={"script": "moh_runs", "share": row.share})


def off_by_layer(scores: torch.Tensor, share: int) -> list[int]:
    """How many units of every layer are off where `share` percent of all are on.

    As many in each layer as can be, and what is left over where the score of the next unit is lowest.

    Args:
        scores: of units, `[layers, units]`.
    """
    layers, units = scores.shape
    each, more = divmod(round(layers * units * (100 - share) / 100), layers)
    cheapest = scores.sort(dim=1).values[:, each].argsort(stable=True)[:more].tolist()
    return [each + (number in cheapest) for number in range(layers)]


def routed_layer(shape: ModelShape, row: Row, scores: torch.Tensor, off: int) -> list[RoutedGroup]:
    """The entries of a layer of which `off` units are off for every token.

    Args:
        scores: of its units.
    """
    units, on = len(scores), len(scores) - off
    count = 0 if row.shared == "none" else min(units // 2, on - 1)
    order = list(range(units)) if row.shared == "first" else scores.argsort(descending=True, stable=True).tolist()
    fields: dict[str, Any] = {"router": row.router, "unit": row.unit, "group_size": shape.group_size}
    return RoutedGroup.layer(shape.kv_heads, on - count, shared=sorted(order[:count]), **fields)


def variant_of(session: Session, name: str, row: Row, plan: Plan, weights: Path) -> Variant:
    """A row's trained model."""
    dense, itemsize = session.loaded.model, session.loaded.model.dtype.itemsize

    def build() -> Any:
        return load_trained(planned_model(dense, plan) if row.unit else copy.deepcopy(dense), weights)

    key = f"{plan_key(plan)} {read_recovered(weights).sha256}"
    return Variant(f"{name}, trained", build, key, lambda length: plan.cost(length, itemsize))


def costs_of(session: Session, plan: Plan) -> dict[str, float]:
    """Shares of the dense model that a plan holds, reads and computes in attention."""
    itemsize = session.loaded.model.dtype.itemsize
    mine, dense = plan.cost(PRICED, itemsize), session.shape.dense_cost(PRICED, itemsize)
    return {
        "held": mine.held_bytes / dense.held_bytes,
        "read": mine.read_bytes / dense.read_bytes,
        "flops": mine.flops / dense.flops,
    }


def readings(options: argparse.Namespace) -> Iterator[tuple[str, list[Measure]]]:
    """What is measured, by the text that it reads."""
    lengths = [options.measured_length]
    for name, text in rows.texts_of(options).items():
        asked = rows.perplexities(options, text, lengths)
        if name == "book":
            asked += [*rows.recalls(options, lengths), *rows.zero_shot(options)]
            asked.append(
                measures["load"](text=text, length=options.measured_length, windows=max(1, options.windows // 4))
            )
        yield name, asked


# Columns of the table: head, form, and the key of a row's figures.
COLUMNS = (
    ("book", "{:.2f}", "book/perplexity"),
    ("wikitext-2", "{:.2f}", "wikitext-2/perplexity"),
    ("pass key", "{:.2f}", "book/passkey"),
    ("key-value", "{:.2f}", "book/key_value"),
    ("zero-shot", "{:.4f}", "zero-shot"),
    ("to dense", "{:+.4f}", "to dense"),
    ("read", "{:.3f}", "read"),
    ("flops", "{:.3f}", "flops"),
    ("load", "{:.3f}", "book/variation of load"),
    ("worst", "{:.3f}", "book/variation of load, worst layer"),
    ("collapsed", "{:.0f}", "book/collapsed units"),
    ("text", "{:.4f}", "text loss"),
    ("speed", "{:,.0f}", "speed"),
)


def print_table(folder: Path) -> None:
    """The rows that are done, means over seeds, all their numbers in `rows.json`, and the load of heads in `plots`."""
    found = rows.read_rows(folder, list(ROWS))
    if not found:
        return
    length = next(int(key.split("/")[2]) for key in found[0]["cells"] if key.startswith("book/perplexity/"))
    print(f"\nbook, wikitext-2: perplexity at {length:,} tokens; pass key, key-value: recall there")
    print("zero-shot: mean of the tasks; to dense: its difference to the row `dense` of the same seed")
    print(f"read, flops: expected share of the dense model's cache reads and attention at {PRICED:,} tokens")
    print(
        "load: its coefficient of variation over all routed units; worst: the same in the worst layer; collapsed: units"
    )
    print("text: the last step's loss of the text; speed: tokens a second in training\n")
    numbers = [numbers_of(row, length) for row in found]
    control = {
        row["seed"]: each["zero-shot"] for row, each in zip(found, numbers, strict=True) if row["row"] == "dense"
    }
    lines = [("row", "seed", *(head for head, _, _ in COLUMNS))]
    for place, (row, each) in enumerate(zip(found, numbers, strict=True)):
        base, own = control.get(row["seed"]), each["zero-shot"]
        each["to dense"] = None if base is None or own is None or row["row"] == rows.DENSE else own - base
        lines.append((row["row"], str(row["seed"]), *line_of(each)))
        draw_load(row, folder / "plots" / f"{row['row']}-{row['seed']}")
        same = [numbers[n] for n, other in enumerate(found) if other["row"] == row["row"] != rows.DENSE]
        if len(same) > 1 and all(other["row"] != row["row"] for other in found[place + 1 :]):
            lines.append((row["row"], "mean", *line_of({key: mean([one[key] for one in same]) for key in each})))
    rows.print_lines(lines)


def numbers_of(row: dict[str, Any], length: int) -> dict[str, float | None]:
    """A row's numbers by the keys of the columns."""
    cells = row["cells"]
    measured = {key: cells.get(f"{key}/{length}") for _, _, key in COLUMNS if "/" in key}
    told = {key: row.get(key) for key in ("read", "flops", "text loss", "speed")}
    return {**measured, **told, "zero-shot": rows.zero_shot_mean(cells), "to dense": None}


def line_of(numbers: dict[str, float | None]) -> list[str]:
    """Numbers as the table has them; a dash where there is none."""
    return ["-" if (value := numbers[key]) is None else form.format(value) for _, form, key in COLUMNS]


def mean(values: Sequence[float | None]) -> float | None:
    """None where a value is missing."""
    given = [value for value in values if value is not None]
    return sum(given) / len(given) if len(given) == len(values) else None


def draw_load(row: dict[str, Any], path: Path) -> None:
    """How often tokens use each query head of a row's routed layers, from its figures; nothing without any."""
    values: dict[int, dict[int, float]] = {}
    for key, value in row["cells"].items():
        parts = key.split("/")
        if parts[1] == "load" and len(parts) == 5:
            values.setdefault(int(parts[3]), {}).update(dict.fromkeys(map(int, parts[4].split(",")), value))
    if values:
        path.parent.mkdir(exist_ok=True)
        draw_heads([HeadMap(f"{row['row']}, seed {row['seed']}", "load", values)], path)


if __name__ == "__main__":
    main()
