"""How well importance scores of two corpora agree: what ranks differently depends on the text, not on the model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.stats import spearmanr

from compress.profile.key import CORPORA, Key
from compress.profile.store import Profile

KEPT = 0.8  # share of a layer's units that is kept where the choice is compared, rounded down: all say nothing


@dataclass(frozen=True)
class Agreement:
    """Of one kind of unit between two corpora.

    Attributes:
        mean: Spearman's rank correlation within a layer, mean over layers; None where no layer has one (a single
            unit, or equal scores).
        lowest: the lowest of any layer, and that layer.
        kept: share of the units kept by the first corpus that the second one keeps as well, mean over layers.
        chance: what `kept` would be between two random rankings.
    """

    mean: float | None
    lowest: tuple[float, int] | None
    kept: float
    chance: float

    def correlation(self) -> str:
        """The mean correlation and the lowest one, as a report prints them."""
        if self.mean is None or self.lowest is None:
            return "none"
        return f"{self.mean:.3f} (lowest {self.lowest[0]:.3f}, layer {self.lowest[1]})"


@dataclass(frozen=True)
class Stability:
    """Agreement on one statistic.

    Attributes:
        heads: of query heads; `kept` counts head groups, which are ranked by the mean of their heads.
        neurons: of neurons.
    """

    heads: Agreement
    neurons: Agreement

    def line(self) -> str:
        """One line of text."""
        return (
            f"rank correlation within a layer, heads {self.heads.correlation()}, neurons "
            f"{self.neurons.correlation()}; when {KEPT:.0%} stay, both keep {self.heads.kept:.1%} of the head groups "
            f"(chance {self.heads.chance:.0%}) and {self.neurons.kept:.1%} of the neurons "
            f"(chance {self.neurons.chance:.0%})"
        )


def stabilities(profile: Profile) -> dict[str, Stability]:
    """By statistic, for those that were measured on two corpora."""
    return {
        name: Stability(
            *(
                agreement(*(profile.tensor(Key(name, part, corpus=corpus)) for corpus in CORPORA), groups=groups)
                for part, groups in (("heads", True), ("neurons", False))
            )
        )
        for name in profile.header.statistics
        if profile.find(Key(name, "heads", corpus="second")) is not None
    }


def agreement(first: torch.Tensor, second: torch.Tensor, *, groups: bool) -> Agreement:
    """Compare scores `[layers, ...]` on the first corpus with those on the second.

    Args:
        groups: whether means over the last axis are kept, instead of the numbers themselves.
    """
    correlations = [rank_correlation(a.flatten(), b.flatten()) for a, b in zip(first, second, strict=True)]
    known = [(value, layer) for layer, value in enumerate(correlations) if value is not None]
    if groups:
        first, second = first.mean(-1), second.mean(-1)
    kept = [both_kept(a, b) for a, b in zip(first, second, strict=True)]
    mean = sum(value for value, _ in known) / len(known) if known else None
    units = first.shape[1]
    return Agreement(mean, min(known) if known else None, sum(kept) / len(kept), number_kept(units) / units)


def rank_correlation(first: torch.Tensor, second: torch.Tensor) -> float | None:
    """Spearman's rho of two vectors; None where one is constant."""
    if bool((first == first[0]).all()) or bool((second == second[0]).all()):
        return None
    return float(spearmanr(first.numpy(), second.numpy()).statistic)


def number_kept(units: int) -> int:
    """How many of a layer's units stay: of several, never all."""
    return max(1, math.floor(KEPT * units + 1e-9))


def both_kept(first: torch.Tensor, second: torch.Tensor) -> float:
    """Share of the highest units of one vector that is among those of the other."""
    number = number_kept(len(first))
    sets = [set(scores.argsort(descending=True, stable=True)[:number].tolist()) for scores in (first, second)]
    return len(sets[0] & sets[1]) / number
