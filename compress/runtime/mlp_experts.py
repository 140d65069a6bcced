"""The MLPs of several models in one layer, of which a router chooses one or a few for every token."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import nn

from .mixer_expert import softmax_gates
from .step import Step

FEW = 32  # rows up to which a GPU runs all experts on all of them, which needs no answer from the device


class MlpExperts(nn.Module):
    """Experts that are each a layer's own MLP, on the rows (tokens) that chose them.

    The router's p = softmax(W x) chooses the `top` highest, of equal ones those with lower numbers. What a chosen expert
    gives is multiplied by its weight:

        weight one: 1 with one expert, whose gradient is that of p (straight-through); p over the sum of the chosen with
            several. Weights sum to 1, so that equal experts are one of them, whatever the router says.
        weight p: p itself, as published (BAM, arXiv 2408.08274): equal experts are then p times one of them.

    With one expert a prefill does the work of one MLP and of the router: the rows of every expert are gathered, run
    through it together, and put back. The host waits there for how many they are. A GPU without gradients runs all
    experts on few rows instead, as in decoding: each then reads its weights once, and nothing waits.

    Args:
        mlp: the layer's own; it becomes the first expert.
        count: experts.
        top: of them that a token uses.
        weight: `one` or `p`.
        hidden_size: of the input.
        layer: number of the layer.

    Attributes:
        experts: the MLPs.
        router: `[experts, hidden size]`; it starts at 0.
    """

    def __init__(self, mlp: nn.Module, count: int, top: int, weight: str, hidden_size: int, layer: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList([mlp, *(copy.deepcopy(mlp) for _ in range(count - 1))])
        like = next(mlp.parameters())
        self.router = nn.Parameter(torch.zeros(count, hidden_size, device=like.device, dtype=like.dtype))
        self.top, self.weight, self.layer = top, weight, layer
        self.compress_step: Step | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The weighted sum of what the chosen experts give for `[..., hidden size]`."""
        step, self.compress_step = self.compress_step, None
        rows = hidden.reshape(-1, hidden.shape[-1])
        probs = softmax_gates(rows, self.router)
        chosen = highest(probs, self.top)
        if step is not None and step.record is not None:
            real = step.real(hidden.device).flatten()
            step.record.mlp_probs[self.layer] = (probs[real], chosen[real])
        weights = self._weights(probs, chosen).to(rows.dtype)
        if rows.is_cuda and not torch.is_grad_enabled() and (len(rows) <= FEW or _is_captured()):
            out = torch.stack([expert(rows) for expert in self.experts], -1)
            return torch.where(chosen[:, None], out * weights[:, None], 0).sum(-1).view(hidden.shape)
        return self._gathered(rows, chosen, weights).view(hidden.shape)

    def _weights(self, probs: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """What the outputs of experts are multiplied by, `[rows, experts]`; it matters where they are chosen."""
        if self.weight == "p":
            return probs
        if self.top == 1:
            return 1 + (probs - probs.detach())
        return probs / probs.masked_fill(~chosen, 0).sum(-1, keepdim=True)

    @torch.compiler.disable  # how many rows an expert has is not known before
    def _gathered(self, rows: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Every expert on its rows alone; one that has none takes part with none, so that it has gradients."""
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            places = chosen[:, number].nonzero()[:, 0]
            given = expert(rows[places]) * weights[places, number, None]
            out = out.index_add(0, places, given.to(out.dtype))
        return out


def highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)


def _is_captured() -> bool:
    """Whether a CUDA graph is being captured, in which no host waits for the device."""
    return torch.cuda.is_current_stream_capturing()


def install_experts(layer: Any, attention: Any, plan: dict[str, Any], hidden_size: int, number: int) -> None:
    """Give a decoder layer the MLP experts that its plan asks for (`mlp: {experts, top, weight}`), if any.

    They learn from the layer's attention, which runs before, which step they are in, since layers hand their MLP hidden
    states alone.
    """
    mlp = plan.get("mlp") or {}
    if "experts" not in mlp:
        return
    layer.mlp = MlpExperts(layer.mlp, mlp["experts"], mlp["top"], mlp["weight"], hidden_size, number)
    attention.register_forward_pre_hook(partial(_leave_step, layer.mlp), with_kwargs=True)


def _leave_step(mlp: MlpExperts, attention: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Before attention: the layer's MLP, which runs afterwards, finds the step."""
    mlp.compress_step = kwargs.get("compress_step")
