"""How many features a linear head needs to stand in for a head group: the rank of what rows read of the distant past.

A causal head with a state of F features has blocks A[t + w:, :t] of rank F at most, whatever its maps and decays, and
dividing rows by their sums changes no rank: all that later rows read of the keys before t goes through the state at t.
So the rank of such a block of a softmax head, w being the window that stays softmax, is a lower bound on the features
of any linear head that matches it; a fixed map may need more. How wrong a row is depends on the sizes of the values,
so every column counts as much as its value moves the hidden state, |v_j W_o|. All query heads of a group read one
state: their rows stand in one block, and a column counts with all of them.

Whole blocks grow with the square of the length. Here a block has at most `block` rows and as many columns, evenly
spread, and the rank is that of all but a share `eps` of its energy, the squared weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field, PrivateAttr

from compress.limits import ENTRIES, LONGEST
from compress.profile.heads.base import HeadStatistic, Table
from compress.profile.passes.tiles import LayerTensors, attention_rows
from compress.profile.statistic import Item, Subject, Sums
from compress.registry import statistics

if TYPE_CHECKING:
    from compress.plan import ModelShape

MOST_BLOCK = 4096
SMALL_SHARE = 1e-4  # of the energy


@statistics.register("state_rank")
class StateRank(HeadStatistic):
    """Features that a linear head needs at least, the rank of A[t + window:, :t] (no gradient needed)."""

    eps: float = Field(0.01, gt=0, lt=1, description="share of the squared weights that may be lost")
    window: int = Field(64, ge=1, le=LONGEST, description="tokens that stay softmax attention")
    splits: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (0.25, 0.5, 0.75), min_length=1, max_length=ENTRIES, description="where t lies, as shares of the length"
    )
    block: int = Field(256, ge=2, le=MOST_BLOCK, description="rows and columns of a block at most, evenly spread")

    unit: ClassVar[str] = "features"
    tiled: ClassVar[bool] = False
    gives: ClassVar[Mapping[str, str]] = {"state_rank": "groups"}

    _reach: list[torch.Tensor] = PrivateAttr([])

    def tables(self, shape: ModelShape, length: int) -> dict[str, Table]:
        """(layer, group): the largest rank over the splits, mean over samples; 0 where no row lies behind a split and
        the window."""
        return {"": Table(self.unit)}

    def begin(self, subject: Subject, lengths: Sequence[int]) -> dict[int, Sums]:
        self._reach = subject.reach
        return super().begin(subject, lengths)

    def add_layer(self, sums: Sums, layer: LayerTensors, item: Item) -> None:
        length, queries = layer.query.shape[1], layer.query.shape[0] // layer.key.shape[0]
        value, device = layer.value.double(), layer.query.device
        # |v_j W_o| of all query heads of the group together, from W_o^T W_o.
        size = torch.einsum("gtd,gde,gte->gt", value, self._reach[layer.layer], value).clamp(min=0).sqrt()
        ranks = [torch.zeros(len(size), dtype=torch.int64, device=device)]
        for share in self.splits:
            split = int(share * length)
            rows = _spread(split + self.window, length, max(1, self.block // queries), device)
            columns = _spread(0, split, self.block, device)
            if len(rows) and len(columns):
                block = attention_rows(layer, rows)[..., columns].double() * size[:, None, None, columns]
                ranks.append(energy_rank(block.flatten(1, 2), self.eps))
        sums[""][layer.layer] += torch.stack(ranks).amax(0)


def energy_rank(blocks: torch.Tensor, eps: float) -> torch.Tensor:
    """The least number of singular values of each block that hold all but a share `eps` of the squares, `[...]` int64.

    The eigenvalues of a float32 product are right to 1e-7 of its energy, several times faster than those of float64,
    which takes smaller shares.

    Args:
        blocks: `[..., rows, columns]` float64. A block of zeros has rank 0.
    """
    blocks = blocks.float() if eps >= SMALL_SHARE else blocks
    wide = blocks.shape[-1] > blocks.shape[-2]
    gram = blocks @ blocks.mT if wide else blocks.mT @ blocks
    energies = torch.linalg.eigvalsh(gram).clamp(min=0)  # ascending
    lost = energies.double().cumsum(-1)
    return (lost > eps * lost[..., -1:]).sum(-1)


def _spread(start: int, end: int, most: int, device: torch.device) -> torch.Tensor:
    """At most so many of the positions from `start` to before `end`, evenly spread; all where they are few enough."""
    count = max(0, end - start)
    if count <= most:
        return torch.arange(start, max(start, end), device=device)
    return start + (torch.arange(most, device=device) * count) // most
