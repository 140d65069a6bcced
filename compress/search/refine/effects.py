"""What options do together to a model's predictions: a quadratic model of the divergence, from sampled gradients.

The divergence KL(dense || planned) is smallest, and its gradient zero, at the dense model, so first-order scores say
nothing about it. To second order it is half the Fisher information of the change: with labels y drawn from the dense
model's own predictions in R rows, and s = d sum_rows -log p(y) / dO,

    KL, mean over the rows  =  1/2 E_y [ (1 / sqrt(R)  sum over units  s . (O_option - O_dense))^2 ].

One backward pass gives s for all heads and neurons. Exact attention under a target gives O_option - O_dense of a head
group, -O_dense where the group is removed; a removed neuron's output is zero, too. So a pass over a document yields one
number for every unit and option, its effect. Effects of units add up before the square: two groups that hide the same
thing are worse than twice one, and some that err in opposite ways are better.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch.nn import functional

from compress.models.backward import recomputed
from compress.models.families import layers_of
from compress.models.outputs import Alternatives, facts_of, reads_inputs
from compress.models.prepared import prepared_for
from compress.models.pruning import output_projections
from compress.models.replaced import AttentionCall, differentiable_inputs, replaced_attention, tapped
from compress.plan import ModelShape
from compress.search.refine.divergence import Divergence
from compress.targets.target import Target

NAME = "compress_effects"

Rules = Sequence[Sequence[Sequence[Target]]]


def sampled_effects(
    model: Any,
    shape: ModelShape,
    divergence: Divergence,
    rules: Rules,
    masks: Mapping[int, torch.Tensor],
    samples: int,
    seed: int,
    first: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Effects of what head groups can become, and of what may be removed of MLPs, in square roots of 2 nats.

    Args:
        model: the dense model.
        divergence: its documents.
        rules: targets `[layers][rules][groups]`; the effect is 0 in layers that slide by themselves.
        masks: by layer, which neurons each option removes, `[options, neurons]`.
        samples: passes over every document, each with labels of its own.
        seed: of the labels.
        first: number of the first pass, where others were made before.

    Returns:
        `[samples, documents, layers, groups, rules]` and `[samples, documents, layers, options]`, float32 on the CPU.
    """
    count, device = len(divergence.documents), divergence.device
    options = max((len(mask) for mask in masks.values()), default=0)
    effects = torch.zeros(samples, count, shape.layers, shape.kv_heads, len(rules[0]), device=device)
    of_neurons = torch.zeros(samples, count, shape.layers, options, device=device)
    current: list[torch.Tensor] = []
    alternatives: dict[int, Alternatives] = {}
    inputs = reads_inputs({target for row in rules for targets in row for target in targets})

    def attention(call: AttentionCall) -> torch.Tensor:
        if call.window is not None:
            return call.dense()
        query, key, value, scaling, layer = call.query, call.key, call.value, call.scaling, call.layer
        scores = call.scores  # not `call`: what recomputed layers give up may not be kept until the backward pass
        read = () if call.hidden is None else (call.hidden, *(call.rotary or ()))
        if layer not in alternatives:
            facts = facts_of(layer, query, key, None, call.hidden)
            alternatives[layer] = Alternatives(facts, rules[layer], prepared_for(model))
        others, rows = alternatives[layer], current[0]
        output = others.full(query, key, value, scaling, scores)

        def add(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, *more: torch.Tensor) -> None:
            *given, slope = more
            hidden = given[0] if given else None
            rotary = (given[1], given[2]) if len(given) == 3 else None
            changes = others.changes(q, k, v, scaling, dense=o, scores=scores, inputs=(hidden, rotary))
            for number, moved in enumerate(changes):
                heads = torch.einsum("bhtd,bhtd->bh", slope.float(), moved.float())
                rows[:, layer, :, number] = heads.view(heads.shape[0], shape.kv_heads, -1).sum(-1)

        return tapped(output, add, query, key, value, output, *read)

    def tap_neurons(layer: int, mask: torch.Tensor) -> Any:
        _, down = output_projections(layers_of(model)[layer], model.config)
        removed = mask.to(down.weight.device, torch.float32)

        def before(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            rows = current[1]

            def add(hidden: torch.Tensor, slope: torch.Tensor) -> None:
                neurons = torch.einsum("btn,btn->bn", slope.float(), hidden.float())
                rows[:, layer, : len(removed)] = -(neurons @ removed.T)

            return (tapped(inputs[0], add, inputs[0]), *inputs[1:])

        return down.register_forward_pre_hook(before)

    with (
        replaced_attention(model, NAME, attention, inputs=inputs),
        differentiable_inputs(model),
        torch.enable_grad(),
        ExitStack() as hooks,
    ):
        for layer, mask in masks.items():
            hooks.callback(tap_neurons(layer, mask).remove)
        for sample in range(samples):
            for members in divergence.batches(range(count)):
                positions = sum(divergence.documents[number].length for number in members)
                shapes = effects.shape[2:], of_neurons.shape[2:]
                current[:] = [effects.new_zeros(len(members), *sizes) for sizes in shapes]
                with recomputed(model, positions):
                    losses = [
                        label_loss(rows, f"{seed}/{first + sample}/{number}")
                        for number, rows in divergence.answer_logits(model, members)
                    ]
                    torch.stack(losses).sum().backward()
                effects[sample, members], of_neurons[sample, members] = current
    return effects.cpu(), of_neurons.cpu()


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
