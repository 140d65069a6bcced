"""The files of a tokenizer: which a model folder has, which is damaged, and their way into a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from compress.files import write_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
# Without one of these there are no tokens. A tokenizer of bytes has its settings alone.
VOCABULARIES = ("tokenizer.json", "tokenizer_config.json", *TOKENIZER_FILES[TOKENIZER_FILES.index("tokenizer.model") :])
TEMPLATES = "additional_chat_templates"
SETTINGS = "tokenizer_config.json"
# Every kind of character that tokenizers treat in their own way, and what looks like a special token.
PROBE = "  Hello, WORLD 2024\n\tnaïve 你好 🙂 <s></s><|endoftext|>x"

Say = Callable[[str], None]


def damaged_file(folder: Path) -> Path | None:
    """The first file of a tokenizer that should be a JSON object and is none."""
    for name in TOKENIZER_FILES[:4]:
        path = folder / name
        try:
            if path.is_file() and not isinstance(json.loads(path.read_bytes()), dict):
                return path
        except (OSError, ValueError, RecursionError):
            return path
    return None


def write_tokenizer(source: Path | None, tokenizer: Any, folder: Path, config: Any, say: Say) -> None:
    """Put a model's tokenizer into a checkpoint as its publisher wrote it, file by file.

    Where the copies would read as another tokenizer, because the checkpoint's architecture has another name, the class
    is noted in their settings; where that does not help, or there are no files, the tokenizer is saved anew.

    Args:
        source: the model's folder; None where it has none, as a GGUF file.
        tokenizer: the model's, as it was loaded.
        config: the checkpoint's configuration.
        say: called with a line for what differs from the files of the source.
    """
    names = [] if source is None else [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if source is None or not names:
        tokenizer.save_pretrained(folder)
        return
    for name in names:
        shutil.copyfile(source / name, folder / name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, folder / TEMPLATES, copy_function=shutil.copyfile)
    _forget_code(folder, say)
    if same_tokenizer(_read(folder, config), tokenizer):
        return
    write_json(folder / SETTINGS, _settings(folder) | {"tokenizer_class": type(tokenizer).__name__})
    if same_tokenizer(_read(folder, config), tokenizer):
        say(f"{SETTINGS} names the tokenizer's class, {type(tokenizer).__name__}, which the source left to its config")
        return
    for name in names:
        (folder / name).unlink()
    tokenizer.save_pretrained(folder)
    say("the tokenizer was saved again, because copies of its files would load as a different tokenizer")


def _forget_code(folder: Path, say: Say) -> None:
    """Take the note of a tokenizer's own code out of the copied settings: it was loaded without that code."""
    settings = _settings(folder)
    if "auto_map" in settings:
        del settings["auto_map"]
        write_json(folder / SETTINGS, settings)
        say(f"{SETTINGS} no longer names code (`auto_map`), which a checkpoint does not bring")


def _settings(folder: Path) -> dict[str, Any]:
    """What the settings of a tokenizer say; empty where there are none."""
    path = folder / SETTINGS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _read(folder: Path, config: Any) -> Any:
    """The tokenizer in a folder, as a checkpoint of this configuration has it; None where it cannot be read."""
    try:
        return AutoTokenizer.from_pretrained(folder, config=config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):
        return None


def same_tokenizer(one: Any, other: Any) -> bool:
    """Whether two tokenizers treat texts and chats alike."""
    return one is not None and _facts(one) == _facts(other)


def _facts(tokenizer: Any) -> list[Any]:
    return [
        tokenizer(PROBE, verbose=False)["input_ids"],
        tokenizer(PROBE, add_special_tokens=False, verbose=False)["input_ids"],
        tokenizer.decode(tokenizer(PROBE, verbose=False)["input_ids"]),
        tokenizer.get_vocab(),
        tokenizer.special_tokens_map,
        tokenizer.padding_side,
        tokenizer.truncation_side,
        tokenizer.model_max_length,
        tokenizer.chat_template,
    ]
