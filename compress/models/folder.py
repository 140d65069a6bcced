"""Checks a model folder by its small files before anything of it is loaded: values, adapters, formats."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from compress.errors import Problem, UserError
from compress.json_file import read_object
from compress.models.weights import AGAIN, DEQUANTISED, refuse_pointer

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
PLAN = "compress_plan"
MOST = 2**31 - 1
LEAST_CONTEXT = 32  # positions: a checkpoint is verified on 16 tokens and 16 that it generates

COUNTS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "sliding_window",
)
NUMBERS = ("rms_norm_eps", "rope_theta", "query_pre_attn_scalar", "initializer_range")
FLOATS = [name for name in ("float64", "float32", "float16", "bfloat16") if hasattr(torch, name)]
# Calling conventions and leftovers of training that a configuration may say, and what this project sets instead.
REPAIRS: dict[str, tuple[Any, str]] = {
    "return_dict": (True, "compress reads the outputs of a model by name"),
    "output_attentions": (False, "compressed attention cannot return its weights"),
    "output_hidden_states": (False, "hidden states are returned only where a caller asks for them"),
    "use_cache": (True, "training leaves this switched off, and a plan is about the cache"),
}


def read_config(folder: Path, spec: str) -> dict[str, Any]:
    """The values of a folder's config.json, checked as far as this project relies on them.

    Args:
        spec: what the user called the model.

    Raises:
        UserError: no config.json, an adapter in it or beside it, quantised weights, or values that no model has.
    """
    path = folder / CONFIG
    _refuse_adapter(folder, spec)
    if not path.is_file():
        raise _no_model(folder, spec)
    refuse_pointer(path)
    values = read_object(path, "the model's configuration", fix=AGAIN, finite=False)
    check_values(values, str(path))
    _refuse_quantised(values, path)
    return values


def check_values(values: dict[str, Any], where: str) -> None:
    """Raise UserError for every value of a configuration that no model has.

    Args:
        where: the file, for the message.
    """
    problems = []

    def wrong(key: str, expected: str) -> None:
        problems.append(
            Problem(f"`{key}` is not possible", where, expected=expected, found=json.dumps(values.get(key))[:80])
        )

    if not isinstance(values.get("model_type"), str):
        wrong("model_type", "the name of an architecture")
    for key in COUNTS:
        value = values.get(key)
        if value is not None and not (type(value) is int and 1 <= value <= MOST):
            wrong(key, f"a whole number from 1 to {MOST:,}")
    for key in NUMBERS:
        value = values.get(key)
        if value is not None and not (type(value) in (int, float) and 0 < value < math.inf):
            wrong(key, "a number above 0")
    for key in ("architectures", "layer_types"):
        value = values.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            wrong(key, "a list of names")
    for key in ("dtype", "torch_dtype"):
        if values.get(key) is not None and values[key] not in FLOATS:
            wrong(key, f"one of {', '.join(FLOATS)}")
    for key in ("rope_parameters", "rope_scaling", "text_config", "quantization_config"):
        if values.get(key) is not None and not isinstance(values[key], dict):
            wrong(key, "an object")
    heads, groups, layers = (values.get(key) for key in ("num_attention_heads", "num_key_value_heads", COUNTS[0]))
    if not problems:
        if heads and groups and heads % groups:
            wrong("num_key_value_heads", f"a divisor of the {heads} heads")
        if values.get("layer_types") is not None and layers and len(values["layer_types"]) != layers:
            wrong("layer_types", f"one for each of the {layers} layers")
        if (values.get("max_position_embeddings") or LEAST_CONTEXT) < LEAST_CONTEXT:
            wrong("max_position_embeddings", f"{LEAST_CONTEXT} tokens or more: a checkpoint is verified on that many")
    if problems:
        problems[-1].fix = "correct config.json, or download it again"
        raise UserError(problems)


def repairs(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What is set instead of values of a configuration, and a line for each."""
    wanted = {key: value for key, (value, _) in REPAIRS.items() if key in values and values[key] != value}
    lines = [
        f"config.json says `{key}: {json.dumps(values[key])}`: {json.dumps(value)} here and in a checkpoint, because "
        f"{REPAIRS[key][1]}"
        for key, value in wanted.items()
    ]
    return wanted, lines


