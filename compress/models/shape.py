"""The facts about a model that a plan and a profile are bound to."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from compress.models.families import attention_modules, family_of
from compress.runtime.span import native_windows


class ModelShape(BaseModel):
    """Sizes and fingerprint of one model.

    Attributes:
        architecture: stock class name, for instance `LlamaForCausalLM`.
        native_windows: per layer, the sliding window of the architecture itself in tokens, None where there is none.
        fingerprint: `sha256:` of architecture, sizes and a sample of every weight (see `fingerprint_of`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    native_windows: tuple[int | None, ...]
    fingerprint: str


def fingerprint_of(model: torch.nn.Module, sizes: dict[str, Any]) -> str:
    """`sha256:...` of the sizes and of up to 256 evenly spaced values of every parameter.

    A sample keeps this below a second on a 70B model; another checkpoint of the same sizes differs in it.
    Values are rounded to bfloat16 first, so that a model has one fingerprint in float32 and in bfloat16.
    Names are sorted, so the order of registration does not matter.
    """
    digest = hashlib.sha256(repr(sorted(sizes.items())).encode())
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 256)][:256].cpu().bfloat16().float()
        digest.update(f"{name}:{tuple(weight.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def shape_of(model: torch.nn.Module) -> ModelShape:
    """Shape and fingerprint of a supported model.

    Raises:
        UserError: the architecture is not supported.
    """
    config: Any = model.config
    family = family_of(config)
    attention: Any = attention_modules(model)
    windows = tuple(native_windows(config, len(attention)))
    sizes = {
        "architecture": family.architecture,
        "layers": len(attention),
        "query_heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": attention[0].head_dim,
        "native_windows": windows,
    }
    return ModelShape(**sizes, fingerprint=fingerprint_of(model, sizes))
