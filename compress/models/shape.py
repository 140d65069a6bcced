"""Reads from a model the facts that a plan and a profile are bound to."""

from __future__ import annotations

from typing import Any

import torch

from compress.models.families import family_of, layers_of
from compress.models.fingerprint import fingerprint_of, sampled_fingerprint_of
from compress.plan.facts import ModelShape
from compress.runtime.families import groups_of, head_size_of
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
    layers = len(layers_of(model))
    return {
        "architecture": family_of(config).architecture,
        "layers": layers,
        "query_heads": config.num_attention_heads,
        "kv_heads": groups_of(config),
        "head_dim": head_size_of(config),
        "native_windows": tuple(native_windows(config, layers)),
    }
