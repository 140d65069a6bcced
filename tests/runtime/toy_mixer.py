"""A mixer with everything that one may have, in a file outside of the toolkit; `test_mixers.py` runs and exports it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from compress.runtime.mixer import LayerFacts, register
from compress.runtime.mixer_masked import MaskedMixer
from compress.runtime.pages import PagedState
from compress.runtime.step import Step


class ToyState(PagedState):
    """Pages, and beside them the sum of all gates of a sequence, `[B, groups]` float32."""

    def begin(self, key: torch.Tensor, value: torch.Tensor) -> None:
        super().begin(key, value)
        self.tensors["sum"] = value.new_zeros(key.shape[0], len(self.rules), dtype=torch.float32)


@register("toy")
class ToyMixer(MaskedMixer):
    """Every third key beside a window.

    Outputs are multiplied by a gate of the layer's input and the position, and by the mean gate of all tokens so far.
    """

    needs_inputs = True

    def __init__(self, groups: Sequence[Mapping[str, Any]], facts: LayerFacts) -> None:
        super().__init__(groups, facts)
        self.gate = nn.Parameter(torch.empty(len(groups), facts.hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.gate, std=0.5)

    def visible(self, t: torch.Tensor, j: torch.Tensor, group: Mapping[str, Any]) -> torch.Tensor:
        return (t - j < group["window"]) | (j % 3 == 0)

    def state(self, max_length: int | None) -> ToyState:
        return ToyState(self.rules, max_length)

    def prefill(self, query: Any, key: Any, value: Any, state: Any, step: Step, **options: Any) -> torch.Tensor:
        out = super().prefill(query, key, value, state, step, **options)
        return self.gated(out, state, step)

    def decode(self, query: Any, key: Any, value: Any, state: Any, step: Step, **options: Any) -> torch.Tensor:
        out = super().decode(query, key, value, state, step, **options)
        return self.gated(out, state, step)

    def gated(self, out: torch.Tensor, state: ToyState | None, step: Step) -> torch.Tensor:
        """Multiply outputs `[B, T, H, D]`, and add the gates to the state."""
        assert step.hidden is not None and step.rotary is not None
        positions = step.positions(out.device)
        gate = (step.hidden @ self.gate.T).sigmoid() + 0.1 * step.rotary[0][..., -1:]  # [B, T, groups]
        gate = torch.where((positions >= 0)[..., None], gate, 0)
        sums = gate.float().cumsum(1)
        if state is not None:
            sums = sums + state.tensors["sum"][:, None]
            state.tensors["sum"].copy_(sums[:, -1].detach())
        mean = sums / (positions.clamp(min=0) + 1)[..., None]
        if step.record is not None:
            step.record.add_loss("spread", gate.var())
            step.record.add_gate(self.facts.index, gate)
        return out * (gate * mean).repeat_interleave(self.facts.group_size, dim=-1)[..., None].to(out.dtype)
