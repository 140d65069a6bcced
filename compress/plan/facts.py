"""The facts about a model that a plan and a profile are bound to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from compress.runtime.span import NO_END
from compress.targets.cost import Cost
from compress.targets.full import FullGroup
from compress.targets.unit import Unit

# No model has more; what is larger is damage, and would only fail later or take all memory.
MOST_LAYERS, MOST_HEADS, MOST_HEAD_DIM = 10_000, 1 << 16, 1 << 16
Tokens = Annotated[int, Field(ge=1, lt=NO_END)]


class ModelShape(BaseModel):
    """Sizes and fingerprint of one model.

    Attributes:
        architecture: stock class name, for instance `LlamaForCausalLM`.
        native_windows: per layer, the sliding window of the architecture itself in tokens, None where there is none.
        fingerprint: of architecture, sizes, rules and every weight (see `fingerprint_of`); in files that were written
            before it was of a sample of the weights. Empty where no weights are at hand.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str
    layers: int = Field(ge=1, le=MOST_LAYERS)
    query_heads: int = Field(ge=1, le=MOST_HEADS)
    kv_heads: int = Field(ge=1, le=MOST_HEADS)
    head_dim: int = Field(ge=1, le=MOST_HEAD_DIM)
    native_windows: tuple[Tokens | None, ...]
    fingerprint: str

    _sampled: str | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelShape:
        if self.query_heads % self.kv_heads:
            raise ValueError(f"query_heads: expected a multiple of kv_heads ({self.kv_heads}), got {self.query_heads}")
        return self

    @property
    def group_size(self) -> int:
        """Query heads of a head group."""
        return self.query_heads // self.kv_heads

    def unbound(self) -> ModelShape:
        """The same sizes with a fingerprint that no weights have, for plans that are bound to none."""
        return self.model_copy(update={"fingerprint": f"v2:{0:064x}"})

    def known_as(self, sampled: str) -> ModelShape:
        """Also recognise files that have `sampled`, the older fingerprint of a sample of the weights; returns self."""
        self._sampled = sampled
        return self

    def differing(self, recorded: Mapping[str, Any]) -> list[str]:
        """Names of the fields in which a record of a model is not this model; an older fingerprint counts, too.

        Args:
            recorded: the fields of a `ModelShape`, as a file has them.
        """
        mine = self.model_dump()
        names = [name for name in mine if name != "fingerprint" and recorded[name] != mine[name]]
        if recorded["fingerprint"] not in (self.fingerprint, self._sampled):
            names.append("fingerprint")
        return names

    def unit(self, layer: int, itemsize: int = 2, *, paged: bool = True, parameters: int = 0) -> Unit:
        """A head group of a layer with all of its query heads; arguments as of `Unit`."""
        return Unit(self.group_size, self.head_dim, itemsize, self.native_windows[layer], paged, parameters)

    @property
    def free_unit(self) -> Unit:
        """A head group of the first layer that does not slide by itself; of the first one where all do."""
        return self.unit(next((layer for layer, native in enumerate(self.native_windows) if native is None), 0))

    def dense_cost(self, length: int, itemsize: int = 2) -> Cost:
        """What the model costs as it is, with transformers' own cache; parameters are not counted."""
        units = (self.unit(layer, itemsize, paged=False) for layer in range(self.layers))
        return Cost.total(FullGroup().cost(unit, length) * self.kv_heads for unit in units)
