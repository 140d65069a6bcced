"""How few keys of a head group hold what it looks at: retention curves over the scores of KVzip and KVzip+.

The scores say how much each token is looked at where the model repeats the text (`models.reconstruction`). Sorted,
they give the share of keys that a group has to keep for a share of all its scores: a group whose curve is steep keeps
little, whatever is asked later. Which level of scores is reached by which share of its keys says how a single threshold
over all groups, as KVzip has it, would divide the cache among them. Sinks, and the tokens of the request, are not
counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field

from compress.limits import ENTRIES, LONGEST
from compress.models.reconstruction import CHUNK, TokenScores
from compress.profile.heads.base import HeadStatistic, Table
from compress.profile.statistic import Reads, Sums
from compress.registry import statistics

if TYPE_CHECKING:
    from compress.plan import ModelShape

Share = Annotated[float, Field(gt=0, lt=1)]
Level = Annotated[float, Field(ge=-100, le=100)]


@statistics.register("reconstruction")
class Reconstruction(HeadStatistic):
    """Share of its keys that a head group needs where the model repeats the text (KVzip; no gradient needed)."""

    share: float = Field(0.9, gt=0, lt=1, description="of all scores of KVzip+ that `reconstruction` counts keys for")
    shares: tuple[Share, ...] = Field(
        (0.5, 0.75, 0.9, 0.95, 0.99),
        min_length=1,
        max_length=ENTRIES,
        description="of all scores, for which `reconstruction.weight` (KVzip) and `reconstruction.moved` (KVzip+) have "
        "the share of keys that is needed",
    )
    levels: tuple[Level, ...] = Field(
        (-10, -9, -8, -7, -6, -5, -4, -3, -2, -1),
        min_length=1,
        max_length=ENTRIES,
        description="logarithms of KVzip+ scores, for which `reconstruction.above` has the share of keys at or above",
    )
    chunk: int = Field(CHUNK, ge=1, le=LONGEST, description="tokens that are repeated at once")

    reads: ClassVar[Reads] = "reconstruction"
    tiled: ClassVar[bool] = False
    unit: ClassVar[str] = "share of the keys"
    gives: ClassVar[Mapping[str, str]] = {"reconstruction": "groups"}

    def tables(self, shape: ModelShape, length: int) -> dict[str, Table]:
        """(layer, group), with the shares or the levels as a third axis; 0 in layers that slide by themselves."""
        return {
            "": Table(self.unit),
            "weight": Table(self.unit, share=len(self.shares)),
            "moved": Table(self.unit, share=len(self.shares)),
            "above": Table(self.unit, level=len(self.levels)),
        }

    def add_scores(self, sums: Sums, scores: TokenScores) -> None:
        """Take one layer of one sample."""
        layer = scores.layer
        if not scores.moved.shape[1]:
            return  # a sample of sinks alone
        sums[""][layer] += keys_needed(scores.moved, (self.share,))[:, 0]
        sums["weight"][layer] += keys_needed(scores.weight, self.shares)
        sums["moved"][layer] += keys_needed(scores.moved, self.shares)
        levels = torch.tensor(self.levels, device=scores.moved.device).exp()
        sums["above"][layer] += (scores.moved[..., None] >= levels).double().mean(1)


def keys_needed(scores: torch.Tensor, shares: tuple[float, ...]) -> torch.Tensor:
    """The least share of keys whose scores add up to each share of all scores, `[groups, shares]` float64.

    Args:
        scores: `[groups, keys]`, not negative; at least one key.
    """
    sums = scores.double().sort(1, descending=True).values.cumsum(1)
    wanted = sums[:, -1:] * torch.tensor(shares, dtype=torch.float64, device=scores.device)
    needed = torch.searchsorted(sums, wanted.contiguous()) + 1
    return needed.clamp(max=scores.shape[1]).double() / scores.shape[1]
