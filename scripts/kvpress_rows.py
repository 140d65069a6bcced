"""kvpress's presses on the texts of `scripts/retain_runs.py`, at equal kept share; its rows come into the same table.

kvpress 0.5 needs transformers below 5.3, so it gets a folder of its own beside a Python that has torch:

    pip install --no-deps --target KVP kvpress==0.5.5 transformers==5.2.0 "tokenizers>=0.22,<=0.23" \\
        "huggingface_hub<2" "cachetools<6" fire termcolor httpx httpcore h11 anyio certifi idna sniffio
    PYTHONPATH=KVP python scripts/kvpress_rows.py --out FOLDER --model FOLDER_OF_A_MODEL [--seeds 0,1] [--presses KVzip]
    python scripts/retain_runs.py --texts FOLDER --out FOLDER --rows base   # the table, with all that is there

All of these wheels are pure Python but that of tokenizers, so a machine without network takes them from a folder
(`pip download`, then `--no-index --find-links`). FOLDER is that of `retain_runs.py`: its prompts.SEED.json is read, and
kvpress_PRESS-SEED.json is written there. `--save FOLDER_OF_A_MODEL`, run without KVP, writes the demo model as a folder
that this transformers reads.

Each press compresses a text behind its prefill, without knowing the questions; these are then asked as a batch, each
with a copy of the cache, and an answer is right when each of its tokens is the most likely one. KVzip's scores do not
depend on the share, so it scores a text once for all of them. Presses with weights of their own are not here: KVzap's
are on a hub that a machine without network cannot reach, and there are none for this model. Knorm, SnapKV, TOVA and
ExpectedAttention keep equally many tokens in all head groups and free the others; KVzip masks, and frees nothing. For a
masked key kvpress looks for a vector that gets no weight from any query of a pass, and fails where these are many, so
here its masks are masks. Texts have no chat template, whose beginning kvpress's KVzip takes the first tokens for: it
never repeats those, and they are not kept.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional

NAME = "masked_by_kvpress"
PRESSES = ("KVzip", "KVzipPlus", "TOVA", "SnapKV", "ExpectedAttention", "Knorm")


def main() -> None:
    """Run the presses that are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, help="folder of retain_runs.py, whose texts are read and where the rows are written")
    add("--model", type=Path, default=Path("smollm2-135m"), help="folder of the model")
    add("--save", type=Path, help="write the demo model to a folder, and end; needs compress, not kvpress")
    add("--seeds", default="0")
    add("--shares", default="50,25,12.5,6.25", help="of the tokens of a text, in percent, by commas")
    add("--presses", default=",".join(PRESSES), help="by commas")
    add("--prompts", type=int, default=50, help="texts of each seed")
    add("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    options = parser.parse_args()
    if options.save is not None:
        save(options.save)
        return
    if unknown := set(options.presses.split(",")) - set(PRESSES):
        sys.exit(f"no press {', '.join(sorted(unknown))}; presses are {', '.join(PRESSES)}")
    model = load(options)
    for seed in map(int, options.seeds.split(",")):
        data = json.loads((options.out / f"prompts.{seed}.json").read_text())
        for press in options.presses.split(","):
            path = options.out / f"kvpress_{press.lower()}-{seed}.json"
            if path.is_file():
                continue
            started = time.perf_counter()
            cells = run(options, model, press, data)
            path.write_text(json.dumps(record(press, seed, cells)))
            print(f"{press}, seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
            for cell in cells:
                answers = [answer for right in cell["right"].values() for answer in right]
                seconds = mean(cell["seconds"])
                print(f"  {cell['share']:g}%: {sum(answers) / len(answers):.3f} right, {seconds:.3g} s a text")


def save(folder: Path) -> None:
    """The demo model and its tokenizer, as transformers saves them."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from compress.models.load import load_model

    loaded = load_model("demo/smollm2-135m", dtype="bfloat16")
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def load(options: argparse.Namespace) -> Any:
    """The model, once kvpress has patched transformers' attention."""
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

    for name in ("datasets", "requests"):  # no press here loads anything by them
        if find_spec(name) is None:
            stub: Any = ModuleType(name)
            stub.load_dataset = None
            sys.modules[name] = stub
    import_module("kvpress")
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    import_module("transformers.utils.logging").disable_progress_bar()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lambda *given, **named: None)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, attn_implementation=NAME)
    return model.to(device).eval()


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention without padding, and without the keys that a press has masked."""
    batch, groups, length, _ = key.shape
    count, size = query.shape[2], query.shape[1] // groups
    keys, values = (tensor.repeat_interleave(size, 1) for tensor in (key, value))
    if count == length:  # a prefill, before any press masks
        module.masked_key_indices = None
        out = functional.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    seen = torch.ones(count, length, dtype=torch.bool, device=key.device).tril(length - count)
    seen = seen.expand(batch, groups, -1, -1)
    if getattr(module, "masked_key_indices", None) is not None:
        hidden = torch.zeros(batch, groups, length, dtype=torch.bool, device=key.device)
        hidden[tuple(places.to(key.device) for places in module.masked_key_indices)] = True
        seen = seen & ~hidden[:, :, None]
    mask = seen.repeat_interleave(size, 1)
    out = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def record(press: str, seed: int, cells: list[dict[str, Any]]) -> dict[str, Any]:
    """What a file of rows has, as of `retain_runs.py`."""
    from importlib.metadata import version

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = {name: version(name) for name in ("kvpress", "transformers", "torch")}
    cells = [{**cell, "seed": seed} for cell in cells]
    return {"row": f"kvpress {press}", "seed": seed, "device": device, "versions": versions, "cells": cells}


def mean(values: Sequence[float]) -> float:
    """Of some numbers, at least one."""
    return sum(values) / len(values)


@torch.inference_mode()
def run(options: argparse.Namespace, model: Any, press: str, data: dict[str, Any]) -> list[dict[str, Any]]:
    """A press on all texts and windows, at every share."""
    shares = [float(share) for share in options.shares.split(",")]
    texts = data["texts"][: options.prompts]
    kinds = [question["kind"] for question in texts[0]["questions"]]
    cells = {
        share: {
            "row": f"kvpress {press}",
            "share": share,
            "right": {kind: [] for kind in kinds},
            "kept": [],
            "held": [],
            "whole": [],
            "tail": [],
            "seconds": [],
        }
        for share in shares
    }
    cell: Any
    for number, text in enumerate([texts[0], *texts]):  # the first one twice: its first time is that of starting
        for share, cache, seconds in compressed(model, press, text["tokens"], shares):
            if not number:
                continue
            cell = cells[share]
            size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            each = size // (len(cache.layers) * cache.layers[0].keys.shape[2]) if size else 1
            cell["held"].append(size / (each * len(cache.layers) * len(text["tokens"])))
            cell["kept"].append(share / 100)
            cell["seconds"].append(seconds)
            for question, right in zip(text["questions"], answered(model, text, cache), strict=True):
                cell["right"][question["kind"]].append(int(right))
    cut = data["cut"]
    for window in data["windows"]:
        for share, cache, _ in compressed(model, press, window[:cut], shares):
            cells[share]["tail"].append(tail_loss(model, window, cut, cache))  # type: ignore[attr-defined]
    return list(cells.values())


def clock() -> float:
    """Seconds, when the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def compressed(
    model: Any, press: str, tokens: Sequence[int], shares: Sequence[float]
) -> Iterator[tuple[float, Any, float]]:
    """The cache of a text at every share, to be used up before the next one, and the seconds that it took."""
    ids = torch.tensor([tokens], device=model.device)
    if press.startswith("KVzip"):
        yield from of_kvzip(model, ids, shares, plus=press == "KVzipPlus")
        return
    for share in shares:
        made = getattr(import_module("kvpress"), f"{press}Press")(compression_ratio=1 - share / 100)
        cache, started = new_cache(), clock()
        with made(model):
            model.model(input_ids=ids, past_key_values=cache)
        yield share, cache, clock() - started


