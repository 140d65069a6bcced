"""Heads that keep tokens on one model, row by row beside KVzip, windows of equal bytes and the dense model.

python scripts/retain_runs.py --texts FOLDER --out FOLDER [--rows oracle,ridge] [--seeds 0,1] [--at-once N] [--quick]

Every row is measured at several shares of the dense model's cache (`--shares`, in percent of the bytes), on the same
texts of a held-out novel: `--prompts` texts of `--length` tokens in all, each with a fact of every kind and a question
for every fact (`data.questions`: a pass key, one of two lines, and kinds, wordings and words that no calibration has).
A text is read without its questions, so that no row can know them. A row has no cell at a share that none of its plans
meets. Rows:

    oracle         the dense model; KVzip and KVzip+, whose mask is in force for the question; their scores given to
                   the heads of a retain plan (`rule`), whose keys are not seen while the text is read, either; and the
                   rank correlation of every scorer with KVzip+ on these texts, by layer
    oracle-512     the same with a repetition in chunks of 512 tokens in place of 2,048. It stands behind the text, so
                   at a length near the model's context the longer chunks have positions that the model does not know
    ridge, mlp, gate, key_norm, value_norm
                   retain heads by this scorer, with the threshold in each head group that keeps one share in all
    ridge-global, mlp-global
                   with one threshold for all head groups, which is how KVzip gives heads different shares
    ridge-score, mlp-score
                   with the share in each head group that KVzip+ keeps there of the texts of the preparation, and the
                   scorer to say which tokens: a fitted scorer varies less than what it stands for
    ridge-kvzip, ridge-again, ridge-plain, ridge-margin, ridge-prose, ridge-512, mlp-kvzip, mlp-long, gate-long,
    ridge-64, mlp-64, ridge-margin-256, ridge-margin-512
                   choices that one of these scorers leaves open, each with one share, one threshold and one score:
                   fitted to KVzip's scores; in two rounds (`prepare.again`); on text without statements, half of it
                   written by the model; to all but the last 512 tokens of texts of 2,048 and 4,096; the same on text
                   without statements that people wrote; with a window of 512; on four times the tokens; with a window
                   of 64; the window of so many tokens and texts without their ends. They run only where they are named
    searched       full, window and retaining heads, chosen by recipes/smollm2-retain.yaml, its refinement taking
                   `--refine-minutes` (0 for none); by `ridge` and `mlp`, or by what else `base` has trained, not fitted
                   to the ends of texts. The table ends with how many head groups of each kind its plans have
    refined        the refined windows of profiles/smollm2-135m/8k, where they have these bytes
    uniform        one window in all head groups
    recovered      `ridge` by one threshold, not fitted to the ends of texts, with its decisions trained together with
                   low-rank updates of the weights on what the dense model says, at `--recover-shares`
    searched-trained
                   the plans of `searched`, trained likewise, in its folder: it goes on with a `searched` that is done
    trained-dense  the dense model, trained on the text of the same tokens. These three run only where they are named

Texts, what is measured and what scorers are trained on differ from seed to seed. What rows of a seed have in common
(the trained scorers, the texts) is made once, in FOLDER/base-SEED; FOLDER/prompts.SEED.json has the texts for other
toolkits: `scripts/kvpress_rows.py` answers them and leaves its rows in the same folder, and the table has them all.
Rows run in `--at-once` processes on each GPU, those that are done are only read, and the same command goes on after
`--minutes`. The table is printed last; FOLDER/retain.json has all numbers with the machine and the versions.

FOLDER of texts has books (*.txt, in it or in pg_books/), of which one is held out, and WikiText-2's training text in it
or in wikitext2/, if any. Scorers are trained on these other texts, half as much encyclopedia as books, with facts
stated in half of the pieces, in wordings and words for calibration.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import yaml
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))

from compress.data.kinds import NEW_KINDS, REWORDED
from compress.data.questions import TASKS, Question, QuestionedText, questioned_texts
from compress.data.reader import Reader
from compress.data.text import UndividedText
from compress.errors import UserError
from compress.evaluate.asked import ask, asked_tokens, is_answered, read_text
from compress.evaluate.logits import logits_in_slices
from compress.evaluate.oracle import OracleScores, give_scores, kept_at, likely_behind, losses_behind, oracle_scores
from compress.files import write_json, write_text
from compress.models.load import LoadedModel, load_model
from compress.models.planned import planned_model
from compress.models.prepared import attach, prepared_for, read_prepared
from compress.models.reconstruction import CHUNK, TokenScores, reconstructing
from compress.models.retention import spearman
from compress.models.trained import load_trained
from compress.plan import ModelShape, Plan, plan_of_layers, read_plan, uniform_plan
from compress.runfolder import PREPARED
from compress.search.budget.budget import Budget
from compress.search.dense import Dense
from compress.search.problem import Problem
from compress.search.solver import Solver
from compress.search.solvers.shares import Shares
from compress.search.solvers.uniform import Uniform
from compress.stages.device import resolve_device
from compress.stages.prepare import prepare_stage
from compress.stages.profile import profile_stage
from compress.stages.recover import train_stage, trained_plan
from compress.stages.search import search_stage
from compress.stages.session import Session
from compress.targets.retain import RetainGroup
from compress.targets.span import visible_keys
from compress.versions import versions
from scripts import rows
from scripts.facts import drawn_fact

PIECE = 16_000  # characters of a piece of the training text, about 4,000 tokens
STATED = 1_000  # characters between two facts that are stated in it
ROOM = 128  # tokens for a question and its answer, so that a text with them has `--length` at most
SCORERS = ("ridge", "mlp", "gate", "key_norm", "value_norm")
RECIPES = Path(__file__).parents[1] / "recipes"
REFINED = Path(__file__).parents[1] / "profiles" / "smollm2-135m" / "8k"
REFINED_AT = {50.0: "refined-5", 25.0: "refined-25", 12.5: "refined-125"}
GLOBAL = ("ridge", "mlp")
PRICED = GLOBAL  # that `searched` chooses from, where the base has trained one of them
FILLED = 0.75  # of the bytes, what the window of a priced option takes at most
BUDGETED = ("search.budget", "search.budget.kv")  # keys that an error names where no plan has so few bytes
FACTS = ("device", "versions", "all", "tokens", "seconds")  # of a row's file, beside its cells
OPTIONS = (
    *("model", "dtype", "seeds", "length", "shares", "window", "prompts", "windows", "written", "at_once"),
    *("prepare_tokens", "prepare_lengths", "long_texts", "refine_minutes", "recover_tokens", "recover_length"),
)
KINDS = {"tasks": TASKS, "reworded": REWORDED, "new": NEW_KINDS}


def main() -> None:
    """Measure the rows that are asked for, and print the table."""
    parser = rows.arguments((__doc__ or "").splitlines()[0], UNTRAINED)
    add = parser.add_argument
    add("--shares", default="50,25,12.5,6.25", help="of the bytes of the dense model's cache, in percent, by commas")
    add("--window", type=int, default=128, help="tokens of the window of heads that keep tokens")
    add("--scorers", default=",".join(SCORERS), help="that `base` trains, by commas; rows of others cannot run")
    add("--prepare-tokens", type=int, default=500_000, help="that scorers are trained on")
    add("--prepare-lengths", default="1024,4096", help="tokens of the texts of the preparation, by commas")
    add("--refine-minutes", type=float, default=0.0, help="of refining each plan of `searched`; 0 for none")
    add("--recover-tokens", type=int, default=3_000_000, help="of the training of `recovered`")
    add("--recover-length", type=int, default=4096, help="tokens of its sequences")
    add("--recover-shares", default="12.5", help="at which it is trained, in percent, by commas")
    add("--long-texts", type=int, default=8, help="texts, as long as those of the measures, that give thresholds")
    add("--quick", action="store_true", help="a run of minutes on a CPU, to see all of it work")
    parser.set_defaults(length=8192, windows=8, written=200_000, written_length=512)
    options = parser.parse_args()
    if options.quick:
        options.length, options.shares, options.window = 1536, "50,25", 64
        options.prompts, options.windows, options.at_once = 2, 1, 1
        options.dtype = "float32" if resolve_device(options.device) == "cpu" else options.dtype
        options.prepare_tokens, options.prepare_lengths, options.long_texts = 2048, "256,512", 2
        options.written, options.written_length, options.minutes = 0, 256, 60.0
        options.recover_tokens, options.recover_length, options.recover_shares = 1024, 512, "25"
    rows.main(options, ROWS, run_row, lambda folder: print_table(options))


def shares_of(options: argparse.Namespace) -> list[float]:
    """Shares of the bytes in percent."""
    return [float(share) for share in options.shares.split(",")]


def run_row(options: argparse.Namespace, row: str, seed: int) -> None:
    """A row at every share, or what the rows of a seed have in common."""
    if row == rows.BASE:
        prepare_base(options, seed)
        return
    started = time.perf_counter()
    loaded = load_model(options.model, dtype=options.dtype, device=resolve_device(options.device))
    attach(loaded.model, read_prepared(options_of(options, seed)))
    asked = Asked.read(options.out / f"prompts.{seed}.json")
    cells = [{**cell, "seed": seed} for cell in ROWS[row](options, loaded, asked)]
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    facts = {"device": name, "versions": versions("triton"), "all": round(time.perf_counter() - started, 1)}
    write_json(rows.figures(options, row, seed), {"row": row, "seed": seed, **facts, "cells": cells})


def options_of(options: argparse.Namespace, seed: int) -> Path:
    """The folder of a seed's trained scorers."""
    folder: Path = options.out / f"{rows.BASE}-{seed}" / PREPARED
    return folder.parent


