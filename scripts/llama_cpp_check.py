#!/usr/bin/env python3
"""Converts a native checkpoint with llama.cpp's own converter, runs it there, and compares with transformers.

    scripts/llama_cpp_check.py run/checkpoint llama.cpp/convert_hf_to_gguf.py

Weights are float32 on both sides, and so is llama.cpp's KV cache, so what differs is rounding alone; how much that is
shows against transformers in float64. The exit status is 1 where token ids, sizes, greedy tokens or logits differ by
more. Needs the packages gguf and llama-cpp-python.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from compress.errors import UserError
from compress.models.load import load_model
from compress.models.shape import shape_of

TEXT = (
    "The river rises in the hills above the old town, and runs for forty miles to the sea. In 1871 it carried 12,345 "
    "tons of grain. I've been told that it isn't deep; still, boats go"
)
TOLERANCE = 1e-3  # of the largest logit: float32 sums in another order, through all layers


@dataclass(frozen=True)
class Run:
    """What an engine makes of a text: its token ids, `[tokens, vocabulary]` logits and the greedy continuation."""

    ids: list[int]
    logits: np.ndarray
    greedy: list[int]


@dataclass(frozen=True)
class Row:
    """One line of the table; `same` says whether the two engines agree on it."""

    what: str
    ours: str
    theirs: str
    same: bool


def convert(checkpoint: Path, converter: Path, gguf_file: Path) -> str:
    """Write a float32 GGUF file and return what the converter printed.

    Raises:
        UserError: the converter failed; carries its last line.
    """
    command = [sys.executable, str(converter), str(checkpoint), "--outfile", str(gguf_file), "--outtype", "f32"]
    found = subprocess.run(command, capture_output=True, text=True)
    printed = found.stdout + found.stderr
    if found.returncode:
        last = (printed.strip().splitlines() or ["nothing"])[-1]
        raise UserError("the converter failed", where=str(converter), found=last)
    return printed


def metadata(gguf_file: Path) -> dict[str, Any]:
    """The keys and values of a GGUF file, without the vocabulary."""
    from gguf import GGUFReader

    fields = GGUFReader(gguf_file).fields
    lists = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type", "tokenizer.ggml.scores")
    return {key: field.contents() for key, field in fields.items() if key not in lists}


def in_transformers(model: Any, tokenizer: Any, text: str, new: int) -> Run:
    """Logits at every position of a text, and `new` greedy tokens behind it, without a cache."""
    ids = tokenizer.encode(text)
    grown, logits = list(ids), None
    with torch.inference_mode():
        for _ in range(new):
            found = model(torch.tensor([grown])).logits[0].float()
            logits = found if logits is None else logits
            grown.append(int(found[-1].argmax()))
    assert logits is not None
    return Run(ids, logits.numpy(), grown[len(ids) :])


def in_float64(model: Any, ids: list[int]) -> np.ndarray:
    """Logits without the rounding of float32, `[tokens, vocabulary]`; the model stays in float64."""
    with torch.inference_mode():
        logits: np.ndarray = model.double()(torch.tensor([ids])).logits[0].numpy()
    return logits


def in_llama_cpp(gguf_file: Path, text: str, new: int) -> Run:
    """The same in llama.cpp: its own tokenizer, one prefill, then token by token through its cache."""
    import llama_cpp

    float32 = llama_cpp.GGML_TYPE_F32
    engine = llama_cpp.Llama(
        str(gguf_file), n_ctx=1024, logits_all=True, verbose=False, seed=0, type_k=float32, type_v=float32
    )
    ids = engine.tokenize(text.encode(), add_bos=True, special=True)
    engine.eval(ids)
    logits = np.array(engine.scores[: len(ids)])
    greedy = [int(logits[-1].argmax())]
    while len(greedy) < new:
        engine.eval(greedy[-1:])
        greedy.append(int(engine.scores[engine.n_tokens - 1].argmax()))
    return Run(ids, logits, greedy)


def shape_rows(model: Any, found: dict[str, Any]) -> list[Row]:
    """Sizes in the checkpoint beside those in the GGUF file; a length that the file leaves out is hidden / heads."""
    shape, config, name = shape_of(model), model.config, found["general.architecture"]
    even = config.hidden_size // found[f"{name}.attention.head_count"]
    pairs = {
        "layers": (shape.layers, found[f"{name}.block_count"]),
        "query heads": (shape.query_heads, found[f"{name}.attention.head_count"]),
        "key/value heads": (shape.kv_heads, found.get(f"{name}.attention.head_count_kv", shape.query_heads)),
        "head size, keys": (shape.head_dim, found.get(f"{name}.attention.key_length", even)),
        "head size, values": (shape.head_dim, found.get(f"{name}.attention.value_length", even)),
        "head size, RoPE": (shape.head_dim, found.get(f"{name}.rope.dimension_count", even)),
        "MLP neurons": (config.intermediate_size, found[f"{name}.feed_forward_length"]),
    }
    return [Row(what, str(own), str(other), own == other) for what, (own, other) in pairs.items()]


def run_rows(ours: Run, theirs: Run, exact: np.ndarray, positions: int) -> list[Row]:
    """Token ids, logits at some positions and over all, and the greedy continuation."""
    rows = [Row("token ids of the text", f"{len(ours.ids)}", f"{len(theirs.ids)}", ours.ids == theirs.ids)]
    if ours.ids != theirs.ids:
        return rows
    for at in np.linspace(0, len(ours.ids) - 1, positions).astype(int):
        best = int(ours.logits[at].argmax())
        same = best == int(theirs.logits[at].argmax())
        rows.append(
            Row(f"top logit at {at}", f"{ours.logits[at, best]:.5f}", f"{theirs.logits[at, best]:.5f}", bool(same))
        )
    most = float(np.abs(exact).max())
    own, other = (float(np.abs(run.logits - exact).max()) for run in (ours, theirs))
    close = max(own, other) <= TOLERANCE * most
    rows.append(Row(f"largest gap to float64, of {most:.1f}", f"{own:.1e}", f"{other:.1e}", close))
    between = float(np.abs(ours.logits - theirs.logits).max())
    rows.append(Row("largest gap to transformers", "", f"{between:.1e}", between <= TOLERANCE * most))
    agreed = sum(token == same for token, same in zip(ours.greedy, theirs.greedy, strict=True))
    count = len(ours.greedy)
    rows.append(Row("greedy tokens that agree", f"{count}", f"{agreed}", agreed == count))
    return rows


def main() -> int:
    """Convert, run on both sides, print; 0 where all agrees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a folder with stock weights, configuration and tokenizer")
    parser.add_argument("converter", type=Path, help="convert_hf_to_gguf.py of llama.cpp")
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--new", type=int, default=32, help="greedy tokens")
    parser.add_argument("--positions", type=int, default=4, help="positions whose top logit is printed")
    parser.add_argument("--gguf", type=Path, help="keep the GGUF file here")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        gguf_file = options.gguf or Path(scratch) / "model.gguf"
        try:
            convert(options.checkpoint, options.converter, gguf_file)
            loaded = load_model(str(options.checkpoint))
        except UserError as error:
            print(error, file=sys.stderr)
            return 1
        found = metadata(gguf_file)
        ours = in_transformers(loaded.model, loaded.tokenizer, options.text, options.new)
        theirs = in_llama_cpp(gguf_file, options.text, options.new)
        exact = in_float64(loaded.model, ours.ids)
    rows = [*shape_rows(loaded.model, found), *run_rows(ours, theirs, exact, options.positions)]
    table = Table(title=f"pre-tokenizer `{found.get('tokenizer.ggml.pre')}`, {found['general.architecture']}, float32")
    for head in ("", "transformers", "llama.cpp", "same"):
        table.add_column(head, no_wrap=True)
    for row in rows:
        table.add_row(row.what, row.ours, row.theirs, "yes" if row.same else "NO")
    console = Console(width=100)
    console.print(table)
    console.print(f"transformers: {loaded.tokenizer.decode(ours.greedy)!r}", markup=False)
    console.print(f"llama.cpp:    {loaded.tokenizer.decode(theirs.greedy)!r}", markup=False)
    return 0 if all(row.same for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
