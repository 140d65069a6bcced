"""Columns that are no token may hold anything: outputs and gradients are those of the tokens alone, for every mixer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.runtime.attention import plan_attention
from compress.runtime.mixer import Kinds, LayerFacts
from compress.runtime.retain_training import Decisions
from compress.runtime.step import Record, Step
from compress.targets.aaren import AarenGroup
from compress.targets.expert import ExpertGroup
from compress.targets.linear import LinearGroup
from compress.targets.retain import RetainGroup
from compress.targets.routed import RoutedGroup
from compress.targets.score import ScoreGroup
from compress.targets.target import Target, load_runtime
from compress.targets.window import WindowGroup
from tests.examples.strided import StridedGroup

BATCH, GROUPS, SHARE, TOKENS, DIM, HIDDEN = 2, 2, 2, 150, 8, 10
LAYERS: dict[str, list[Target]] = {
    "window": [WindowGroup(sink=4, alpha=30, beta=0.25)] * GROUPS,
    "aaren": [AarenGroup()] * GROUPS,
    "expert": [ExpertGroup(experts=2, expert=0), ExpertGroup(experts=2, expert=1)],
    "linear": [LinearGroup(alpha=1)] * GROUPS,
    "linear, alone, decay of tokens": [LinearGroup(map="cosine", alone=True, decay="token")] * GROUPS,
    "linear, added": [LinearGroup(map="silu", out="added", decay="fixed", slope=0.1)] * GROUPS,
    "delta": [LinearGroup(rule="delta", decay="token", alpha=1)] * GROUPS,
    "retain": [RetainGroup(sink=0, alpha=20, scorer="mlp", threshold=-3.0, share=0.5, cap=(10, 0.125))] * GROUPS,
    "routed": list(RoutedGroup.layer(GROUPS, 1)),
    "routed by norms": list(RoutedGroup.layer(GROUPS, 1, router="norm")),
    "score": [ScoreGroup(score="lssar", power=3)] * GROUPS,
    "strided": [StridedGroup(window=20, stride=4)] * GROUPS,
}


def run(kinds: Kinds, tensors: list[torch.Tensor], valid: torch.Tensor, slope: torch.Tensor) -> Any:
    """Outputs `[B, T, H, D]`, and the gradients of inputs and parameters of what is reported and of outputs."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    batch, columns = valid.shape
    step = Step.begin(None, None if valid.all() else valid, batch, columns, valid.device)
    step.hidden, step.record = leaves[3], Record()
    module = SimpleNamespace(layer_idx=0, compress_kinds=kinds)
    out, _ = plan_attention(module, leaves[0], leaves[1], leaves[2], None, compress_step=step)
    loss = (out * slope).sum()
    for routing in step.record.routing.values():
        loss = loss + routing.probs.square().sum()
    for gates in step.record.expert_gates.values():
        loss = loss + gates.square().sum()
    for keeping in step.record.keeping[0] if step.record.keeping else ():
        loss = loss + (keeping.kept * keeping.gone).sum()
    weights = [weight for mixer in kinds.mixers for weight in mixer.parameters()]
    found = torch.autograd.grad(loss, [*leaves, *weights], allow_unused=True, materialize_grads=True)
    return out.detach(), found[:4], found[4:]


@pytest.mark.parametrize("name", LAYERS)
def test_padding_that_is_no_number_reaches_no_output_and_no_gradient(name: str) -> None:
    groups = [target.model_dump(mode="json") for target in LAYERS[name]]
    load_runtime({"layers": [{"groups": groups}]})
    kinds = Kinds(groups, LayerFacts(0, DIM, HIDDEN, SHARE, None))
    mixers: tuple[Any, ...] = kinds.mixers
    for mixer in mixers:
        if mixer.keeps:
            mixer.decisions = Decisions(0.5, noise=False)
        for weight in mixer.double().parameters():
            torch.nn.init.normal_(weight, weight.detach().mean().item(), 0.3)
    sizes = [(GROUPS * SHARE, TOKENS, DIM), (GROUPS, TOKENS, DIM), (GROUPS, TOKENS, DIM), (TOKENS, HIDDEN)]
    tensors = [torch.randn(BATCH, *size, dtype=torch.float64) for size in sizes]
    slope = torch.randn(BATCH, TOKENS, GROUPS * SHARE, DIM, dtype=torch.float64)
    valid = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    valid[0, :30], valid[1, ::3] = False, False
    absent = ~valid[..., None]
    poisoned = [x.masked_fill(absent[:, None] if x.dim() == 4 else absent, torch.nan) for x in tensors]
    out, inputs, weights = run(kinds, poisoned, valid, slope)
    assert not out[~valid].any() and all(bool(grad.isfinite().all()) for grad in inputs)
    total = [torch.zeros_like(grad) for grad in weights]
    for row in range(BATCH):
        alone, here = [x[row : row + 1, ..., valid[row], :] for x in tensors], slice(row, row + 1)
        whole = torch.ones(1, int(valid[row].sum()), dtype=torch.bool)
        exact, by_input, by_weight = run(kinds, alone, whole, slope[here, valid[row]])
        torch.testing.assert_close(out[here, valid[row]], exact, rtol=1e-5, atol=1e-5)
        for found, expected in zip(inputs, by_input, strict=True):
            torch.testing.assert_close(found[here, ..., valid[row], :], expected, rtol=1e-5, atol=1e-5)
        total = [summed + grad for summed, grad in zip(total, by_weight, strict=True)]
    for found, expected in zip(weights, total, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