def prepare_base(options: argparse.Namespace, seed: int) -> None:
    """The trained scorers, and the texts."""
    started = time.perf_counter()
    with rows.session_of(options, rows.BASE, seed, base_recipe(options)) as session:
        write_texts(options, session, seed)
        prepare_stage(session)
    seconds = {
        option.target.model_dump()["scorer"]: option.record.seconds
        for option in read_prepared(options_of(options, seed))
    }
    facts = {"tokens": options.prepare_tokens, "seconds": seconds, "all": round(time.perf_counter() - started, 1)}
    write_json(rows.figures(options, rows.BASE, seed), {"row": rows.BASE, "seed": seed, **facts, "cells": []})


def training_text(options: argparse.Namespace) -> Path:
    """Books, half as much of an encyclopedia in turn with them, and facts between paragraphs of half of the pieces.

    Scorers that only see prose never learn what is worth keeping of what people ask for.
    """
    path: Path = options.out / "training.txt"
    if not path.is_file():
        held, train = rows.held_out(options), rows.wiki(options.texts, "train")
        files = [book for book in rows.books(options.texts) if book != held and not book.name.startswith("wiki.")]
        prose = [part for file in files or [held] for part in rows.paragraphs(file)]
        size, articles = sum(map(len, prose)), [] if train is None else rows.paragraphs(train)
        total, rng = 0, random.Random("statements")
        while articles and sum(map(len, articles)) > size / 2:  # thresholds are for novels
            articles.pop()
        parts = [_pieces(prose), _pieces(articles)]
        pieces = [part[number] for number in range(max(map(len, parts))) for part in parts if number < len(part)]
        found = []
        for number, piece in enumerate(pieces):
            for paragraph in piece:
                found.append(paragraph)
                total += len(paragraph) if number % 4 < 2 else 0
                if total > STATED:
                    found.append(drawn_fact(rng)[0])
                    total = 0
        write_text(path, "\n\n".join(found))
    return path


