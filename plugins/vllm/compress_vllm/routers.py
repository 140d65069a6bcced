"""Routers that vLLM's backend for transformers' code would replace: that of Phi-3.5-MoE is a linear layer that returns
more than its product, and vLLM puts a linear layer of its own in the place of every one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional


@contextmanager
def routers_kept() -> Iterator[None]:
    """Inside, the router of Phi-3.5-MoE is made as a module that is no linear layer."""
    from transformers.models.phimoe import modeling_phimoe

    module: Any = modeling_phimoe
    stock = module.PhimoeTopKRouter
    module.PhimoeTopKRouter = _Router
    try:
        yield
    finally:
        module.PhimoeTopKRouter = stock


class _Router(nn.Module):
    """What `PhimoeTopKRouter` computes outside of training."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size))
        self.noise, self.count = config.router_jitter_noise, config.num_experts_per_tok

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits `[tokens, experts]`, and weights and numbers of the chosen ones, `[tokens, chosen]`."""
        from transformers.models.phimoe.modeling_phimoe import sparsemixer

        logits = functional.linear(hidden_states, self.weight)
        weights, chosen = sparsemixer(logits, jitter_eps=self.noise, training=False, top_k=self.count)
        return logits, weights, chosen