def new_cache() -> Any:
    """An empty cache."""
    from transformers import DynamicCache

    return DynamicCache()


def of_kvzip(model: Any, ids: torch.Tensor, shares: Sequence[float], plus: bool) -> Iterator[tuple[float, Any, float]]:
    """KVzip's masks at every share, from one scoring."""
    base: Any = import_module("kvpress").KVzipPress

    class Levels(base):
        """Keeps the scores of a text, which `compress_post` takes its masks from."""

        score_val: torch.Tensor

        def compress_post(self, model: Any) -> None:
            """Called once a text is scored; `mask` does the work."""
            self.scores = self.score_val.clone()

        def mask(self, model: Any, share: float) -> None:
            """Mask what a share does not keep."""
            self.score_val, self.compression_ratio = self.scores.clone(), 1 - share / 100
            super().compress_post(model)

    press, cache = Levels(compression_ratio=0.5, kvzip_plus_normalization=plus), new_cache()
    started = clock()
    with press(model):
        model.model(input_ids=ids, past_key_values=cache)
    seconds = clock() - started
    length = ids.shape[1]
    for share in shares:
        copy = new_cache()
        for number, layer in enumerate(cache.layers):
            copy.update(layer.keys[:, :, :length].clone(), layer.values[:, :, :length].clone(), number)
        press.mask(model, share)
        yield share, copy, seconds
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None


