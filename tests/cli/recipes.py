"""A tiny model on disk and a recipe that runs the whole pipeline on it in seconds."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.tiny import VOCABULARY, tiny_model, tiny_tokenizer

# How every recipe of the tests begins, with the places that `make_recipe` makes.
HEAD = """\
model: {model}
output: {output}
device: cpu
calibration:
  text: &text {{source: file, path: {text}}}
"""
RECIPE = (
    HEAD
    + """\
  documents:
    - {{task: continuation, length: 320, count: 1, answer_tokens: 16}}
    - {{task: continuation, length: 192, count: 1, answer_tokens: 16}}
  held_out:
    - {{task: continuation, length: 384, count: 1, answer_tokens: 16}}
profile:
  statistics:
    - {{name: influence, grid: {{sinks: [4]}}}}
    - {{name: attention, sink: 4}}
search:
  solver: {{name: moa, points: 1}}
  budget: {{kv: 0.8, lengths: [320]}}
evaluate:
  compare: [plan, uniform]
  perplexity: {{text: *text, length: 256, windows: 2}}
"""
)


def make_recipe(folder: Path, dense: Any = None) -> Path:
    """Write a model (a Llama if none is given), text and recipe into a folder; the recipe's path."""
    model, text, recipe = folder / "model", folder / "text.txt", folder / "recipe.yaml"
    (dense or tiny_model("llama-gqa")).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    words = random.Random(0).choices(range(4, VOCABULARY), k=8000)
    text.write_text(" ".join(f"w{word}" for word in words))
    recipe.write_text(RECIPE.format(model=model, text=text, output=folder / "run"))
    return recipe
