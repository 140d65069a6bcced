"""Position frequencies that change with the length of the input: dynamic NTK and LongRoPE, as transformers has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# How the frequencies of a kind depend on the length, behind the tokens up to which they do not.
GROWS, SWITCHES = "dynamic", "longrope"


def rope_change(config: Any) -> tuple[str, int] | None:
    """The kind of frequencies that change with the length, and the tokens up to which they stay; None where all stay.

    A configuration has one set of parameters or, as Gemma 3's, one for each type of layer.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    for table in (parameters, *parameters.values()):
        if not isinstance(table, dict):
            continue
        kind = table.get("rope_type") or ""
        if GROWS in kind:
            return GROWS, config.max_position_embeddings
        if kind == SWITCHES:
            return SWITCHES, table["original_max_position_embeddings"]
    return None


# Models whose layers all turn the first numbers of queries and keys, number i together with number i + half of them, by
# angles that do not depend on the length.
HALVES = (
    *("arcee", "gemma", "gemma2", "gemma3_text", "granite", "llama", "ministral", "mistral", "mixtral", "olmo"),
    *("olmo2", "phi3", "qwen2", "qwen3", "seed_oss", "starcoder2"),
)


def undo_refusal(config: Any) -> str | None:
    """Why RoPE cannot be taken back from queries and keys of a model; None where it can."""
    kind = config.model_type.removeprefix("compress_")
    if kind not in HALVES:
        return f"how {kind} models turn queries and keys by position is not known to all of the toolkit"
    if (change := rope_change(config)) is not None:
        return f"its frequencies change with the length of the input ({change[0]})"
    return None


def turns(decoder: Any, layer: int) -> tuple[float, ...]:
    """The angles a token, in radians, by which a decoder's layer turns pairs of numbers of queries and keys.

    Raises:
        ValueError: see `undo_refusal`.
    """
    if (reason := undo_refusal(decoder.config)) is not None:
        raise ValueError(f"`rope: undo`: {reason}")
    with torch.device("cpu"):  # the decoder itself may lie nowhere yet
        rotary = type(decoder.rotary_emb)(config=decoder.config)
    types = getattr(decoder.config, "layer_types", None)
    kind = f"{types[layer]}_inv_freq" if types else ""
    found: list[float] = getattr(rotary, kind if hasattr(rotary, kind) else "inv_freq").tolist()
    return tuple(found)


def turned_back(x: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Queries or keys as they were before RoPE, up to the factor of scaled tables.

    Args:
        x: `[..., T, D]`.
        positions: `[..., T]`, or what broadcasts to it.
        frequencies: `[R / 2]`, of `turns`.
    """
    angles = positions[..., None].to(frequencies.dtype) * frequencies
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    half = len(frequencies)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cosine + second * sine, second * cosine - first * sine, rest], dim=-1)


def crosses(change: tuple[str, int], past: int, count: int) -> bool:
    """Whether cached keys of `past` tokens have other frequencies than a pass over `count` more tokens takes.

    LongRoPE changes once, dynamic NTK at every length beyond the switch.
    """
    kind, switch = change
    return past > 0 and past + count > switch and (kind == GROWS or past <= switch)


def begin_anew(module: Any, *_: Any) -> None:
    """Take back what the passes before have left in a rotary module of dynamic NTK.

    transformers keeps the frequencies of the longest input until one comes that is shorter than the model's context,
    so what an input gives would depend on those before it.
    """
    kinds = module.rope_type if isinstance(module.rope_type, dict) else {None: module.rope_type}
    for layer_type, kind in kinds.items():
        if GROWS in kind:
            prefix = "" if layer_type is None else f"{layer_type}_"
            setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq"))
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def steady(model: nn.Module) -> None:
    """Make what a model gives an input independent of the inputs before it, as it is for the first one."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds or ""]
        if any(GROWS in kind for kind in kinds) and begin_anew not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(begin_anew)


def carry_over(given: nn.Module, made: nn.Module) -> None:
    """Give `made`, a model built on meta, the rotary frequencies and other unsaved buffers of `given`: copies of them.

    Some versions of transformers keep frequencies as plain attributes of a rotary module.
    """
    saved = given.state_dict().keys()
    for name, buffer in given.named_buffers():
        owner, _, attribute = name.rpartition(".")
        setattr(made.get_submodule(owner), attribute, buffer if name in saved else buffer.clone())
    for name, module in given.named_modules():
        if hasattr(module, "rope_type"):
            target = made.get_submodule(name)
            for attribute, value in vars(module).items():
                if isinstance(value, torch.Tensor) and attribute in vars(target):
                    setattr(target, attribute, value.clone())
    steady(made)
