"""The mixer of `aaren` groups: attention of a fixed query, as a prefix scan with a state of constant size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .merge import join, log_mass
from .mixer import LayerFacts, Mixer, State, register
from .shard import Shard
from .step import Step

BLOCK = 64  # tokens whose weights are computed at once, and blocks whose states are
NEVER = -1.0e30  # maximum of no scores; finite, so that no NaN arises

# What a prefix of tokens comes to, in float32: the maximum of its scores `[...]`, the total of exp(score - maximum)
# `[...]`, and the values under these weights `[..., DV]`.
Prefix = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class AarenState(State):
    """For every query head the prefix of its tokens: `top` and `total` `[B, G, R]`, `sum` `[B, G, R, DV]`.

    Args:
        groups: head groups G.
        share: query heads R of one.
    """

    def __init__(self, groups: int, share: int, max_length: int | None) -> None:
        self.shape = (groups, share)
        super().__init__(max_length)

    def begin(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """The empty prefix."""
        super().begin(key, value)
        shape = (len(key), *self.shape)
        self.tensors["top"] = value.new_full(shape, NEVER, dtype=torch.float32)
        self.tensors["total"] = value.new_zeros(shape, dtype=torch.float32)
        self.tensors["sum"] = value.new_zeros(*shape, value.shape[-1], dtype=torch.float32)

    @property
    def prefix(self) -> Prefix:
        """What the tokens so far come to."""
        return self.tensors["top"], self.tensors["total"], self.tensors["sum"]

    def keep(self, prefix: Prefix) -> None:
        """Take over what the tokens come to now, in place, so that a CUDA graph can hold it."""
        for name, tensor in zip(("top", "total", "sum"), prefix, strict=True):
            self.tensors[name].copy_(tensor.detach())


@register("aaren")
class AarenMixer(Mixer):
    """Every query head has one query for all tokens (Aaren, arXiv 2405.13956), so that no key is needed twice:

        y_t = softmax(q . k_j / sqrt(D) for j <= t) . v

    Keys are as the model gives them, after RoPE where it has any; the layer's own queries are not read.

    Attributes:
        query: `[groups, query heads of one, D]`.
    """

    by_query = ("query",)
    one_place = None

    def __init__(self, groups: Sequence[Mapping[str, Any]], facts: LayerFacts) -> None:
        super().__init__(groups, facts)
        self.query = nn.Parameter(torch.empty(len(groups), facts.group_size, facts.head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero, which gives every token the same weight, but for the queries that the plan names.

        Raises:
            ValueError: the plan names queries of other numbers of heads or of other sizes.
        """
        nn.init.zeros_(self.query)
        for number, group in enumerate(self.groups):
            if group["query"] is not None:
                given = torch.tensor(group["query"], dtype=self.query.dtype, device=self.query.device)
                if given.shape != self.query.shape[1:]:
                    raise ValueError(
                        f"layer {self.facts.index}: expected `query` of {tuple(self.query.shape[1:])} numbers, one row "
                        f"for each query head that stays, got {tuple(given.shape)}"
                    )
                with torch.no_grad():
                    self.query[number] = given

    def state(self, max_length: int | None) -> AarenState:
        """Prefixes of no token."""
        return AarenState(len(self.groups), self.facts.group_size, max_length)

    def logits(self, key: torch.Tensor, scale: float | None) -> torch.Tensor:
        """Scores `[B, G, R, T]` of keys `[B, G, T, D]`, float32."""
        scale = self.facts.head_dim**-0.5 if scale is None else scale
        return (self.query.float() * scale) @ key.float().transpose(-1, -2)

    def prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        state: AarenState | None,
        step: Step,
        *,
        scale: float | None,
        dropout: float,
    ) -> torch.Tensor:
        """As `Mixer.prefill`; there are no weights to drop, so `dropout` is ignored."""
        assert step.gains is not None
        token = step.positions(key.device) >= 0  # [B, T]
        key, value = (tensor.masked_fill(~token[:, None, :, None], 0) for tensor in (key, value))
        scores = self.logits(key, scale).masked_fill(~token[:, None, None], NEVER)
        value = value.float()
        if step.shard is not None:
            out = torch.cat(self._on_shard(scores, value, token, step.shard), dim=3)
        else:
            out, prefix = scan_all(scores, value, token, _nothing(scores, value) if state is None else state.prefix)
            if state is not None:
                state.advance(step.gains)
                state.keep(prefix)
        out = out.masked_fill(~token[:, None, None, :, None], 0)
        return out.flatten(1, 2).transpose(1, 2).to(query.dtype)

    @staticmethod
    def _on_shard(scores: torch.Tensor, value: torch.Tensor, token: torch.Tensor, shard: Shard) -> list[torch.Tensor]:
        """Outputs of the segments of a sequence that are here, from what all segments before them come to."""
        parts = list(zip(shard.split(scores, 3), shard.split(value, 2), shard.split(token, 1), strict=True))
        made = []
        for own, values, _ in parts:
            top = own.detach().amax(-1, keepdim=True)
            weight = torch.exp(own - top)
            made.append(torch.cat([top, weight.sum(-1, keepdim=True), weight @ values], dim=-1))
        every = shard.everywhere(torch.stack(made)).movedim(0, 3)  # [B, G, R, segments, 2 + DV]
        tops, totals, sums = _prefixes(every[..., 0], every[..., 1], every[..., 2:])
        outs = []
        for number, part in zip(shard.numbers, parts, strict=True):
            last = number - 1
            before = (tops[..., last], totals[..., last], sums[..., last, :]) if number else _nothing(*part[:2])
            outs.append(scan_all(*part, before)[0])
        return outs

    def decode(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        state: AarenState,
        step: Step,
        *,
        scale: float | None,
    ) -> torch.Tensor:
        """As `Mixer.decode`."""
        if step.gains is not None:
            state.advance(step.gains)
        assert step.lengths is not None
        token = (step.on("lengths", key.device) > 0)[:, None, None]  # [B, 1, 1]
        score = self.logits(key, scale)[..., 0].masked_fill(~token, NEVER)  # [B, G, R]
        top, total, values = state.prefix
        best = torch.maximum(top, score)
        shrink, weight = torch.exp(top - best), torch.exp(score - best).masked_fill(~token, 0)
        new = value.float().masked_fill(~token[..., None], 0)  # [B, G, 1, DV]
        state.keep((best, total * shrink + weight, values * shrink[..., None] + weight[..., None] * new))
        _, total, values = state.prefix
        out = (values / total.clamp(min=torch.finfo(total.dtype).tiny)[..., None]).masked_fill(~token[..., None], 0)
        return out.flatten(1, 2)[:, None].to(query.dtype)