def _pieces(paragraphs: Sequence[str]) -> list[list[str]]:
    """Paragraphs in pieces of about `PIECE` characters."""
    found: list[list[str]] = []
    size = PIECE
    for paragraph in paragraphs:
        if size >= PIECE:
            found.append([])
            size = 0
        found[-1].append(paragraph)
        size += len(paragraph)
    return found


def base_recipe(options: argparse.Namespace) -> dict[str, Any]:
    """The recipe whose preparation trains the scorers; its other stages do not run."""
    lengths = [int(length) for length in options.prepare_lengths.split(",")]
    text = {"source": "undivided", "path": str(training_text(options))}
    prepare: dict[str, Any] = {
        "targets": [{"target": "retain", "scorer": scorer} for scorer in options.scorers.split(",")],
        "objectives": [
            {
                "name": "reconstruction",
                "lengths": lengths,
                "documents": options.long_texts,
                # Scores of shorter texts are higher: a threshold of theirs keeps less of a long one than it says.
                "thresholds": [options.length - ROOM],
            }
        ],
        "text": text,
        "length": max(lengths),
        "batch_size": 1,
        "tokens": options.prepare_tokens,
        "rate": 2e-3,
    }
    return {
        "schema": 1,
        "calibration": {"text": text, "documents": [{"task": "passkey", "length": max(lengths), "count": 1}]},
        "profile": {"statistics": [{"name": "retrieval"}]},
        "prepare": prepare,
        "search": {"solver": {"name": "keep"}, "budget": {"kv": 1.0, "lengths": [max(lengths)]}},
        "evaluate": {"compare": ["plan"]},
    }


