"""The MLPs of several models in one layer, of which every token uses all, or one or a few that a router chooses."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .mlps import PlannedMlp, register
from .routers import highest
from .step import Routing, Step

FEW = 32  # rows up to which a GPU runs all experts on all of them, which needs no answer from the device


def router_logits(hidden: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
    """The logits of a linear router over experts, in float32 at least whatever autocast says: `[..., experts]`.

    Args:
        hidden: `[..., hidden size]`, the input of the layer's attention or MLP.
        router: `[experts, hidden size]`.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        return functional.linear(hidden.to(dtype), router.to(dtype))


class MlpExperts(PlannedMlp):
    """Experts that are each a layer's own MLP, on the rows (tokens) that chose them.

    The router's p = softmax(W x) chooses the `top` highest, of equal ones those with lower numbers. What a chosen
    expert gives is multiplied by its weight:

        weight one: 1 with one expert, whose gradient is that of p (straight-through); p over the sum of the chosen with
            several. Weights sum to 1, so that equal experts are one of them, whatever the router says.
        weight p: p itself, as published (BAM, arXiv 2408.08274): equal experts are then p times one of them.

    Where `top` is all of them, every expert runs on every row and nothing is chosen: the output is sum_i p_i MLP_i(x),
    as attentions are mixed, with either weight.

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
        chooses: every token does, and `Record.mlp_routing` has the choices (as `Mixer.chooses`).
    """

    chooses = True

    def __init__(self, mlp: nn.Module, count: int, top: int, weight: str, hidden_size: int, layer: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList([mlp, *(copy.deepcopy(mlp) for _ in range(count - 1))])
        like = next(mlp.parameters())
        self.router = nn.Parameter(torch.empty(count, hidden_size, device=like.device, dtype=like.dtype))
        self.top, self.weight, self.layer = top, weight, layer
        self.compress_step: Step | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A router without a preference; MLPs are reset by themselves."""
        nn.init.zeros_(self.router)

    def own_parameters(self) -> list[nn.Parameter]:
        """The router."""
        return [self.router]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The weighted sum of what the chosen experts give for `[..., hidden size]`."""
        step, self.compress_step = self.compress_step, None
        rows = hidden.reshape(-1, hidden.shape[-1])
        logits, chosen, weights = self.routed(rows)
        if step is not None and step.record is not None:
            self._report(step, logits, chosen)
        if self.top == len(self.experts):
            return self.mixed(rows, weights).view(hidden.shape)
        waits = not rows.is_cuda or torch.is_grad_enabled() or (len(rows) > FEW and not _is_captured())
        out = self.gathered(rows, chosen, weights) if waits else self.everywhere(rows, chosen, weights)
        return out.view(hidden.shape)

    def _report(self, step: Step, logits: torch.Tensor, chosen: torch.Tensor) -> None:
        """Tell the record of the pass what its tokens chose; without padding nothing waits for the device."""
        assert step.record is not None
        parts = (logits, logits.softmax(-1), chosen)
        if step.is_whole:
            assert step.rows is not None
            tokens = step.rows.count
        else:
            by_sequence = step.real(logits.device)
            real, tokens = by_sequence.flatten(), tuple(by_sequence.sum(1).tolist())
            parts = (parts[0][real], parts[1][real], parts[2][real])
        units = ((),) * len(self.experts)
        mixed = self.top == len(self.experts)
        step.record.add_mlp_routing(self.layer, Routing(*parts, units, (), tokens, mixed))

    def routed(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits, which experts are chosen, and their weights in the dtype of the rows, `[rows, experts]` each."""
        logits = router_logits(rows, self.router)
        every = self.top == len(self.experts)
        chosen = torch.ones_like(logits, dtype=torch.bool) if every else highest(logits, self.top)
        return logits, chosen, self._weights(logits.softmax(-1), chosen).to(rows.dtype)

    def _weights(self, probs: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """What the outputs of experts are multiplied by, `[rows, experts]`; it matters where they are chosen."""
        if self.weight == "p" or self.top == len(self.experts):
            return probs
        if self.top == 1:
            return 1 + (probs - probs.detach())
        return probs / probs.masked_fill(~chosen, 0).sum(-1, keepdim=True)

    def mixed(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Every expert on all rows, each times its weight."""
        parts = [(expert(rows) * weights[:, number, None]).to(rows.dtype) for number, expert in enumerate(self.experts)]
        return sum(parts[1:], parts[0])

    def everywhere(self, rows: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Every expert on all rows, of which only those that chose it count."""
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            given = (expert(rows) * weights[:, number, None]).to(out.dtype)
            out = torch.where(chosen[:, number, None], out + given, out)
        return out

    @torch.compiler.disable  # how many rows an expert has is not known before
    def gathered(self, rows: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Every expert on its rows alone; one that has none takes part with none, so that it has gradients."""
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            places = chosen[:, number].nonzero()[:, 0]
            own = weights[:, number].index_select(0, places)  # whose gradient is added by place, without sorting
            given = expert(rows.index_select(0, places)) * own[:, None]
            out = out.index_add(0, places, given.to(out.dtype))
        return out


def _is_captured() -> bool:
    """Whether a CUDA graph is being captured, in which no host waits for the device."""
    return torch.cuda.is_current_stream_capturing()


@register("experts")
def install(layer: Any, attention: Any, mlp: dict[str, Any], hidden_size: int, number: int) -> None:
    """As `install_mlp`: the experts that a layer's plan asks for, `mlp: {experts, top, weight}`.

    They learn from the layer's attention, which runs before, which step they are in, since layers hand their MLP hidden
    states alone.
    """
    layer.mlp = MlpExperts(layer.mlp, mlp["experts"], mlp["top"], mlp["weight"], hidden_size, number)
    attention.register_forward_pre_hook(partial(_leave_step, layer.mlp), with_kwargs=True)


def _leave_step(mlp: MlpExperts, attention: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Before attention: the layer's MLP, which runs afterwards, finds the step."""
    mlp.compress_step = kwargs.get("compress_step")