def repeated(model: Any, cache: Any, count: int) -> None:
    """Copy a cache for `count` questions, with what is masked in it."""
    cache.batch_repeat_interleave(count)
    for layer in model.model.layers:
        masked = getattr(layer.self_attn, "masked_key_indices", None)
        if masked is not None:
            _, heads, places = masked
            rows = torch.arange(count).repeat_interleave(len(heads))
            layer.self_attn.masked_key_indices = (rows, heads.repeat(count), places.repeat(count))


def answered(model: Any, text: dict[str, Any], cache: Any) -> list[bool]:
    """Whether each question is answered right; the cache is used up."""
    questions = text["questions"]
    pieces = [[*question["tokens"], *question["answer"][:-1]] for question in questions]
    width = max(map(len, pieces))
    ids = torch.tensor([[*piece, *[piece[-1]] * (width - len(piece))] for piece in pieces], device=model.device)
    repeated(model, cache, len(pieces))
    likely = behind(model, ids, len(text["tokens"]), cache).argmax(-1).tolist()
    found = []
    for question, row in zip(questions, likely, strict=True):
        start = len(question["tokens"]) - 1
        found.append(row[start : start + len(question["answer"])] == question["answer"])
    return found


def tail_loss(model: Any, window: Sequence[int], cut: int, cache: Any) -> float:
    """Mean -ln p of the tokens of a window behind those that were compressed, but the first."""
    ids = torch.tensor([window[cut:]], device=model.device)
    logits = behind(model, ids, cut, cache)[0, :-1]
    losses = [
        functional.cross_entropy(part.float(), right, reduction="sum")
        for part, right in zip(logits.split(256), ids[0, 1:].split(256), strict=True)
    ]
    return float(torch.stack(losses).sum() / len(logits))


def behind(model: Any, ids: torch.Tensor, length: int, cache: Any) -> torch.Tensor:
    """Logits of tokens `[B, T]` that stand behind `length` tokens, whatever is left of these in the cache."""
    positions = torch.arange(length, length + ids.shape[1], device=ids.device)[None].expand(len(ids), -1)
    logits: torch.Tensor = model(input_ids=ids, past_key_values=cache, position_ids=positions, use_cache=True).logits
    return logits


if __name__ == "__main__":
    main()