def write_texts(options: argparse.Namespace, session: Session, seed: int) -> None:
    """The texts of a seed with their questions, and the windows of text that perplexity is measured on."""
    path = options.out / f"prompts.{seed}.json"
    if path.is_file():
        return
    book = UndividedText(path=str(rows.held_out(options)))
    reader: Reader = session.reader(None)
    ids = list(reader.ids(book, "evaluation", 1 << 40))
    texts = questioned_texts(session.loaded.tokenizer, ids, options.length - ROOM, options.prompts, seed)
    windows = min(options.windows, len(ids) // options.length)
    room = len(ids) - windows * options.length
    starts = [options.length * number + room * (number + 1) // (windows + 1) for number in range(windows)]
    data = {
        "book": Path(book.path).name,
        "texts": [
            {
                "tokens": text.tokens,
                "questions": [
                    {"kind": question.kind, "tokens": question.tokens, "answer": question.answer}
                    for question in text.questions
                ],
            }
            for text in texts
        ],
        "windows": [ids[start : start + options.length] for start in starts],
        "cut": options.length - max(1, options.length // 8),
    }
    write_text(path, json.dumps(data))


class Asked:
    """The texts of a seed, as the file for other toolkits has them.

    Attributes:
        texts: with their questions.
        windows: token ids of plain text, `cut`: of these, how many a compression behind the text reads before it.
    """

    def __init__(self, texts: list[QuestionedText], windows: list[list[int]], cut: int) -> None:
        self.texts, self.windows, self.cut = texts, windows, cut

    @classmethod
    def read(cls, path: Path) -> Asked:
        """From the file."""
        data = json.loads(path.read_text())
        texts = []
        for text in data["texts"]:
            questions = [
                Question(entry["kind"], tuple(entry["tokens"]), tuple(entry["answer"]), "", (0, 0))
                for entry in text["questions"]
            ]
            texts.append(QuestionedText(tuple(text["tokens"]), tuple(questions)))
        return cls(texts, data["windows"], data["cut"])

    @property
    def kinds(self) -> list[str]:
        """Of the questions of each text."""
        return [question.kind for question in self.texts[0].questions]


def new_cell(row: str, share: float | None, asked: Asked) -> dict[str, Any]:
    """What is measured of one row at one share; lists have an entry a text, or a window of text."""
    return {
        "row": row,
        "share": share,
        "right": {kind: [] for kind in asked.kinds},
        "kept": [],  # share of the pairs of key and value that is still there when a text was read
        "held": [],  # bytes of the cache then, as allocated, to those of the dense model
        "whole": [],  # -ln p of a window's tokens, their mean
        "tail": [],  # the same of those behind its `cut`
        "seconds": [],  # to read a text
    }


def add_right(cell: dict[str, Any], asked: Asked, right: Sequence[bool]) -> None:
    """Count the answers behind one text."""
    for kind, answer in zip(asked.kinds, right, strict=True):
        cell["right"][kind].append(int(answer))


def clock(device: torch.device) -> float:
    """Seconds, when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(
    row: str,
    share: float | None,
    model: Any,
    asked: Asked,
    dense: Any,
    given: Callable[[int, bool], None] = lambda number, window: None,
    whole: bool = True,
) -> dict[str, Any]:
    """A planned model on all texts, through its own cache.

    Args:
        dense: bytes of the dense model's cache for so many tokens.
        given: called before each text with its number, and whether it is a window of plain text.
        whole: whether whole windows are measured, too.
    """
    cell, device = new_cell(row, share, asked), model.get_input_embeddings().weight.device
    for number, text in enumerate([asked.texts[0], *asked.texts]):  # the first one twice: kernels are compiled in it
        given(max(0, number - 1), False)
        started = clock(device)
        cache = read_text(model, text.tokens)
        seconds = clock(device) - started
        if not number:
            continue
        cell["seconds"].append(seconds)
        cell["kept"].append(kept_share(cache, len(text.tokens)))
        answers = ask(model, text, cache)
        cell["held"].append(answers.held / dense(len(text.tokens)))
        add_right(cell, asked, answers.right)
    for number, window in enumerate(asked.windows):
        given(number, True)
        losses = losses_of(model, window)
        cell["tail"].append(float(losses[asked.cut :].mean()))
        if whole:
            cell["whole"].append(float(losses.mean()))
    return cell


@torch.inference_mode()
def losses_of(model: Any, window: Sequence[int]) -> torch.Tensor:
    """-ln p of all tokens but the first, float64; place i is that of token i + 1."""
    tokens = torch.tensor(window, device=model.get_input_embeddings().weight.device)
    parts = []
    for part, logits in logits_in_slices(model, tokens, range(len(window) - 1)):
        right = tokens[part.start + 1 : part.stop + 1]
        parts.append(functional.cross_entropy(logits.float(), right, reduction="none").double().cpu())
    return torch.cat(parts)


def kept_share(cache: Any, length: int) -> float:
    """Share of all pairs of key and value of a text that its cache still has, mean over layers and head groups."""
    kept = total = 0
    if not hasattr(cache, "paged"):
        return 1.0
    for layer in cache.paged:
        for state in layer.states:
            listed = state.tensors.get("listed")
            kept += 0 if listed is None else int(listed.sum())
            kept += sum(visible_keys(span, length) for span in state.spans)
        total += layer.groups * length
    return kept / total


def dense_bytes(shape: ModelShape, model: Any) -> Callable[[int], int]:
    """Bytes of the dense model's cache by the number of tokens."""
    return lambda length: shape.dense_cost(length, model.dtype.itemsize).held_bytes


class NothingMeasured:
    """In place of a profile, for solvers that read none."""

    grid = None
    priced = priced_layers = ()

    def __init__(self, length: int) -> None:
        self.lengths = (length,)


def solved(options: argparse.Namespace, loaded: LoadedModel, solver: Solver, share: float) -> Plan | None:
    """The plan of a solver with so many percent of the dense bytes; None where none has so few."""
    length, itemsize = options.length - ROOM, loaded.model.dtype.itemsize
    budget = Budget.model_validate({"kv": share / 100, "lengths": [length]})
    unknown: Any = NothingMeasured(length)
    dense = Dense(loaded.shape, itemsize)
    problem = Problem(dense, unknown, budget.rows(dense, [length]), prepared=prepared_for(loaded.model))
    problem = problem.counting([RetainGroup(scorer="key_norm", share=units / 1024) for units in range(16, 512, 7)])
    try:
        (candidate,) = solver.solve(problem)
    except UserError as error:
        left_out(error, f"{solver.words()} at {share:g}%")
        return None
    return plan_of_layers(loaded.shape, candidate.layers)


def left_out(error: UserError, what: str) -> None:
    """Tell why a row has no plan at some share, where its budget is too small; raise any other error."""
    if not all(problem.where in BUDGETED for problem in error.problems):
        raise error
    print(f"{what}: {error}", flush=True)


Same = Literal["share", "threshold", "score"]  # what all head groups have in common
Change = Callable[[argparse.Namespace, dict[str, Any]], None]


def retain_row(scorer: str, same: Same = "share") -> Callable[..., Iterator[dict[str, Any]]]:
    """The row of a scorer of the base."""

    def run(options: argparse.Namespace, loaded: LoadedModel, asked: Asked) -> Iterator[dict[str, Any]]:
        yield from retained(options, loaded, asked, scorer, same, scorer)

    return run


def retained(
    options: argparse.Namespace, loaded: LoadedModel, asked: Asked, scorer: str, same: Same, name: str
) -> Iterator[dict[str, Any]]:
    """Heads by a scorer that the model carries, at every share."""
    solver = Shares(same=same, target=RetainGroup(scorer=scorer, alpha=options.window))
    for share in shares_of(options):
        plan = solved(options, loaded, solver, share)
        if plan is not None:
            row = name + {"share": "", "threshold": ", one threshold", "score": ", one score"}[same]
            model = planned_model(loaded.model, plan)
            yield measure(row, share, model, asked, dense_bytes(loaded.shape, loaded.model))


def changed_row(scorer: str, words: str, change: Change) -> Callable[..., Iterator[dict[str, Any]]]:
    """A scorer with something changed, with one share and with one threshold.

    Args:
        words: what is changed.
        change: changes `prepare:` of the recipe, or the options, which are the row's own.
    """

    def run(options: argparse.Namespace, loaded: LoadedModel, asked: Asked) -> Iterator[dict[str, Any]]:
        recipe = base_recipe(options)
        recipe["prepare"]["targets"] = [{"target": "retain", "scorer": scorer}]
        before = copy.deepcopy(recipe)
        change(options, recipe["prepare"])
        if recipe != before:
            with rows.session_of(options, options.child, options.seed, recipe) as session:
                session.take_model(loaded)
                prepare_stage(session)
        for same in get_args(Same):
            yield from retained(options, loaded, asked, scorer, same, f"{scorer}, {words}")

    return run


def by_kvzip(options: argparse.Namespace, prepare: dict[str, Any]) -> None:
    """Fit KVzip's scores in place of KVzip+'s."""
    prepare["objectives"][0]["score"] = "KVzip"


def again(options: argparse.Namespace, prepare: dict[str, Any]) -> None:
    """A second round, on the states of a model that keeps an eighth."""
    prepare["again"] = 0.125


def plain(options: argparse.Namespace, prepare: dict[str, Any]) -> None:
    """Text without statements, and as much that the model writes."""
    prepare["text"] = {"source": "undivided", "path": str(rows.corpus(options))}
    if options.written:
        prepare["beside"] = {"source": "generated", "tokens": options.written, "length": options.written_length}


def longer(options: argparse.Namespace, prepare: dict[str, Any]) -> None:
    """Four times the tokens, at a higher rate."""
    prepare["tokens"], prepare["rate"] = 4 * options.prepare_tokens, 3e-3


def margin(options: argparse.Namespace, prepare: dict[str, Any]) -> None:
    """Longer texts, without their ends, which the repetition is near to."""
    objective = prepare["objectives"][0]
    if not options.quick:
        objective["lengths"] = [max(length, 2048) for length in objective["lengths"]]
    objective["margin"] = min(512, min(objective["lengths"]) // 4)


def prose(options: argparse.Namespace, prepare: dict[str, Any]) -> None:
    """Text without statements, and none of a model; without the ends of texts."""
    prepare["text"] = {"source": "undivided", "path": str(rows.corpus(options))}
    margin(options, prepare)


def window(tokens: int) -> Change:
    """A window of so many tokens: a long one leaves less of the cache to be chosen, a short one more of a small one."""

    def change(options: argparse.Namespace, prepare: dict[str, Any]) -> None:
        options.window = min(tokens, 128) if options.quick else tokens

    return change


def together(*changes: Change) -> Change:
    """One change after the other."""

    def change(options: argparse.Namespace, prepare: dict[str, Any]) -> None:
        for each in changes:
            each(options, prepare)

    return change


CHANGED: dict[str, tuple[str, str, Change]] = {
    "ridge-kvzip": ("ridge", "by KVzip", by_kvzip),
    "ridge-again": ("ridge", "two rounds", again),
    "ridge-plain": ("ridge", "plain text", plain),
    "ridge-margin": ("ridge", "not the last tokens", margin),
    "ridge-prose": ("ridge", "prose, not the last tokens", prose),
    "ridge-512": ("ridge", "window 512", window(512)),
    "ridge-margin-512": ("ridge", "window 512, not the last tokens", together(margin, window(512))),
    "ridge-margin-256": ("ridge", "window 256, not the last tokens", together(margin, window(256))),
    "mlp-kvzip": ("mlp", "by KVzip", by_kvzip),
    "mlp-long": ("mlp", "four times the tokens", longer),
    "gate-long": ("gate", "four times the tokens", longer),
    "ridge-64": ("ridge", "window 64", window(64)),
    "mlp-64": ("mlp", "window 64", window(64)),
}


def refined_row(options: argparse.Namespace, loaded: LoadedModel, asked: Asked) -> Iterator[dict[str, Any]]:
    """The refined windows that are in the repository."""
    for share in shares_of(options):
        if share in REFINED_AT:
            plan = read_plan(REFINED / f"{REFINED_AT[share]}.plan.json", loaded.shape)
            model = planned_model(loaded.model, plan)
            yield measure("refined windows", share, model, asked, dense_bytes(loaded.shape, loaded.model))


def uniform_row(options: argparse.Namespace, loaded: LoadedModel, asked: Asked) -> Iterator[dict[str, Any]]:
    """The largest window that has the bytes, in every head group."""
    for share in shares_of(options):
        plan = solved(options, loaded, Uniform(), share)
        if plan is not None:
            model = planned_model(loaded.model, plan)
            yield measure("uniform windows", share, model, asked, dense_bytes(loaded.shape, loaded.model))


def searched_row(options: argparse.Namespace, loaded: LoadedModel, asked: Asked) -> Iterator[dict[str, Any]]:
    """Full, window and retaining heads, as recipes/smollm2-retain.yaml chooses them."""
    for share in shares_of(options):
        with rows.session_of(options, "searched", options.seed, searched_recipe(options, share)) as session:
            plan = found_plan(session, loaded, f"searched at {share:g}%")
        if plan is not None:
            model = planned_model(loaded.model, plan)
            cell = measure("searched", share, model, asked, dense_bytes(loaded.shape, loaded.model))
            yield {**cell, "groups": groups_of(plan)}


def groups_of(plan: Plan) -> dict[str, int]:
    """How many head groups of a plan have which window, those that keep tokens with any share of them together."""
    return dict(Counter(group.chooser for layer in plan.layers for group in layer.groups).most_common())


def found_plan(session: Session, loaded: LoadedModel, what: str) -> Plan | None:
    """The plan of a session's recipe, with what its search needs before; None where no plan has so few bytes."""
    session.take_model(loaded)
    profile_stage(session)
    prepare_stage(session)
    try:
        return search_stage(session)
    except UserError as error:
        left_out(error, what)
        return None


def searched_recipe(options: argparse.Namespace, share: float) -> dict[str, Any]:
    """The recipe with scorers as those of the base but for the ends of texts, and documents from its texts."""
    recipe: dict[str, Any] = yaml.safe_load((RECIPES / "smollm2-retain.yaml").read_text())
    base = base_recipe(options)
    trained = options.scorers.split(",")
    priced = [scorer for scorer in PRICED if scorer in trained] or trained
    offered = recipe["prepare"]["options"]["retain"]
    fitting = FILLED * share / 100 * options.length
    alphas = [64] if options.quick else [alpha for alpha in offered["alphas"] if alpha < fitting]
    grid = {"scorers": priced, "alphas": sorted({*alphas, options.window})}
    prepare = base["prepare"] | {"effect": True, "options": {"retain": offered | grid}}
    budget = {"kv": share / 100, "lengths": [options.length - ROOM]}
    refined = recipe["search"]["refine"] | {"minutes": options.refine_minutes}
    refine = refined if options.refine_minutes else None
    margin(options, prepare)
    recipe |= {"prepare": prepare, "search": recipe["search"] | {"budget": budget, "refine": refine}}
    recipe["calibration"] |= {"text": base["calibration"]["text"]}
    for task in (task for part in ("documents", "training", "held_out") for task in recipe["calibration"][part]):
        task["length"] = min(task["length"], options.length)
        if task["task"] == "continuation":
            task["answer_tokens"] = min(task["answer_tokens"], task["length"] // 3)
    if options.quick:
        recipe["calibration"]["documents"] = [{"task": "passkey", "length": 512, "count": 1}]
        recipe["calibration"]["held_out"] = [{"task": "passkey", "length": 768, "count": 1}]
        recipe["calibration"].pop("training")
        windows = {"sinks": [4], "betas": [0], "alpha_max": 256, "alpha_step": 192}
        recipe["profile"]["statistics"] = [{"name": "effect", "options": {"window": windows}}]
    return recipe


def recovered_row(options: argparse.Namespace, loaded: LoadedModel, asked: Asked) -> Iterator[dict[str, Any]]:
    """One threshold, whose decisions and the weights are trained together on what the dense model says."""
    for share in map(float, options.recover_shares.split(",")):
        name = f"ridge, window {options.window}, not the last tokens, trained"
        recipe = recover_recipe(options, share)
        yield from trained_cells(options, loaded, asked, share, recipe, f"recovered-{share:g}", name)


def searched_trained_row(options: argparse.Namespace, loaded: LoadedModel, asked: Asked) -> Iterator[dict[str, Any]]:
    """The row `searched`, trained in the same way; with `searched` done before in the folder it goes on from there."""
    for share in shares_of(options):
        recipe = searched_recipe(options, share) | {"recover": training(options)}
        yield from trained_cells(options, loaded, asked, share, recipe, "searched", "searched, trained")


def trained_cells(
    options: argparse.Namespace,
    loaded: LoadedModel,
    asked: Asked,
    share: float,
    recipe: dict[str, Any],
    folder: str,
    name: str,
) -> Iterator[dict[str, Any]]:
    """A recipe's plan at one share, trained; nothing where it finds none."""
    with rows.session_of(options, folder, options.seed, recipe) as session:
        plan = found_plan(session, loaded, f"{name}, at {share:g}%")
        if plan is None:
            return
        (weights,) = train_stage(session, "recover")
    model = load_trained(planned_model(loaded.model, trained_plan(plan, weights)), weights)
    yield measure(name, share, model, asked, dense_bytes(loaded.shape, loaded.model))


def trained_dense_row(options: argparse.Namespace, loaded: LoadedModel, asked: Asked) -> Iterator[dict[str, Any]]:
    """The dense model, trained on the same tokens."""
    share = float(options.recover_shares.split(",")[0])
    with rows.session_of(options, "trained-dense", options.seed, recover_recipe(options, share)) as session:
        if found_plan(session, loaded, f"dense, trained, with the plan of {share:g}%") is None:
            return
        (weights,) = train_stage(session, "control")
    model = load_trained(copy.deepcopy(loaded.model), weights)
    yield measure("dense, trained", None, model, asked, dense_bytes(loaded.shape, loaded.model))


def recover_recipe(options: argparse.Namespace, share: float) -> dict[str, Any]:
    """Scorers that are not fitted to the ends of texts, one threshold for all head groups, and a training."""
    recipe = base_recipe(options)
    margin(options, recipe["prepare"])
    target = {"target": "retain", "scorer": "ridge", "alpha": options.window}
    budget = {"kv": share / 100, "lengths": [options.length - ROOM]}
    recipe["search"] = {"solver": {"name": "shares", "same": "threshold", "target": target}, "budget": budget}
    recipe["recover"] = training(options)
    return recipe


def training(options: argparse.Namespace) -> dict[str, Any]:
    """How decisions and weights are trained, as `recover:` of a recipe."""
    return {
        "train": "lora",
        "loss": "distill",
        "mixer_rate": 1e-3,
        "text": {"source": "undivided", "path": str(training_text(options))},
        "length": min(options.recover_length, options.length),
        "batch_size": 4 if not options.quick else 1,
        "tokens": options.recover_tokens,
    }


def oracle_row(
    options: argparse.Namespace, loaded: LoadedModel, asked: Asked, chunk: int = CHUNK
) -> Iterator[dict[str, Any]]:
    """KVzip and KVzip+ behind the text, and the retain rule with their scores; with the published chunk the dense
    model as well."""
    words = "" if chunk == CHUNK else f", chunks of {chunk}"
    model, shape, shares = loaded.model, loaded.shape, shares_of(options)
    device, groups = model.get_input_embeddings().weight.device, shape.kv_heads
    masks = [(name, share) for name in ("KVzip", "KVzip+") for share in shares]
    cells = [new_cell("dense", None, asked), *(new_cell(name + words, share, asked) for name, share in masks)]
    scorers = options.scorers.split(",")
    mixers = {scorer: scorers_of(loaded, scorer) for scorer in scorers}
    ranks: dict[str, list[torch.Tensor]] = {scorer: [] for scorer in scorers}
    seconds = []

    def kept_by(found: Any) -> list[torch.Tensor | None]:
        by_name = {"KVzip": found.weight, "KVzip+": found.moved}
        return [None, *(kept_at(by_name[name], share / 100) for name, share in masks)]

    of_text: dict[str, list[torch.Tensor]] = {}

    def compare(scores: TokenScores) -> None:
        for scorer, by_layer in mixers.items():
            given = (scores.hidden[None], scores.key[None], scores.value[None], scores.positions[None])
            own = by_layer[scores.layer](*given)[0]
            of_text[scorer].append(spearman(own.double().cpu(), scores.wanted().double().cpu()))

    scored: list[Any] = []
    compared = max(1, len(asked.texts) // 5)
    for number, text in enumerate(asked.texts):
        pieces = [asked_tokens(question) for question in text.questions]
        of_text.update({scorer: [] for scorer in scorers})
        beside = {"beside": compare} if number < compared else {}
        with reconstructing(model, loaded.tokenizer, chunk) as repeat:
            started = clock(device)
            found = oracle_scores(model, repeat, text.tokens, groups, **beside)
        if beside:
            for scorer, values in of_text.items():
                ranks[scorer].append(torch.stack(values))  # [layers, groups]
        if not beside or len(asked.texts) == 1:
            seconds.append(clock(device) - started)
        answers = likely_behind(model, text.tokens, pieces, kept_by(found))
        for cell, likely in zip(cells, answers, strict=True):
            rows_of = zip(text.questions, likely, strict=True)
            add_right(cell, asked, [is_answered(question, row) for question, row in rows_of])
            cell["kept"].append(1.0 if cell["share"] is None else cell["share"] / 100)
        scored.append(on_host(found))
    for text in asked.texts[:10]:
        started = clock(device)
        read_text(model, text.tokens)
        cells[0]["seconds"].append(clock(device) - started)
    cut, tails = asked.cut, []
    for window in asked.windows:
        with reconstructing(model, loaded.tokenizer, chunk) as repeat:
            found = oracle_scores(model, repeat, window[:cut], groups)
        tails.append(on_host(found))
        for cell, losses in zip(cells, losses_behind(model, window[:cut], window[cut:], kept_by(found)), strict=True):
            cell["tail"].append(float(losses.mean()))
        cells[0]["whole"].append(float(losses_of(model, window).mean()))
    cells[-1]["ranks"] = {scorer: torch.stack(values).mean((0, 2)).tolist() for scorer, values in ranks.items()}
    for cell in cells[1:]:
        cell["seconds"] = [mean(cells[0]["seconds"]) + mean(seconds)]
    yield from cells if chunk == CHUNK else cells[1:]
    for name in ("KVzip", "KVzip+"):
        given = [[values[name] for values in of_texts] for of_texts in (scored, tails)]
        yield from rule_cells(options, loaded, asked, f"{name}{words}, in the rule", *given)


def on_host(found: OracleScores) -> dict[str, torch.Tensor]:
    """Scores by name, on the CPU, where those of all texts have room."""
    return {"KVzip": found.weight.cpu(), "KVzip+": found.moved.cpu()}


def rule_cells(
    options: argparse.Namespace,
    loaded: LoadedModel,
    asked: Asked,
    name: str,
    scored: Sequence[torch.Tensor],
    tails: Sequence[torch.Tensor],
) -> Iterator[dict[str, Any]]:
    """Retain heads that are told what an oracle keeps, with one threshold over all head groups."""
    device, trained = loaded.model.get_input_embeddings().weight.device, options.scorers.split(",")
    # The share that has the bytes, which is any scorer's whose thresholds are known.
    known = RetainGroup(scorer="key_norm" if "key_norm" in trained else trained[0], alpha=options.window)
    for share in shares_of(options):
        plan = solved(options, loaded, Shares(target=known), share)
        if plan is None:
            continue
        kept = float(plan.layers[0].groups[0].model_dump()["share"])
        group = RetainGroup(scorer="key_norm", alpha=options.window, threshold=0.5, share=kept)
        model = planned_model(loaded.model, uniform_plan(loaded.shape, group))

        def given(number: int, window: bool, model: Any = model, kept: float = kept) -> None:
            give_scores(model, kept_at((tails if window else scored)[number].to(device), kept).float())

        dense = dense_bytes(loaded.shape, loaded.model)
        yield measure(name, share, model, asked, dense, given, whole=False)


def scorers_of(loaded: LoadedModel, scorer: str) -> dict[int, Any]:
    """A trained scorer as it runs, by the number of its layer."""
    planned = planned_model(loaded.model, uniform_plan(loaded.shape, RetainGroup(scorer=scorer, threshold=0.0)))
    found = enumerate(planned.base_model.compress_kinds)
    return {number: kinds.mixers[0].scorer for number, kinds in found if hasattr(kinds.mixers[0], "scorer")}


ROWS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "oracle": oracle_row,
    "oracle-512": partial(oracle_row, chunk=512),
    **{scorer: retain_row(scorer) for scorer in SCORERS},
    **{f"{scorer}-global": retain_row(scorer, "threshold") for scorer in GLOBAL},
    **{f"{scorer}-score": retain_row(scorer, "score") for scorer in GLOBAL},
    **{name: changed_row(*entry) for name, entry in CHANGED.items()},
    "searched": searched_row,
    "refined": refined_row,
    "uniform": uniform_row,
    "recovered": recovered_row,
    "searched-trained": searched_trained_row,
    "trained-dense": trained_dense_row,
}
TRAINED = ("recovered", "searched-trained", "trained-dense")
UNTRAINED = [name for name in ROWS if name not in (*CHANGED, *TRAINED)]  # rows where none are named


def mean(values: Sequence[float]) -> float:
    """NaN of none."""
    return statistics.fmean(values) if values else math.nan


def spread(values: Sequence[float]) -> float:
    """Standard deviation."""
    return statistics.pstdev(values) if values else math.nan


def finite(value: Any) -> Any:
    """Plain values, with None for a number that is none, which JSON does not have."""
    if isinstance(value, dict):
        return {str(name): finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(options: argparse.Namespace) -> None:
    """The rows that are done; all their numbers, with machine and versions, in `retain.json`."""
    files = [json.loads(path.read_text()) for path in sorted(options.out.glob("*-*.json"))]
    cells = [cell for file in files for cell in file["cells"]]
    if not cells:
        print("no row is done yet; run the same command again")
        return
    by_row: dict[tuple[float, str], list[dict[str, Any]]] = defaultdict(list)
    for cell in cells:
        by_row[-(cell["share"] or 101.0), cell["row"]].append(cell)
    reference = {cell["seed"]: cell for cell in cells if cell["row"] == "dense"}
    summary = [summarised(group, reference) for _, group in sorted(by_row.items(), key=lambda item: item[0][0])]
    ranks = [{"seed": cell["seed"], "row": cell["row"], **cell["ranks"]} for cell in cells if "ranks" in cell]
    made = {f"{file['row']}-{file['seed']}": {name: file[name] for name in FACTS if name in file} for file in files}
    asked = {name: value for name, value in vars(options).items() if name in OPTIONS}
    facts = {"python": platform.python_version(), "options": asked, "rows": made, "ranks": ranks}
    text = json.dumps(finite({**facts, "summary": summary, "cells": cells}))
    write_text(options.out / "retain.json", text.replace('{"row": ', '\n{"row": ') + "\n")
    print("\nrecall of the questions that follow a text: `tasks` a pass key and one of two lines, `reworded` kinds of")
    print("facts in other words and wordings than calibrations have, `new` kinds that they do not have; all: mean and")
    print("standard error over texts; least: the kind that keeps the smallest part of the dense model's answers")
    print("kept, bytes: measured on these texts, in percent of the dense model's, with the spread over texts")
    print("perplexity of whole windows, and of their last eighth (what KVzip and presses read behind the compression)")
    print("seconds: to read a text and compress it\n")
    head = (
        "percent",
        "row",
        "kept",
        "bytes",
        "all",
        "tasks",
        "reworded",
        "new",
        "least",
        "perplexity",
        "",
        "tail",
        "seconds",
    )
    rows.print_lines([head, *(line(entry) for entry in summary)])
    for cell in (cell for cell in cells if "groups" in cell):
        counts = "; ".join(f"{count} {words}" for words, count in cell["groups"].items())
        print(f"\nhead groups of {cell['row']} at {cell['share']:g}%, seed {cell['seed']}: {counts}")
    for entry in ranks:
        print(f"\nrank correlation with {entry['row']} on these texts, seed {entry['seed']}, mean and by layer:")
        for scorer in [name for name in SCORERS if name in entry]:
            values = entry[scorer]
            print(f"  {scorer:<11}{mean(values):.2f}  {' '.join(f'{value:.2f}' for value in values)}")


def summarised(group: Sequence[dict[str, Any]], reference: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """One row at one share, all its seeds together."""
    first = group[0]
    kinds = {kind: [answer for cell in group for answer in cell["right"][kind]] for kind in first["right"]}
    dense = {
        kind: [
            answer for cell in group if cell["seed"] in reference for answer in reference[cell["seed"]]["right"][kind]
        ]
        for kind in first["right"]
    }
    recall = {kind: mean(answers) for kind, answers in kinds.items()}
    kept = {kind: recall[kind] / mean(dense[kind]) for kind in kinds if dense[kind] and any(dense[kind])}
    texts = [statistics.fmean(answers) for answers in zip(*kinds.values(), strict=True)]
    least = min(kept, key=lambda kind: kept[kind], default=None)

    def over_dense(name: str) -> float:
        gaps = [
            one - other
            for cell in group
            if cell["seed"] in reference
            for one, other in zip(cell[name], reference[cell["seed"]][name], strict=False)
        ]
        return math.exp(mean(gaps)) - 1 if gaps else math.nan

    def joined(name: str) -> list[float]:
        return [value for cell in group for value in cell[name]]

    return {
        "row": first["row"],
        "share": first["share"],
        "seeds": sorted(cell["seed"] for cell in group),
        "kept": mean(joined("kept")),
        "kept spread": spread(joined("kept")),
        "bytes": mean(joined("held")),
        "bytes spread": spread(joined("held")),
        "all": mean(texts),
        "error": statistics.stdev(texts) / math.sqrt(len(texts)) if len(texts) > 1 else math.nan,
        **{name: mean([recall[kind] for kind in members]) for name, members in KINDS.items()},
        "recall": recall,
        "of dense": kept,
        "least": least,
        "perplexity": math.exp(mean(joined("whole"))) if joined("whole") else math.nan,
        "perplexity over dense": over_dense("whole"),
        "tail over dense": over_dense("tail"),
        "seconds": mean(joined("seconds")),
    }


def line(entry: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table."""

    def shown(form: str, *names: str, factor: float = 1.0) -> str:
        values = [entry[name] * factor for name in names]
        return "-" if math.isnan(values[0]) else form.format(*values)

    least = entry["least"]
    return (
        "-" if entry["share"] is None else f"{entry['share']:g}",
        str(entry["row"]),
        shown("{:.1f} ±{:.1f}", "kept", "kept spread", factor=100),
        shown("{:.1f} ±{:.1f}", "bytes", "bytes spread", factor=100),
        shown("{:.3f} ±{:.3f}", "all", "error"),
        *(shown("{:.2f}", name) for name in KINDS),
        "-" if least is None else f"{entry['of dense'][least]:.2f} {least}",
        shown("{:.2f}", "perplexity"),
        shown("{:+.1f}%", "perplexity over dense", factor=100),
        shown("{:+.1f}%", "tail over dense", factor=100),
        shown("{:.3g}", "seconds"),
    )


if __name__ == "__main__":
    main()
