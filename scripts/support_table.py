"""Makes the tables of docs/support.md: the model families, and what was tried on a patched and on a native checkpoint.

python scripts/support_table.py [--families] [--only WORD] [--print]     a few minutes on a CPU

`--families` writes only their table, made from their rows, as `compress doctor --families` is. Both checkpoints are
exported on the spot from a tiny random Llama. A row works when it computes what the reference does, is refused when an
error says so, and fails otherwise. What is not installed is told by the library's own message: for the whole table
install bitsandbytes, torchao, optimum-quanto, trl, and transformers' `serving` extra beside it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import sys
import time
import traceback
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from torch._dynamo.exc import Unsupported

from compress.cli.doctor import by_reason, family_matrix
from compress.export.export import export_checkpoint
from compress.models.load import LoadedModel
from compress.plan import make_plan
from compress.targets.full import FullGroup
from compress.targets.window import WindowGroup
from scripts.support_rows import PACKAGES, ROWS, Row, Subject, Wrong
from tests.tiny import SIZES, mixed_plan, shape_of, tiny_tokenizer

MADE = "<!-- made by scripts/support_table.py --families -->", "<!-- end of the families -->"
DOCUMENT = Path(__file__).parents[1] / "docs" / "support.md"
START, END = "<!-- made by scripts/support_table.py -->", "<!-- end of what it made -->"
KINDS = ("patched", "native")
VERSIONS = ("transformers", "torch", "accelerate", "peft", "lm_eval", *PACKAGES)
LONGEST = 170
# What libraries and checkpoints raise when they say no; anything else is a defect of somebody.
REFUSALS = (ValueError, NotImplementedError, ImportError, Unsupported)


def checkpoints(folder: Path) -> dict[str, Subject]:
    """A patched checkpoint of mixed targets, and a native one of windows and a full layer."""
    torch.manual_seed(0)
    # Widths that the kernels of quantised layers take, and no token that ends a text early.
    sizes = SIZES | {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
    sizes |= {"initializer_range": 0.15, "eos_token_id": None}
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    loaded = LoadedModel(model.eval(), tiny_tokenizer(), "tiny/llama")
    shape = shape_of(loaded.model)
    window = WindowGroup(sink=0, alpha=50, beta=0.0)
    layers = make_plan(shape, [[each] * shape.kv_heads for each in (window, FullGroup(), window)])
    export_checkpoint(loaded, mixed_plan(shape), folder / "patched")
    export_checkpoint(loaded, layers, folder / "native", form="native")
    return {kind: Subject(folder / kind, remote=kind == "patched") for kind in KINDS}


def outcome(row: Row, subject: Subject) -> str:
    """`works`, `refused: ...`, `fails: ...` with another error, or in bold that something else was computed."""
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row.run(subject)
    except Wrong as error:
        return f"**wrong**: {sentence(error)}"
    except REFUSALS as error:
        return f"refused: *{sentence(error)}*"
    except Exception as error:
        if "-v" in sys.argv:
            traceback.print_exc()
        return f"fails: *{type(error).__name__}, {sentence(error)}*"
    return "works"


def sentence(error: BaseException) -> str:
    """The first of an error's message, on one line that a table can hold."""
    line = " ".join(str(error).split()).partition(". ")[0].replace("|", "/").replace("*", "\\*").strip(". ")
    line = re.sub(r" at 0x[0-9a-f]+", "", line)  # where an object lies is another place in every process
    line = re.sub(rf"{re.escape(gettempdir())}/\w+/", "", line)
    line = re.sub(r"transformers_modules\.(\w+\.)*", "", line.replace(str(Path.home()), "~"))
    return line if len(line) <= LONGEST else line[:LONGEST].rsplit(" ", 1)[0] + " …"


def table(found: dict[tuple[str, str], dict[str, str]]) -> str:
    """Versions and rows as Markdown."""
    have = []
    for name in VERSIONS:
        try:
            have.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    lines = [
        f"On a CPU, with {', '.join(have)}.",
        "",
        "| what | a patched checkpoint | a native checkpoint | checked |",
        "| --- | --- | --- | --- |",
    ]
    group = ""
    for row in ROWS:
        if row.group != group:
            group = row.group
            lines.append(f"| **{group}** | | | |")
        cells = found[row.group, row.name]
        lines.append(f"| {row.name} | {cells['patched']} | {cells['native']} | {row.checked} |")
    return "\n".join(lines)


def families_table() -> str:
    """What the families allow, those alike in one line, and the refused ones with their reasons."""
    matrix = family_matrix()
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, row in matrix["families"].items():
        marks = ["yes" if reason is None else f"refused: {reason}" for reason in row["targets"].values()]
        alike.setdefault((*marks, row["native"] or "-"), []).append(name)
    targets = next(iter(matrix["families"].values()))["targets"]
    columns = ["model type", *(f"`{target}`" for target in targets), "native checkpoint with windows as"]
    lines = [f"| {' | '.join(columns)} |", "| " + " | ".join("---" for _ in columns) + " |"]
    for cells, names in alike.items():
        lines.append(f"| {', '.join(f'`{name}`' for name in names)} | {' | '.join(cells)} |")
    refused = (*("refused" for _ in columns[2:-1]), "-")
    for reason, names in by_reason(matrix["refused"]).items():
        cells = (f"refused: {reason}", *refused)
        lines.append(f"| {', '.join(f'`{name}`' for name in names)} | {' | '.join(cells)} |")
    for text, names in by_reason(matrix["wrappers"]).items():
        part = "" if text in matrix["families"] else "not "
        cells = (f"refused, reads images, too: its text part (`{text}`) alone is {part}supported", *refused)
        lines.append(f"| {', '.join(f'`{name}`' for name in names)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def written(start: str = START, end: str = END) -> str:
    """What the document holds between two marks."""
    return DOCUMENT.read_text(encoding="utf-8").partition(start)[2].partition(end)[0].strip()


def write(made: str, start: str, end: str) -> None:
    """Put what was made between two marks of the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, after = text.partition(start)[0], text.partition(end)[2]
    DOCUMENT.write_text(f"{before}{start}\n{made}\n{end}{after}", encoding="utf-8")


def main() -> None:
    """Run all rows, print what came of them, and write the table into the document."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--only", default="", help="rows whose group or name holds this word; nothing is written")
    options.add_argument("--families", action="store_true", help="only write the table of the families")
    options.add_argument("--print", action="store_true", help="do not write the document")
    options.add_argument("-v", action="store_true", help="show tracebacks")
    given = options.parse_args()
    if not given.only and not given.print:
        write(families_table(), *MADE)
    if given.families:
        return
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    found: dict[tuple[str, str], dict[str, str]] = {}
    with TemporaryDirectory() as folder:
        subjects = checkpoints(Path(folder))
        for row in ROWS:
            if given.only.lower() not in f"{row.group} {row.name}".lower():
                continue
            cells = found[row.group, row.name] = {}
            for kind, subject in subjects.items():
                began = time.process_time()
                cells[kind] = outcome(row, subject)
                spent = time.process_time() - began
                print(f"{row.name:60} {kind:8} {spent:5.1f} s  {cells[kind]}", flush=True)
    for kind in KINDS:
        bad = [name for (_, name), cells in found.items() if cells[kind].startswith(("**", "fails"))]
        print(f"{kind}: {len(found)} rows, {len(bad)} of them wrong or failing: {', '.join(bad) or '-'}")
    if not given.only and not given.print:
        write(table(found), START, END)


if __name__ == "__main__":
    main()
