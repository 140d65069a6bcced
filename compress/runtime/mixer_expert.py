"""The mixer of `expert` groups: the attentions of several models side by side, mixed by soft gates (BAM)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .mixer import LayerFacts, register, take
from .mixer_span import SpanMixer
from .mlp_experts import router_logits
from .pages import PagedState
from .span import AnySpan, own_span
from .step import Step


@register("expert")
class ExpertMixer(SpanMixer):
    """Every query head belongs to an expert, and its output is multiplied by that expert's gate.

    The gates of a token are a softmax over the experts (BAM, arXiv 2408.08274: y = sum_j g_j Attention_j(x), with
    g = softmax(W x)), so they depend on the token alone and all experts always run. They sum to 1: where all experts
    are equal, the layer is one of them, whatever the router says.

    Attributes:
        router: `[experts, hidden size]`; it starts at 0, which gives every expert the same gate.
        head_expert: of every query head of this mixer, in order, the number of its expert.
    """

    needs_inputs = True

    def __init__(self, groups: Sequence[Mapping[str, Any]], facts: LayerFacts) -> None:
        super().__init__(groups, facts)
        count, size = int(groups[0]["experts"]), facts.group_size
        if groups[0]["expert"] is None and size % count:
            raise ValueError(f"layer {facts.index}: {size} query heads of a group do not divide among {count} experts")
        self.head_expert = tuple(
            head * count // size if group["expert"] is None else int(group["expert"])
            for group in groups
            for head in range(size)
        )
        self.router = nn.Parameter(torch.empty(count, facts.hidden_size))
        self.reset_parameters()

    @classmethod
    def form(cls, group: Mapping[str, Any]) -> str:
        """The number of experts, and whether they share keys and values."""
        return f"{group['experts']}{'_shared' if group['expert'] is None else ''}"

    def span(self, group: Mapping[str, Any]) -> AnySpan:
        """All keys, or those of the layer's own window."""
        return own_span(self.facts.native_window)

    def reset_parameters(self) -> None:
        """Equal gates."""
        nn.init.zeros_(self.router)

    def gates(self, step: Step, device: torch.device) -> torch.Tensor:
        """The gate of every query head, `[B, T, H]` in float32; 0 where a column is no token."""
        assert step.hidden is not None
        hidden, real = step.hidden, None
        if not step.is_whole:  # what is no token may hold NaN, and its gradients are not to
            real = step.positions(device) >= 0
            hidden = hidden.masked_fill(~real[..., None], 0)
        gates = router_logits(hidden, self.router).softmax(-1)
        if real is not None:
            gates = gates.masked_fill(~real[..., None], 0)
        if step.record is not None:  # without padding nothing waits for the device
            step.record.add_expert_gates(self.facts.index, gates.flatten(0, 1) if real is None else gates[real])
        return take(gates, self.head_expert, 2)

    def prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        state: PagedState | None,
        step: Step,
        *,
        scale: float | None,
        dropout: float,
    ) -> torch.Tensor:
        """As `Mixer.prefill`."""
        out = super().prefill(query, key, value, state, step, scale=scale, dropout=dropout)
        return out * self.gates(step, out.device)[..., None].to(out.dtype)

    def decode(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        state: PagedState,
        step: Step,
        *,
        scale: float | None,
    ) -> torch.Tensor:
        """As `Mixer.decode`."""
        out = super().decode(query, key, value, state, step, scale=scale)
        return out * self.gates(step, out.device)[..., None].to(out.dtype)
