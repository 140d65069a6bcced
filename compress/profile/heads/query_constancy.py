"""How little the query of a head depends on the token: whether one query for all tokens can stand for it.

||mean_t q_t||^2 / mean_t ||q_t||^2 is 1 where the query is the same for all tokens of all documents, and 1 / number of
tokens for queries without any common part. It is taken of queries as attention gets them, which is what the target
`aaren` replaces, and of queries turned back by RoPE: those of a head may be constant before RoPE turns them by their
positions, and then the head weighs a token by what it is and how far away it is, which no fixed query does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from compress.profile.heads.base import HeadStatistic, Table
from compress.profile.key import Key
from compress.profile.passes.tiles import LayerTensors
from compress.profile.statistic import Item, Result, Results, Subject, Sums
from compress.registry import statistics

if TYPE_CHECKING:
    from compress.plan import ModelShape

FRAMES = ("given", "halves", "pairs")  # as attention gets a query, and turned back in either way to pair its numbers


@statistics.register("query_constancy")
class QueryConstancy(HeadStatistic):
    """Squared length of the mean query over the mean squared length (Aaren, arXiv 2405.13956; no gradient needed)."""

    unit: ClassVar[str] = "share"
    tiled: ClassVar[bool] = False
    gives: ClassVar[Mapping[str, str]] = {"query_constancy": "groups", "query_constancy.before_rope": "groups"}

    @property
    def needs_inputs(self) -> bool:
        """The rotary tables."""
        return True

    def tables(self, shape: ModelShape, length: int) -> dict[str, Table]:
        """What is summed: mean queries in every frame, and their mean squared length."""
        query = shape.query_heads // shape.kv_heads
        means = {frame: Table("of a query's numbers", query=query, dim=shape.head_dim) for frame in FRAMES}
        return means | {"square": Table("of a query's numbers, squared", query=query)}

    def add_layer(self, sums: Sums, layer: LayerTensors, item: Item) -> None:
        """Add the means over the rows of a sample."""
        query = layer.query.double()
        shape = sums["square"][layer.layer].shape
        for frame, turned in zip(FRAMES, (query, *turned_back(query, layer.rotary)), strict=True):
            sums[frame][layer.layer] += turned.mean(1).view(*shape, -1)
        sums["square"][layer.layer] += query.square().sum(-1).mean(1).view(shape)

    def results(self, totals: Sequence[tuple[dict[int, Sums], Counter[str]]], subject: Subject) -> Results:
        """(layer, group), the mean over query heads: as attention gets queries, and `before_rope` the larger of both
        ways to turn them back. `mean`, (layer, group, query, dim), has the mean queries as attention gets them.
        """
        found = super().results(totals, subject)
        made: Results = {}
        for length in sorted({key.length for key in found if key.length is not None}):
            means = {frame: found[Key(self.registered, frame, length)] for frame in FRAMES}
            square = found[Key(self.registered, "square", length)].values.clamp(min=1e-30)
            given, *back = (means[frame].values.square().sum(-1) / square for frame in FRAMES)
            made[Key(self.registered, "", length)] = Result(given.mean(-1), ("layer", "group"), self.unit)
            before = torch.stack([shares.mean(-1) for shares in back]).amax(0)
            made[Key(self.registered, "before_rope", length)] = Result(before, ("layer", "group"), self.unit)
            made[Key(self.registered, "mean", length)] = means["given"]
        return made


def turned_back(query: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None) -> Iterator[torch.Tensor]:
    """Queries `[H, T, D]` before RoPE, if it pairs a number with the one half of them on, and if with its neighbour.

    Which one a model does its tables do not say. The wrong way turns further what the right one turns back, so that
    queries which were the same have nothing in common. Numbers that are not turned stay as they are.

    Args:
        rotary: cosines and sines `[T, R]` of the first R numbers: of R / 2 angles once behind the other, or each twice,
            or of R angles that turn 2 R numbers; None where there are none.
    """
    if rotary is None:
        yield from (query, query)
        return
    cosine, sine = (_angles(table, rotary[0]).to(query.dtype) for table in rotary)
    size = 2 * cosine.shape[-1]
    length = cosine.square() + sine.square()  # not 1 where tables are scaled, as YaRN's are
    cosine, sine = cosine / length, sine / length
    turned, rest = query[..., :size], query[..., size:]
    first, second = turned.chunk(2, dim=-1)
    yield torch.cat([first * cosine + second * sine, second * cosine - first * sine, rest], dim=-1)
    first, second = turned[..., 0::2], turned[..., 1::2]
    pairs = torch.stack([first * cosine + second * sine, second * cosine - first * sine], dim=-1)
    yield torch.cat([pairs.flatten(-2), rest], dim=-1)


def _angles(table: torch.Tensor, cosine: torch.Tensor) -> torch.Tensor:
    """The columns of a rotary table that are of different angles, as the cosines say."""
    if torch.equal(*cosine.chunk(2, dim=-1)):
        return table.chunk(2, dim=-1)[0]
    if torch.equal(cosine[..., 0::2], cosine[..., 1::2]):
        return table[..., 0::2]
    return table
