"""The generation config that a checkpoint gets: its source's, as far as a checkpoint can do what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from compress.errors import UserError
from compress.json_file import read_object
from compress.models.weights import AGAIN, refuse_pointer

FILE = "generation_config.json"
# What a checkpoint does not take over, and why. All else is carried.
DROPPED = {
    "cache_implementation": "a checkpoint makes its own cache",
    "cache_config": "a checkpoint makes its own cache",
    "max_cache_len": "a checkpoint makes its own cache",
    "output_attentions": "a checkpoint has no attention weights to return",
    "custom_generate": "a checkpoint runs only its own code",
    "use_mtp": "a checkpoint has no heads that predict several tokens",
    "speculation_type": "a checkpoint does not draft tokens",
    "assistant_early_exit": "a checkpoint does not draft tokens",
    "prompt_lookup_num_tokens": "not every plan can take drafted tokens back, so it is for the call of generate()",
    "compile_config": "a checkpoint is compiled only when the user asks for it",
}
ONE_ID = ("bos_token_id", "pad_token_id", "decoder_start_token_id")
IGNORED = ("transformers_version", "_from_model_config", "_commit_hash", "_original_object_hash")


def read_generation(folder: Path, config_values: dict[str, Any]) -> tuple[GenerationConfig, list[str]]:
    """The generation config of a model folder, repaired, and a line for every setting that was changed or left out.

    Args:
        config_values: of config.json, which holds generation settings where there is no generation_config.json.

    Raises:
        UserError: a damaged file, or settings that transformers does not load.
    """
    path = folder / FILE
    if not path.is_file():
        known = GenerationConfig().to_dict().keys() - {"use_cache", "output_attentions", "output_hidden_states"}
        return repaired({key: value for key, value in config_values.items() if key in known}, "config.json")
    refuse_pointer(path)
    return repaired(read_object(path, "the generation config", fix=AGAIN), str(path))


def repaired(values: dict[str, Any], where: str) -> tuple[GenerationConfig, list[str]]:
    """A generation config that can be saved, and a line for every setting of the source that it does not have.

    Raises:
        UserError: settings that transformers refuses, too.
    """
    kept = {key: value for key, value in values.items() if value is not None and key not in IGNORED}
    lines = []

    def drop(key: str, why: str) -> None:
        lines.append(f"{Path(where).name}: `{key}: {_short(kept.pop(key))}` is left out: {why}")

    for key in list(kept):
        if key in DROPPED and kept[key] is not False:
            drop(key, DROPPED[key])
        elif key == "use_cache" and kept[key] is False:
            drop(key, "a plan is about the cache, so it stays on")
        elif key.startswith("__") or callable(getattr(GenerationConfig, key, None)):
            drop(key, "it is not a setting")
        elif key in ONE_ID and isinstance(kept[key], list) and kept[key]:
            note = f"`{key}: {_short(kept[key])}` is a list, of which the first token is used"
            lines.append(f"{Path(where).name}: {note}")
            kept[key] = kept[key][0]
    _check_ids(kept, where)
    while True:
        try:
            made = GenerationConfig(**kept)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise _refused(where, error) from error
        try:
            made.validate(strict=True)
        except (ValueError, TypeError, AttributeError) as error:
            # transformers loads these with a warning and refuses to save them; they have no effect.
            idle = [key for key in re.findall(r"^- `(\w+)`:", str(error), re.MULTILINE) if key in kept]
            if not idle:
                raise _refused(where, error) from error
            for key in idle:
                drop(key, _why(key, str(error)))
            continue
        return made, lines


def check_generation(made: GenerationConfig, tokenizer: Any, config: Any, where: str) -> None:
    """Generate two tokens with a generation config, on a model of no size with the vocabulary of `config`.

    Raises:
        UserError: it fails, as it would with the real model at the end of a run.
    """
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    with torch.random.fork_rng(devices=[]):
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=config.vocab_size)).eval()
        model.generation_config = made
        prompt = torch.ones(1, 4, dtype=torch.long)
        try:
            model.generate(prompt, attention_mask=prompt, max_new_tokens=2, tokenizer=tokenizer)
        except Exception as error:  # a setting that fails, fails in its own way
            raise _refused(where, error) from error


def plain_generation(source: GenerationConfig) -> GenerationConfig:
    """Greedy generation with a source's special tokens and nothing else, for what is measured and verified."""
    return GenerationConfig(
        bos_token_id=source.bos_token_id, eos_token_id=source.eos_token_id, pad_token_id=source.pad_token_id
    )


def _why(key: str, message: str) -> str:
    """Why a setting has no effect, from transformers' own message about it."""
    line = next((line for line in message.splitlines() if line.startswith(f"- `{key}`:")), "")
    for word, why in (
        ("do_sample", "it has no effect without `do_sample: true`; set that in the source to keep it"),
        ("num_beams", "it has no effect without `num_beams` above 1"),
        ("return_dict_in_generate", "it has no effect without `return_dict_in_generate: true`"),
        ("should be positive", "no token has this number"),
    ):
        if word in line:
            return why
    return "transformers does not save it"


def _check_ids(kept: dict[str, Any], where: str) -> None:
    for key in [*ONE_ID, "eos_token_id"]:
        value = kept.get(key)
        ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if key in kept and not all(type(number) is int for number in ids):
            raise UserError(
                f"`{key}` is not a token number", where=where, expected="a whole number", found=_short(value)
            )


def _refused(where: str, error: Exception) -> UserError:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return UserError(
        "transformers rejects this generation config",
        where=where,
        expected="settings that `GenerationConfig` loads and `generate` runs with",
        found=" ".join(lines)[:300] or type(error).__name__,
        fix="correct the setting, or remove the file; the special tokens of config.json are then used",
    )


def _short(value: Any) -> str:
    return json.dumps(value, default=str)[:60]
