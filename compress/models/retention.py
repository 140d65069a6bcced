"""What a prepared scorer keeps at each threshold: quantiles of scores by head group, and their spread over texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from compress.targets.retain import LEVELS

MOST = 4096  # scores of a document and group that are kept, evenly spread over its tokens


@dataclass(frozen=True)
class Retention:
    """How many tokens behind the sinks each head group keeps, by threshold, on the documents of a preparation.

    NaN in layers that slide by themselves. A threshold is a quantile of all documents' scores together; a single
    document keeps more or less than that, and longer ones may keep more than shorter ones.

    Attributes:
        lengths: `[L]` int64, of the documents in tokens.
        shares: `[S]`, of the tokens, ascending.
        thresholds: `[layers, groups, S]`, scores at or above which such shares of the tokens are.
        spread: `[layers, groups, S]`, standard deviation over documents of the share that is kept.
        kept: `[L, layers, groups, S]`, mean share that is kept of documents of each length.
        rank: `[layers, groups]`, Spearman's correlation of the scores with those they stand for, mean over documents.
        wanted: `[layers, groups, S]`, what `thresholds` would be of the scores that they stand for; None where an
            earlier version prepared them.
    """

    lengths: torch.Tensor
    shares: torch.Tensor
    thresholds: torch.Tensor
    spread: torch.Tensor
    kept: torch.Tensor
    rank: torch.Tensor
    wanted: torch.Tensor | None = None

    def at(self, share: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Thresholds and spreads `[layers, groups]` for a share of the tokens, between those that were measured.

        Shares below the least and above the largest that was measured take the scores there.
        """
        found = float(share) * LEVELS - float(self.shares[0]) * LEVELS
        found = min(max(found, 0.0), len(self.shares) - 1.0)
        low = min(math.floor(found), len(self.shares) - 2)
        between = found - low
        parts = (self.thresholds, self.spread)
        threshold, spread = (torch.lerp(part[..., low], part[..., low + 1], between) for part in parts)
        return threshold, spread

    def above(self, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The share of the tokens whose scores are at or above one threshold, and its spread, `[layers, groups]`.

        Between the thresholds that were measured; beyond these, half-way to none or all of the tokens.
        """
        return self._above(self.thresholds, threshold)

    def wanted_above(self, score: float) -> torch.Tensor | None:
        """The share of the tokens whose scores to stand for are at or above a score, `[layers, groups]`, as `above`;
        None where it was not measured."""
        return None if self.wanted is None else self._above(self.wanted, score)[0]

    def _above(self, thresholds: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
        count = len(self.shares)
        passed = (thresholds >= threshold).sum(-1)  # thresholds fall with the share
        low = (passed - 1).clamp(0, count - 2)[..., None]
        first, last = (thresholds.gather(-1, low + place) for place in (0, 1))
        between = ((first - threshold) / (first - last).clamp(min=torch.finfo(torch.float32).tiny)).clamp(0, 1)
        shares = self.shares.expand_as(self.spread)
        share, spread = (
            torch.lerp(values.gather(-1, low), values.gather(-1, low + 1), between)[..., 0]
            for values in (shares, self.spread)
        )
        share = torch.where(passed == 0, shares[..., 0] / 2, share)
        share = torch.where(threshold < thresholds[..., -1], (1 + shares[..., -1]) / 2, share)
        return share.where(~thresholds[..., 0].isnan(), math.nan), spread

    def tensors(self) -> dict[str, torch.Tensor]:
        """As a file holds them, by name."""
        return {name: value.contiguous() for name, value in vars(self).items() if value is not None}

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Retention:
        """From what a file holds."""
        return cls(**tensors)


class Measured:
    """Collects the scores of documents, layer by layer.

    Args:
        layers, groups: of the model.

    Attributes:
        longer: scores of other texts, which thresholds are taken from; None takes them from these.
    """

    longer: Measured | None = None

    def __init__(self, layers: int, groups: int) -> None:
        self.layers, self.groups = layers, groups
        self._scores: list[dict[int, torch.Tensor]] = []  # of every document by layer, `[G, n]`
        self._wanted: list[dict[int, torch.Tensor]] = []  # what they stand for
        self._ranks: list[torch.Tensor] = []
        self._lengths: list[int] = []
        self._wrong = torch.zeros(2, layers, groups, dtype=torch.float64)
        self._tokens = torch.zeros(layers, dtype=torch.int64)

    def begin(self, length: int) -> None:
        """A document of so many tokens comes."""
        self._lengths.append(length)
        self._scores.append({})
        self._wanted.append({})
        self._ranks.append(torch.full((self.layers, self.groups), math.nan, dtype=torch.float64))

    def add(self, layer: int, scores: torch.Tensor, wanted: torch.Tensor) -> None:
        """Take one layer of the document: what the scorer gives and what it stands for, each `[G, n]`."""
        scores, wanted = scores.double().cpu(), wanted.double().cpu()
        count = scores.shape[1]
        chosen = torch.arange(min(count, MOST)) * count // max(1, min(count, MOST))
        self._scores[-1][layer] = scores[:, chosen].float()
        self._wanted[-1][layer] = wanted[:, chosen].float()
        self._ranks[-1][layer] = spearman(scores, wanted)
        self._tokens[layer] += count
        self._wrong[0, layer] += (scores - wanted).square().sum(1)
        self._wrong[1, layer] += (wanted - wanted.mean(1, keepdim=True)).square().sum(1)

    def errors(self) -> torch.Tensor:
        """`[layers, groups]`, the squared error of the scores over the variance of what they stand for."""
        return self._wrong[0] / self._wrong[1].clamp(min=1e-12)

    def losses(self) -> tuple[float, float]:
        """Squared errors a token and head group, summed over layers: of the best constant of each document, and of the
        scores."""
        wrong, constant = (self._wrong.mean(2) / self._tokens.clamp(min=1)).sum(1).tolist()
        return constant, wrong

    def retention(self) -> Retention:
        """Of all documents so far, at least one; every document of a length counts by its tokens that were kept."""
        if self.longer is not None:
            found = self.longer.retention()
            return replace(found, rank=torch.stack(self._ranks).mean(0).float(), wanted=self._wanted_at(found.shares))
        shares = torch.arange(1, LEVELS) / LEVELS
        lengths = sorted(set(self._lengths))
        size = (self.layers, self.groups, len(shares))
        thresholds, spread = (torch.full(size, math.nan) for _ in range(2))
        kept = torch.full((len(lengths), *size), math.nan)
        by_length = [[place for place, one in enumerate(self._lengths) if one == length] for length in lengths]
        for layer in self._scores[0]:
            parts = [document[layer] for document in self._scores]
            tau = _quantiles(torch.cat(parts, 1), shares)
            thresholds[layer] = tau
            each = torch.stack([(part[..., None] >= tau[:, None]).float().mean(1) for part in parts])
            spread[layer] = each.std(0, correction=0)
            for place, documents in enumerate(by_length):
                kept[place, layer] = each[documents].mean(0)
        rank = torch.stack(self._ranks).mean(0).float()
        return Retention(torch.tensor(lengths), shares, thresholds, spread, kept, rank, self._wanted_at(shares))

    def _wanted_at(self, shares: torch.Tensor) -> torch.Tensor:
        """See `Retention.wanted`."""
        found = torch.full((self.layers, self.groups, len(shares)), math.nan)
        for layer in self._wanted[0]:
            found[layer] = _quantiles(torch.cat([document[layer] for document in self._wanted], 1), shares)
        return found


def _quantiles(scores: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Of `[G, n]`, the scores at or above which such shares are, rounded to whole tokens, at least one; `[G, S]`."""
    order = scores.sort(1, descending=True).values
    places = (shares * scores.shape[1]).round().long().clamp(1, scores.shape[1]) - 1
    return order[:, places]


def spearman(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Rank correlation of the rows of `[G, n]` and `[G, n]`, `[G]` float64; ties in the order of the tokens."""
    ranks = [torch.argsort(values, dim=1, stable=True).argsort(1).double() for values in (left, right)]
    count = left.shape[1]
    if count < 2:
        return torch.zeros(len(left), dtype=torch.float64)
    return 1 - 6 * (ranks[0] - ranks[1]).square().sum(1) / (count * (count**2 - 1))
