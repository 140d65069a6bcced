"""An example of a mixer that has to be trained: a window with learned sharpness and a learned shift of its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from compress.runtime.mixer import LayerFacts, register
from compress.runtime.mixer_masked import MaskedMixer
from compress.runtime.span import AnySpan, Span


@register("scaled")
class ScaledMixer(MaskedMixer):
    """Attention in a window with scores times `sharpness` `[groups]`; `shift` `[groups, D]` is added to the outputs."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], facts: LayerFacts) -> None:
        super().__init__(groups, facts)
        self.sharpness = nn.Parameter(torch.empty(len(groups)))
        self.shift = nn.Parameter(torch.empty(len(groups), facts.head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.sharpness)
        nn.init.zeros_(self.shift)

    def visible(self, t: torch.Tensor, j: torch.Tensor, group: Mapping[str, Any]) -> torch.Tensor:
        return t - j < group["window"]

    def span(self, group: Mapping[str, Any]) -> AnySpan:
        return Span(0, group["window"], 0.0)

    def attend(self, query: torch.Tensor, *rest: Any) -> torch.Tensor:
        heads = self.facts.group_size
        sharp = query * self.sharpness.repeat_interleave(heads)[:, None, None].to(query.dtype)
        return super().attend(sharp, *rest) + self.shift.repeat_interleave(heads, 0).to(query.dtype)
