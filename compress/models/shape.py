"""The facts about a model that a plan and a profile are bound to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from compress.models.families import family_of, layers_of
from compress.models.fingerprint import fingerprint_of, sampled_fingerprint_of
from compress.runtime.families import groups_of, head_size_of
from compress.runtime.span import native_windows
from compress.targets.cost import Cost
from compress.targets.full import FullGroup
from compress.targets.unit import Unit


class ModelShape(BaseModel):
    """Sizes and fingerprint of one model.

    Attributes:
        architecture: stock class name, for instance `LlamaForCausalLM`.
        native_windows: per layer, the sliding window of the architecture itself in tokens, None where there is none.
        fingerprint: of architecture, sizes, rules and every weight (see `fingerprint_of`); in files that were written
            before it was of a sample of the weights.
        sampled: the fingerprint as such files have it, of a model at hand; never written.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    native_windows: tuple[int | None, ...]
    fingerprint: str
    sampled: str | None = Field(default=None, exclude=True, repr=False)

    def unit(self, layer: int, itemsize: int = 2, *, paged: bool = True, parameters: int = 0) -> Unit:
        """A head group of a layer with all of its query heads; arguments as of `Unit`."""
        queries = self.query_heads // self.kv_heads
        return Unit(queries, self.head_dim, itemsize, self.native_windows[layer], paged, parameters)

    def dense_cost(self, length: int, itemsize: int = 2) -> Cost:
        """What the model costs as it is, with transformers' own cache; parameters are not counted."""
        units = (self.unit(layer, itemsize, paged=False) for layer in range(self.layers))
        return Cost.total(FullGroup().cost(unit, length) * self.kv_heads for unit in units)

    def differing(self, recorded: Mapping[str, Any]) -> list[str]:
        """Names of the fields in which a record of a model is not this model; an older fingerprint counts, too.

        Args:
            recorded: the fields of a `ModelShape`, as a file has them.
        """
        mine = self.model_dump()
        names = [name for name in mine if name != "fingerprint" and recorded[name] != mine[name]]
        if recorded["fingerprint"] not in (self.fingerprint, self.sampled):
            names.append("fingerprint")
        return names


def shape_of(model: torch.nn.Module) -> ModelShape:
    """Shape and fingerprint of a supported model; reads all of its weights, so take `LoadedModel.shape` where it is.

    Raises:
        UserError: the architecture is not supported.
    """
    sizes = _sizes(model)
    return ModelShape(**sizes, fingerprint=fingerprint_of(model, sizes), sampled=sampled_fingerprint_of(model, sizes))


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
