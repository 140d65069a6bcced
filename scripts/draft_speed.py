#!/usr/bin/env python3
"""Speculative decoding with a plan: how many drafted tokens are accepted, and what time that takes or saves.

    python -m scripts.draft_speed profiles/smollm2-135m/quickstart.plan.json --length 1500 --new 48 --output FILE.json

Every row generates greedily from the same prompts, of the evaluation part of the embedded text: the dense model alone;
with the same weights under the plan as its draft; with drafts looked up in the prompt, as the control; and the planned
model alone and with drafts looked up. The text has to be that of the model alone, in float32. Time is the process's
own on a CPU, where it has one thread and others may run beside it, and the wall's on a GPU. Prints a table, and writes
it with machine and versions.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from compress.data.text import EmbeddedText, tokenise
from compress.environment import environment
from compress.files import write_json
from compress.models.load import load_model
from compress.models.planned import planned_model
from compress.plan import read_plan


@dataclass
class Row:
    """What one way of generating came to, over all prompts.

    Attributes:
        name: the way.
        tokens: new tokens of all prompts.
        passes: forward passes of the target, those of the prompts included.
        drafted: tokens that the target was given to check.
        accepted: those of them that are in the text.
        draft_passes: forward passes of the draft.
        seconds: of each prompt.
        same: prompts whose text is that of the target alone.
        cache_bytes: what the target's cache holds at the end of the last prompt.
    """

    name: str
    tokens: int = 0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_passes: int = 0
    seconds: list[float] = field(default_factory=list)
    same: int = 0
    cache_bytes: int = 0

    def line(self, alone: Row) -> str:
        """One line of the table, with the time beside that of the target alone."""
        drafts = f"{self.accepted / self.drafted:.3f} of {self.drafted}" if self.drafted else "-"
        each = f"{self.tokens / self.passes:.2f}"
        took, beside = sum(self.seconds), sum(alone.seconds)
        return (
            f"| {self.name} | {drafts} | {each} | {took:.1f} s | {took / beside:.2f} | {self.same} of "
            f"{len(self.seconds)} | {self.cache_bytes / 2**20:.1f} MiB |"
        )


HEAD = "| way | drafted tokens accepted | tokens a pass | time | beside the model alone | same text | cache |\n" + (
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def main() -> None:
    """Generate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="a plan of the model")
    parser.add_argument("--model", default="demo/smollm2-135m")
    parser.add_argument("--length", type=int, default=1500, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=48, help="tokens to generate")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--draft", type=int, default=5, help="tokens that are drafted at once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="a file for the figures")
    options = parser.parse_args()
    torch.manual_seed(0)
    loaded = load_model(options.model, dtype="float32", device=options.device)
    dense = loaded.model
    planned = planned_model(dense, read_plan(options.plan, loaded.shape))
    for model in (dense, planned):
        model.generation_config.eos_token_id = None  # all texts have the same length
    # Drafts of one length, whatever the draft thinks of its tokens.
    planned.generation_config.update(
        num_assistant_tokens=options.draft, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    source = EmbeddedText()
    ids = tokenise(loaded.tokenizer, source.part(source.excerpt().text, "evaluation"))
    starts = range(0, options.prompts * options.length, options.length)
    prompts = [torch.tensor([ids[start : start + options.length]], device=options.device) for start in starts]
    if len(ids) < options.prompts * options.length:
        raise SystemExit(f"the text has {len(ids)} tokens; ask for fewer or shorter prompts")
    lookup = {"prompt_lookup_num_tokens": options.draft}
    ways: list[tuple[str, Any, dict[str, Any], Any]] = [
        ("dense", dense, {}, None),
        ("dense, drafted by the plan", dense, {"assistant_model": planned}, planned),
        ("dense, prompt lookup", dense, lookup, None),
        ("plan", planned, {}, None),
        ("plan, prompt lookup", planned, lookup, None),
    ]
    rows = [Row(name) for name, *_ in ways]
    clock = time.perf_counter if options.device.startswith("cuda") else time.process_time
    for prompt in prompts:
        texts: dict[int, torch.Tensor] = {}
        for row, (_, target, given, draft) in zip(rows, ways, strict=True):
            text = generate(row, target, given, draft, prompt, options.new, clock)
            row.same += torch.equal(text, texts.setdefault(id(target), text))
    print(HEAD)
    for row, (_, target, *_) in zip(rows, ways, strict=True):
        print(row.line(rows[0] if target is dense else rows[3]))
    if options.output:
        asked = {name: str(value) for name, value in vars(options).items() if name != "output"}
        write_json(options.output, {"asked": asked, "rows": [asdict(row) for row in rows]} | environment())


def generate(
    row: Row, target: Any, given: dict[str, Any], draft: Any, prompt: torch.Tensor, new: int, clock: Callable[[], float]
) -> torch.Tensor:
    """Add to a row what generating `new` tokens behind a prompt `[1, T]` comes to; the text."""
    mask = torch.ones_like(prompt)
    with columns_of(target) as columns, columns_of(draft) as drafting:
        if prompt.is_cuda:
            torch.cuda.synchronize()
        began = clock()
        made = target.generate(
            prompt, attention_mask=mask, max_new_tokens=new, do_sample=False, return_dict_in_generate=True, **given
        )
        if prompt.is_cuda:
            torch.cuda.synchronize()
        row.seconds.append(clock() - began)
    found = made.sequences
    tokens = found.shape[1] - prompt.shape[1]
    row.tokens += tokens
    row.passes += len(columns)
    row.draft_passes += len(drafting)
    # Every pass gives one token of its own, and is given the token before and the drafted ones; the first the prompt.
    row.drafted += sum(columns) - prompt.shape[1] - (len(columns) - 1)
    row.accepted += tokens - len(columns)
    cache = made.cache if "cache" in made else made.past_key_values
    if hasattr(cache, "held_bytes"):
        row.cache_bytes = cache.held_bytes()
    else:
        row.cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return found


@contextmanager
def columns_of(model: Any) -> Iterator[list[int]]:
    """The columns of every forward pass of a model meanwhile; none without a model."""
    columns: list[int] = []
    if model is None:
        yield columns
        return

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        columns.append((args[0] if args else kwargs["input_ids"]).shape[1])

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield columns
    finally:
        hook.remove()


if __name__ == "__main__":
    if not torch.cuda.is_available():
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
    main()
