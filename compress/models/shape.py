"""Reads from a model the facts that a plan and a profile are bound to."""

from __future__ import annotations

from typing import Any

import torch

from compress.models.families import attention_modules, family_of
from compress.models.fingerprint import fingerprint_of, sampled_fingerprint_of
from compress.plan.facts import ModelShape
from compress.runtime.span import native_windows


def shape_of(model: torch.nn.Module) -> ModelShape:
    """Shape and fingerprint of a supported model; reads all of its weights, so take `LoadedModel.shape` where it is.

    Raises:
        UserError: the architecture is not supported.
    """
    sizes = _sizes(model)
    shape = ModelShape(**sizes, fingerprint=fingerprint_of(model, sizes))
    return shape.known_as(sampled_fingerprint_of(model, sizes))


def shape_without_weights(model: torch.nn.Module) -> ModelShape:
    """The sizes alone, of a model that may have no weights; its fingerprint is empty. Raises UserError: `shape_of`."""
    return ModelShape(**_sizes(model), fingerprint="")


def _sizes(model: torch.nn.Module) -> dict[str, Any]:
    config: Any = model.config
    family = family_of(config)
    attention: Any = attention_modules(model)
    windows = tuple(native_windows(config, len(attention)))
    return {
        "architecture": family.architecture,
        "layers": len(attention),
        "query_heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": attention[0].head_dim,
        "native_windows": windows,
    }
