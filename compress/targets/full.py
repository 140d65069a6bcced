"""The full target: a head group as the model has it."""

from __future__ import annotations

from typing import ClassVar, Literal

from compress.registry import targets
from compress.targets.target import Target


@targets.register("full")
class FullGroup(Target):
    """Sees every earlier key, or what the architecture's own sliding window lets it see."""

    runtime: ClassVar[str | None] = "compress.runtime.mixer_span"

    target: Literal["full"] = "full"
