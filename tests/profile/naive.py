"""The slow definition of everything a profile measures: float64, autograd, N x N matrices, explicit masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from compress.data.sample import TextSample
from compress.plan import ModelShape
from compress.runtime.span import Span
from compress.targets.window import SpanGrid


@dataclass
class NaiveLayer:
    """`[H, T, T]` float64 attention probabilities, their gradient, and the joint effect needs nothing else."""

    attention: torch.Tensor
    gradient: torch.Tensor


def naive_attention(query: torch.Tensor, key: torch.Tensor, scaling: float, window: int | None = None) -> torch.Tensor:
    """`[H, T, T]` causal softmax of `[H, T, D]` queries and `[G, T, D]` keys, in the dtype of the query."""
    length = query.shape[1]
    logits = query @ key.repeat_interleave(query.shape[0] // key.shape[0], 0).transpose(1, 2) * scaling
    distance = torch.arange(length)[:, None] - torch.arange(length)
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    return logits.masked_fill(hidden, -torch.inf).softmax(-1)


def model_layers(model: Any, shape: ModelShape, document: TextSample) -> tuple[list[NaiveLayer], float]:
    """All layers of a document by autograd on the materialised attention of a float64 model; and the loss."""
    probabilities: dict[int, torch.Tensor] = {}

    def attend(module, query, key, value, attention_mask, scaling=None, **_):
        weights = naive_attention(query[0], key[0], scaling, shape.native_windows[module.layer_idx])
        weights.retain_grad()
        probabilities[module.layer_idx] = weights
        values = value[0].repeat_interleave(query.shape[1] // value.shape[1], 0)
        return (weights @ values)[None].transpose(1, 2), None

    AttentionInterface.register("tests_naive", attend)
    AttentionMaskInterface.register("tests_naive", lambda *_, **__: None)
    before = model.config._attn_implementation
    model.set_attn_implementation("tests_naive")
    tokens = torch.tensor([document.tokens])
    start, end = document.answer
    logits = model(input_ids=tokens, use_cache=False).logits[0, start - 1 : end - 1]
    loss = torch.nn.functional.cross_entropy(logits, tokens[0, start:end])
    loss.backward()
    model.zero_grad()
    model.set_attn_implementation(before)
    layers = []
    for index in range(shape.layers):
        weights = probabilities[index]
        assert weights.grad is not None
        layers.append(NaiveLayer(weights.detach(), weights.grad))
    return layers, float(loss.detach())


def tables(layer: NaiveLayer, groups: int, grid: SpanGrid, length: int) -> dict[str, torch.Tensor]:
    """Influence tables `[groups, sinks, betas, alphas]` by one explicit mask per rule."""
    attention, gradient = layer.attention, layer.gradient
    heads, size, _ = attention.shape
    delta = (attention * gradient).sum(-1, keepdim=True)
    influence = -attention / (1 - attention) * (gradient - delta)
    alphas = grid.alphas(length)
    shape = (groups, len(grid.sinks), len(grid.betas), len(alphas))
    result = {kind: torch.zeros(shape, dtype=torch.float64) for kind in ("absolute", "signed", "joint")}
    positions = torch.arange(size)
    causal = positions[:, None] >= positions
    for s, sink in enumerate(grid.sinks):
        for b, beta in enumerate(grid.betas):
            for a, alpha in enumerate(alphas):
                visible = Span(sink, alpha, beta).visible(positions[:, None], positions)
                masked = causal & ~visible
                lost = torch.where(masked, influence, 0.0)
                kept = torch.where(visible, attention, 0.0)
                renormalised = kept / kept.sum(-1, keepdim=True)
                effect = ((renormalised - attention) * gradient).sum(-1).abs()
                for kind, values in (
                    ("absolute", lost.abs().sum((1, 2))),
                    ("signed", lost.sum((1, 2))),
                    ("joint", effect.sum(1)),
                ):
                    result[kind][:, s, b, a] = values.view(groups, heads // groups).sum(1)
    return result
