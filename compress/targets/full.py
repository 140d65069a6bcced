"""The full target: a head group as the model has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from compress.registry import targets
from compress.runtime.span import AnySpan, own_span
from compress.targets.span import SpanTarget
from compress.targets.target import Target
from compress.targets.unit import Unit


@targets.register("full")
class FullGroup(SpanTarget):
    """Sees every earlier key, or what the architecture's own sliding window lets it see."""

    runtime: ClassVar[str | None] = "compress.runtime.mixer_span"
    as_built: ClassVar[bool] = True
    in_vllm: ClassVar[bool] = True

    target: Literal["full"] = "full"

    @classmethod
    def options(cls, unit: Unit, lengths: Sequence[int], grid: Any = None) -> list[Target]:
        return [cls()]

    def span(self, native: int | None = None) -> AnySpan:
        """All keys, or those of the layer's own window."""
        return own_span(native)
