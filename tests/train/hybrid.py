"""Hybrid heads on random numbers, beside the softmax that they stand for: what objectives of parts are given."""

from __future__ import annotations

from typing import Any

import torch

from compress.runtime.mixer_linear import Features, Parts
from compress.runtime.span import Span

BATCH, HEADS, GROUPS, LENGTH, SIZE, FEATURES = 6, 4, 2, 5, 8, 6
SPANS = (Span(1, 2, 0.0), Span(0, 1, 0.0))


class Hybrid:
    """One layer, with all weights written out.

    Attributes:
        scores: `[B, H, T, T]`, -inf above the diagonal.
        hidden: `[H, T, T]`, which keys the heads do not see.
        log_decay: `[B, G, T]`, of the state with every token; None without decay.
    """

    def __init__(
        self, seed: int = 0, dtype: torch.dtype = torch.float32, *, exact: bool = False, decays: bool = False
    ) -> None:
        draw = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

        share = HEADS // GROUPS
        self.query, self.key = random(BATCH, HEADS, LENGTH, SIZE), random(BATCH, GROUPS, LENGTH, SIZE)
        self.value = random(BATCH, GROUPS, LENGTH, SIZE)
        self.query_features = random(BATCH, HEADS, LENGTH, FEATURES).exp().requires_grad_()
        self.key_features = random(BATCH, GROUPS, LENGTH, FEATURES).exp().requires_grad_()
        self.gain = random(1, HEADS, 1).requires_grad_()
        t = torch.arange(LENGTH)
        causal = t <= t[:, None]
        visible = torch.stack([span.visible(t[:, None], t) for span in SPANS]).repeat_interleave(share, 0)
        self.hidden = causal & ~visible
        keys, self.values = (x.repeat_interleave(share, 1) for x in (self.key, self.value))
        self.scores = (SIZE**-0.5 * self.query @ keys.mT).masked_fill(~causal, float("-inf"))
        features = self.key_features.repeat_interleave(share, 1)
        own = self.query_features @ features.mT
        self.log_decay = -random(BATCH, GROUPS, LENGTH).abs() if decays else None
        if self.log_decay is not None:
            own = own * self._left(self.log_decay).repeat_interleave(share, 1).exp()
        self.own = torch.where(self.hidden, self.scores.exp() if exact else own, 0)
        self.log_gain = torch.zeros_like(self.gain) if exact else self.gain

    @staticmethod
    def _left(log_decay: torch.Tensor) -> torch.Tensor:
        """Logarithm of what is left of key j where the query at t reads the state, `[B, G, T, T]`."""
        left = torch.zeros(BATCH, GROUPS, LENGTH, LENGTH, dtype=log_decay.dtype)
        for group, span in enumerate(SPANS):
            for t in range(LENGTH):
                for j in range(LENGTH):
                    left[:, group, t, j] = log_decay[:, group, j + 1 : span.boundary(t)].sum(-1)
        return left

    @property
    def parts(self) -> Parts:
        """What a mixer gives."""
        seen = self.scores.masked_fill(self.hidden, float("-inf"))
        gain = self.log_gain.expand(BATCH, HEADS, LENGTH)
        total = self.own.sum(-1)
        empty = ~self.hidden.any(-1).expand_as(total)
        log_den = total.masked_fill(empty, 1).log().masked_fill(empty, float("-inf"))
        out, num = seen.softmax(-1) @ self.values, self.own @ self.values
        return Parts(out, seen.logsumexp(-1), num, log_den, gain)

    @property
    def teacher(self) -> dict[str, Any]:
        """What full attention gives."""
        outputs = (self.scores.softmax(-1) @ self.values).transpose(1, 2)
        size = self.value.square().mean((2, 3)).repeat_interleave(HEADS // GROUPS, 1)
        beside = {"query": self.query, "key": self.key, "scaling": SIZE**-0.5}
        return {"outputs": outputs, "lse": self.scores.logsumexp(-1), "size": size, **beside}

    @property
    def student(self) -> dict[str, Any]:
        """As a layer's losses are given it."""
        return {
            "parts": self.parts,
            "features": Features(self.query_features, self.key_features, self.log_decay, SPANS),
        }

    def divergence(self) -> torch.Tensor:
        """KL(softmax || weights of the hybrid), `[B, H, T]`, from all weights."""
        weights = torch.where(self.hidden, self.own * self.log_gain[..., None].exp(), self.scores.exp())
        softmax = self.scores.softmax(-1)
        logs = (weights / weights.sum(-1, keepdim=True)).masked_fill(softmax == 0, 1).log()
        return torch.where(softmax > 0, softmax * (softmax.log() - logs), 0).sum(-1)


def of_rows(given: dict[str, Any], rows: slice) -> dict[str, Any]:
    """The same for some sequences of the batch."""
    if "parts" in given:
        parts = Parts(*(tensor[rows] for tensor in vars(given["parts"]).values()))
        whole = given["features"]
        features = Features(whole.query[rows], whole.key[rows], None, whole.spans)
        return given | {"parts": parts, "features": features}
    return {name: value[rows] if isinstance(value, torch.Tensor) else value for name, value in given.items()}
