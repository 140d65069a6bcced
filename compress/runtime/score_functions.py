"""Score functions in place of the softmax: sigmoid, LSSA and LSSAR, on a matrix of scores.

A row has n keys that it sees. Its scores q . k arrive scaled: by the temperature of its head, and for LSSA and LSSAR as
log D . log n . cos(q, k).

    sigmoid (arXiv 2409.04431)   sigma(s + b), b = bias - log n, or bias - log N with one length N for all rows; no sum
    LSSA (arXiv 2501.13428)      softplus(s) / sum of the row
    LSSAR (the same)             x = n . LSSA - O with O = 1, but 0 where n <= 3; relu(x)^p / sum of the row
    SSMax (arXiv 2501.19399)     softmax(s_h . log n . s), which is a factor on the query
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from .mixer import take
from .scores import KernelScores, Scores

FLAT = 1e-3  # LSSAR: a row whose largest weight is within this share of its mean is too flat to be told apart
SHORT_ROW = 3  # LSSAR: keys up to which nothing is taken from a row


@dataclass(frozen=True)
class ScoreFunction(Scores):
    """How scaled scores of some query heads become weights.

    Attributes:
        name: `sigmoid`, `lssa` or `lssar`; SSMax is a `Scores`.
        bias: `[H]`, added to the scores of a query head (sigmoid, which has to have it).
        length: N, where the bias takes log N from every row; None for log n, the row's own.
        power: p of LSSAR.
    """

    name: str = "sigmoid"
    bias: torch.Tensor | None = None
    length: int | None = None
    power: int = 1

    @property
    def for_kernels(self) -> KernelScores | None:
        """See `Scores.for_kernels`: LSSAR has to see a row's sum before it weighs a key, which no kernel here does."""
        if self.name == "sigmoid":
            assert self.bias is not None
            if self.length is None:
                return KernelScores(by_head=self.bias, score=2)
            return KernelScores(by_head=self.bias - math.log(self.length), score=1)
        return KernelScores(score=3) if self.name == "lssa" else None

    def of(self, heads: Sequence[int]) -> ScoreFunction:
        """Those of some query heads."""
        bias = None if self.bias is None else take(self.bias, heads, 0)
        return ScoreFunction(name=self.name, bias=bias, length=self.length, power=self.power)

    def weights(self, logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """See `Scores.weights`."""
        if self.name == "sigmoid":
            return self._sigmoid(logits, seen)
        soft = functional.softplus(logits).masked_fill(~seen, 0)
        lssa = soft / soft.sum(-1, keepdim=True).clamp(min=torch.finfo(soft.dtype).tiny)
        return lssa if self.name == "lssa" else self._reweighted(lssa, seen)

    def _sigmoid(self, logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        off: Any = None if self.length is None else math.log(self.length)
        if off is None:
            off = seen.sum(-1, keepdim=True).clamp(min=1).to(logits.dtype).log()
        assert self.bias is not None
        return torch.sigmoid(logits + self.bias.to(logits.dtype)[:, None, None] - off).masked_fill(~seen, 0)

    def _reweighted(self, lssa: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """LSSAR from the weights of LSSA.

        relu(x)^p overflows float32 from x = 370 with p = 15, so the largest x of a row is taken out before; a row where
        no x is above 0 but for rounding, as of equal keys, keeps the weights of LSSA.
        """
        count = seen.sum(-1, keepdim=True)
        excess = functional.relu(count * lssa - (count > SHORT_ROW).to(lssa.dtype)).masked_fill(~seen, 0)
        most = excess.detach().amax(-1, keepdim=True)
        flat = most < FLAT
        powers = (excess / most.masked_fill(flat, 1)) ** self.power
        # A flat row has a sum of 1 here, so that no gradient of the branch that is not taken is NaN.
        total = powers.sum(-1, keepdim=True).masked_fill(flat, 1)
        return torch.where(flat, lssa, powers / total)


def function_of(group: Mapping[str, Any], bias: torch.Tensor | None) -> ScoreFunction | None:
    """The function of a plan's `score` entry with the biases of its heads `[H]`; None where it is a plain softmax."""
    name = group["score"]
    if name == "ssmax":
        return None
    length = group["reference"] if name == "sigmoid" and group["bias"] == "constant" else None
    return ScoreFunction(name=name, bias=bias, length=length, power=group["power"] if name == "lssar" else 1)


def is_cosine(group: Mapping[str, Any]) -> bool:
    """Whether a `score` entry scores by the cosine of query and key."""
    return group["score"] in ("lssa", "lssar")


def row_scale(group: Mapping[str, Any], count: torch.Tensor, head_dim: int, scale: float) -> torch.Tensor:
    """The factor on q . k (or on the cosine) of rows that see `count` keys, without the head's temperature."""
    if group["score"] == "ssmax":
        return count.log() * (scale / math.log(group["reference"]))
    if is_cosine(group):
        return count.log() * math.log(head_dim)
    return torch.full_like(count, scale)
