"""The strided target, an example of a new one: every so many tokens stay visible for good, beside a window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from compress.registry import Method, targets
from compress.targets.cost import Cost
from compress.targets.target import Target
from compress.targets.unit import Unit

Count = Annotated[int, Field(ge=1, lt=1 << 20)]


class StrideGrid(Method):
    """The windows and strides to choose from."""

    windows: tuple[Count, ...] = (64, 128, 256)
    strides: tuple[Count, ...] = (4, 16)


@targets.register("strided")
class StridedGroup(Target):
    """Sees the last `window` tokens, and of those before them every token whose position is a multiple of `stride`."""

    runtime: ClassVar[str | None] = "tests.examples.mixer_strided"
    noun: ClassVar[str] = "strided keys"
    grid: ClassVar[type[Method] | None] = StrideGrid

    target: Literal["strided"] = "strided"
    window: Count = Field(description="tokens at the end that are all visible")
    stride: Count = Field(description="of the tokens before them, every how many are visible")

    @classmethod
    def options(cls, unit: Unit, lengths: Sequence[int], grid: Any = None) -> list[Target]:
        """Every window with every stride; none in a layer that slides by itself."""
        if unit.native is not None:
            return []
        choice = grid or StrideGrid()
        return [cls(window=window, stride=stride) for window in choice.windows for stride in choice.strides]

    def cost(self, unit: Unit, length: int) -> Cost:
        """What the mixer's state holds: a ring for the window, and the strided tokens of the whole sequence."""
        held = (self.window + -(-length // self.stride)) * unit.token_bytes
        flops = 4 * unit.head_dim * unit.query_heads * int(self.visible_keys(torch.arange(1, length + 1)).sum())
        keys = int(self.visible_keys(torch.tensor(length)))
        return Cost(held, held, keys, flops, unit.parameters, heads=unit.query_heads)

    def visible_keys(self, tokens: torch.Tensor) -> torch.Tensor:
        """Keys that the last query of so many tokens sees."""
        before = (tokens - self.window).clamp(min=0)
        return tokens - before + (before + self.stride - 1) // self.stride

    def words(self, native: int | None = None) -> str:
        """Window and stride."""
        return f"window {self.window}, and of the tokens before it one in {self.stride}"

    def short(self, native: int | None = None) -> str:
        """`window/stride`."""
        return f"{self.window}/{self.stride}"
