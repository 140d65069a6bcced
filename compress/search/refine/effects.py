"""What rules do together to a model's predictions: a quadratic model of the divergence, from sampled gradients.

The divergence KL(dense || planned) is smallest, and its gradient zero, at the dense model, so first-order scores say
nothing about it. To second order it is half the Fisher information of the change: with labels y drawn from the dense
model's own predictions in R rows, and s = d sum_rows -log p(y) / dO,

    KL, mean over the rows  =  1/2 E_y [ (1 / sqrt(R)  sum over groups  s . (O_rule - O_full))^2 ].

One backward pass gives s for all heads, and exact attention under a rule gives O_rule - O_full, so a pass over a
document yields one number for every group and rule, its effect. Effects of groups add up before the square: two
groups that hide the same thing are worse than twice one, and some that err in opposite ways are better.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from compress.models.backward import recomputed
from compress.models.replaced import AttentionCall, differentiable_inputs, replaced_attention, tapped
from compress.plan import ModelShape
from compress.runtime.impl import choose_impl
from compress.runtime.span import FULL, Span
from compress.search.refine.divergence import Divergence

NAME = "compress_effects"

Rules = Sequence[Sequence[Sequence[Span]]]


def sampled_effects(
    model: Any, shape: ModelShape, divergence: Divergence, rules: Rules, samples: int, seed: int
) -> torch.Tensor:
    """Effects `[samples, documents, layers, groups, rules]` float32 on the CPU, in square roots of 2 nats.

    Args:
        model: the dense model.
        divergence: its documents.
        rules: `[layers][rules][groups]`; 0 for layers that slide by themselves.
        samples: passes over every document, each with labels of its own.
        seed: of the labels.
    """
    count = len(divergence.documents)
    device = divergence.device
    effects = torch.zeros(samples, count, shape.layers, shape.kv_heads, len(rules[0]), device=device)
    current: list[torch.Tensor] = []

    def attention(call: AttentionCall) -> torch.Tensor:
        if call.window is not None:
            return call.dense()
        query, key, value, scaling, layer = call.query, call.key, call.value, call.scaling, call.layer
        scores = call.scores
        # The same code for all rules, so that a rule that hides nothing has no effect but rounding's.
        prefill = choose_impl("auto", query).prefill
        output = prefill(query, key, value, (FULL,) * shape.kv_heads, scale=scaling, scores=scores)
        rows = current[0]

        def add(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, slope: torch.Tensor) -> None:
            for number, spans in enumerate(rules[layer]):
                moved = prefill(q, k, v, tuple(spans), scale=scaling, scores=scores).sub_(o)
                heads = torch.einsum("bhtd,bhtd->bh", slope.float(), moved.float())
                rows[:, layer, :, number] = heads.view(heads.shape[0], shape.kv_heads, -1).sum(-1)

        return tapped(output, add, query, key, value, output)

    with replaced_attention(model, NAME, attention), differentiable_inputs(model), torch.enable_grad():
        for sample in range(samples):
            for members in divergence.batches(range(count)):
                current[:] = [effects.new_zeros(len(members), *effects.shape[2:])]
                positions = sum(divergence.documents[number].length for number in members)
                with recomputed(model, positions):
                    losses = [
                        label_loss(rows, f"{seed}/{sample}/{number}")
                        for number, rows in divergence.answer_logits(model, members)
                    ]
                    torch.stack(losses).sum().backward()
                effects[sample, members] = current[0]
    return effects.cpu()


def label_loss(logits: torch.Tensor, seed: str) -> torch.Tensor:
    """-log p of labels drawn from the rows' own predictions, their sum over the square root of the number of rows."""
    return functional.cross_entropy(logits.float(), drawn(logits, seed), reduction="sum") / len(logits) ** 0.5


@torch.no_grad()
def drawn(logits: torch.Tensor, seed: str) -> torch.Tensor:
    """One label of each row of logits `[rows, vocabulary]`, by its probability; `[rows]`.

    By the inverse of the distribution function, from numbers of the CPU, so that a seed means the same on all devices.
    """
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big"))
    points = torch.rand(len(logits), 1, generator=generator).to(logits.device)
    return (logits.float().softmax(-1).cumsum(-1) < points).sum(-1).clamp(max=logits.shape[-1] - 1)