def scan_all(
    scores: torch.Tensor, value: torch.Tensor, token: torch.Tensor, prefix: Prefix
) -> tuple[torch.Tensor, Prefix]:
    """`scan`, some tokens at a time, since it compares all blocks of its tokens with one another."""
    outs = []
    for start in range(0, scores.shape[-1], BLOCK * BLOCK):
        part = slice(start, start + BLOCK * BLOCK)
        out, prefix = scan(scores[..., part], value[:, :, part], token[:, part], prefix)
        outs.append(out)
    return torch.cat(outs, dim=3), prefix


def scan(scores: torch.Tensor, value: torch.Tensor, token: torch.Tensor, before: Prefix) -> tuple[torch.Tensor, Prefix]:
    """Attention of one query over every prefix, and what all tokens come to together.

    Blocks of tokens by themselves, then the prefixes of blocks, then each token's block joined with what is before.

    Args:
        scores: `[B, G, R, T]`, float32.
        value: `[B, G, T, DV]`, float32.
        token: `[B, T]`, which columns are tokens.
        before: what is before the first column.

    Returns:
        Outputs `[B, G, R, T, DV]`, and the prefix of all.
    """
    count, rest = scores.shape[-1], -scores.shape[-1] % BLOCK
    pad = torch.nn.functional.pad
    scores = pad(scores, (0, rest), value=NEVER).unflatten(-1, (-1, BLOCK))  # [B, G, R, N, BLOCK]
    value = pad(value, (0, 0, 0, rest)).unflatten(2, (-1, BLOCK))[:, :, None]  # [B, G, 1, N, BLOCK, DV]
    token = pad(token, (0, rest)).unflatten(-1, (-1, BLOCK))[:, None, None]  # [B, 1, 1, N, BLOCK]
    top, total, values = _prefixes(scores, token.to(scores.dtype), value)
    tops = torch.cat([before[0][..., None], top[..., -1]], dim=-1)  # [B, G, R, N + 1]
    totals = torch.cat([before[1][..., None], total[..., -1]], dim=-1)
    sums = torch.cat([before[2][..., None, :], values[..., -1, :]], dim=-2)
    tops, totals, sums = _prefixes(tops, totals, sums)
    own, own_lse = _part(top, total, values)
    past, past_lse = _part(tops[..., :-1], totals[..., :-1], sums[..., :-1, :])
    out, _ = join(own, own_lse, past[..., None, :], past_lse[..., None])
    return out.flatten(3, 4)[:, :, :, :count], (tops[..., -1], totals[..., -1], sums[..., -1, :])


def _prefixes(top: torch.Tensor, total: torch.Tensor, values: torch.Tensor) -> Prefix:
    """Join prefixes that follow each other: entry n of the result is what entries 0 to n come to.

    Args:
        top, total: `[..., N]`; of single tokens their scores, and 1 (0 for what is no token).
        values: `[..., N, DV]`, multiplied by the totals of single tokens.
    """
    best = top.detach().cummax(-1).values
    order = torch.arange(top.shape[-1], device=top.device)
    later = order[None] > order[:, None]
    shrink = torch.exp((top[..., None, :] - best[..., :, None]).masked_fill(later, NEVER))  # [..., N, N]
    return best, (shrink * total[..., None, :]).sum(-1), shrink @ values


def _part(top: torch.Tensor, total: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefixes as mean and logarithm of the total, which `merge.join` takes."""
    return values / total.clamp(min=torch.finfo(total.dtype).tiny)[..., None], top + log_mass(total)


def _nothing(scores: torch.Tensor, value: torch.Tensor) -> Prefix:
    """The prefix of no token."""
    shape = scores.shape[:-1]
    return scores.new_full(shape, NEVER), scores.new_zeros(shape), scores.new_zeros(*shape, value.shape[-1])
