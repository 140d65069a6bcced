"""The slow definition of everything a profile measures: float64, autograd, N x N matrices, explicit masks."""

from __future__ import annotations

from collections.abc import Sequence
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


def model_layers(
    model: Any, shape: ModelShape, document: TextSample, places: Sequence[int] | None = None
) -> tuple[list[NaiveLayer], float]:
    """All layers of a document by autograd on the materialised attention of a float64 model; and the loss.

    Args:
        places: of the tokens that the loss is taken on; None takes the answer's.
    """
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
    predicted = torch.tensor(places if places is not None else range(*document.answer))
    logits = model(input_ids=tokens, use_cache=False).logits[0, predicted - 1]
    loss = torch.nn.functional.cross_entropy(logits, tokens[0, predicted])
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


def window_effects(layer: NaiveLayer, groups: int, span: Span) -> torch.Tensor:
    """(A_window - A) . dLoss/dA of every row and query head, `[groups, query heads of a group, T]`, by one mask."""
    positions = torch.arange(layer.attention.shape[1])
    kept = torch.where(span.visible(positions[:, None], positions), layer.attention, 0.0)
    moved = kept / kept.sum(-1, keepdim=True) - layer.attention
    return (moved * layer.gradient).sum(-1).view(groups, -1, len(positions))


def repeated(tokens: Sequence[int], others: Sequence[Sequence[int]], most: int) -> list[int]:
    """Positions that end a pair seen before, at most `most` times with all others, by comparing every two places."""
    elsewhere = [tuple(text[i : i + 2]) for text in others for i in range(len(text) - 1)]
    found = []
    for place in range(1, len(tokens)):
        pair = tuple(tokens[place - 1 : place + 1])
        before = sum(tuple(tokens[i - 1 : i + 1]) == pair for i in range(1, place))
        if before and before + elsewhere.count(pair) <= most:
            found.append(place)
    return found


def lse_spread(query: torch.Tensor, key: torch.Tensor, scaling: float, window: int | None = None) -> torch.Tensor:
    """`[G]`: root mean square over query heads of the deviation over rows of log-sum-exp - log n."""
    heads, length, _ = query.shape
    logits = query @ key.repeat_interleave(heads // len(key), 0).transpose(1, 2) * scaling
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & (distance < (window or length))
    level = logits.masked_fill(~seen, -torch.inf).exp().sum(-1).log() - seen.sum(-1).log()
    return level.var(-1, unbiased=False).view(len(key), -1).mean(-1).sqrt()


def state_rank(
    attention: torch.Tensor, value: torch.Tensor, output: torch.Tensor, eps: float, window: int, shares: Sequence[float]
) -> torch.Tensor:
    """`[G]`: the largest rank over splits, from singular values of whole blocks.

    Args:
        attention: `[H, T, T]`.
        value: `[G, T, D]`.
        output: `[hidden, H * D]`, weight of the output projection.
    """
    heads, length, _ = attention.shape
    ranks = torch.zeros(len(value), dtype=torch.int64)
    share = heads // len(value)
    for group, values in enumerate(value):
        members = range(group * share, (group + 1) * share)
        moved = [values @ output[:, head * value.shape[2] : (head + 1) * value.shape[2]].T for head in members]
        size = torch.cat(moved, -1).norm(dim=-1)
        for split in (int(part * length) for part in shares):
            block = torch.cat([attention[head, split + window :, :split] for head in members]) * size[:split]
            energy = torch.linalg.svdvals(block).square()
            kept = next((r for r in range(len(energy)) if energy[r:].sum() <= eps * energy.sum()), len(energy))
            ranks[group] = max(int(ranks[group]), kept if len(block) else 0)
    return ranks