def refuse_plan(values: dict[str, Any], folder: Path, spec: str) -> None:
    """Raise UserError for a patched checkpoint, which is compressed already; a native one is a model as any other."""
    if PLAN not in values:
        return
    recipe = folder / "recipe.yaml"
    raise UserError(
        "this checkpoint already carries a plan, in the patched form",
        where=spec,
        expected="a dense model, or a checkpoint in the native form",
        fix=f"name the model that it was made from{f', which {recipe} says' if recipe.is_file() else ''}; "
        "`compress eval` and `compress bench` take the checkpoint itself",
    )


def _refuse_quantised(values: dict[str, Any], path: Path) -> None:
    quantization = values.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method")
    raise UserError(
        "the weights are quantised",
        where=f"{path}: quantization_config",
        expected="weights in float32, bfloat16 or float16, or a .gguf file, which is dequantised",
        found=f"quantised by {method if isinstance(method, str) else 'an unnamed method'}",
        fix=DEQUANTISED,
    )


def merge_line(base: str, adapter: str) -> str:
    """A command that merges an adapter into its model and saves it, with the tokenizer, to `merged`."""
    return (
        f'python -c "from peft import PeftModel; import transformers as t; '
        f"m = t.AutoModelForCausalLM.from_pretrained('{base}', dtype='auto'); "
        f"PeftModel.from_pretrained(m, '{adapter}').merge_and_unload().save_pretrained('merged'); "
        f"t.AutoTokenizer.from_pretrained('{base}').save_pretrained('merged')\""
    )


def _refuse_adapter(folder: Path, spec: str) -> None:
    """An adapter is no model, and transformers would load one that lies beside a model into it."""
    path = folder / ADAPTER
    if not path.is_file():
        return
    refuse_pointer(path)
    base = read_object(path, "the adapter's configuration", fix=AGAIN, finite=False).get("base_model_name_or_path")
    named = base if isinstance(base, str) and base else None
    if (folder / CONFIG).is_file():
        apart = str(folder / "adapter")
        raise UserError(
            "an adapter lies beside the model in this folder",
            where=str(path),
            expected="a model alone, or with the adapter merged into its weights",
            found=f"an adapter for `{named}`" if named else "an adapter",
            fix=f"move {ADAPTER} and adapter_model.* to {apart}; then the folder is the model without the adapter, and "
            f"this merges it: {merge_line(spec, apart)}, after which the model is `merged`",
        )
    raise UserError(
        "this folder holds an adapter, not a model",
        where=spec,
        expected="a model with the adapter merged into its weights",
        found=f"an adapter for `{named}`" if named else "an adapter that does not name its model",
        fix=f"merge it: {merge_line(named or 'BASE', spec)}, after which the model is `merged`",
    )


def _no_model(folder: Path, spec: str) -> UserError:
    """Why a folder is no model, and which one was meant."""
    inside = folder / "checkpoint"
    ggufs = sorted(folder.glob("*.gguf"))
    fix = f"name the file: {ggufs[0]}" if ggufs else None
    if (inside / CONFIG).is_file():
        carries = PLAN in read_values(inside / CONFIG)
        dense = read_values(folder / "model.json").get("model")
        named = f"`{dense}`" if isinstance(dense, str) else "the model that recipe.yaml names"
        fix = f"{named} is its dense model; its checkpoint is `{inside}`" + (
            ", which carries a plan: `compress eval` and `compress bench` take it, a recipe does not" if carries else ""
        )
    return UserError(
        "this is a run folder, not a model" if (inside / CONFIG).is_file() else "not a model folder",
        where=spec,
        expected=f"a {CONFIG} and *.safetensors files in it",
        found=", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "an empty folder",
        fix=fix,
    )


def read_values(path: Path) -> dict[str, Any]:
    """The JSON object in a file, for a hint or a question; empty where it cannot be read."""
    try:
        return read_object(path, "the file")
    except UserError:
        return {}
