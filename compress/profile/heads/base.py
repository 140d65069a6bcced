"""What a statistic of head groups is: sums over one layer's attention, by profiled length, and their means."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from compress.profile.key import Key
from compress.profile.passes.tiles import LayerTensors, Tile
from compress.profile.statistic import Item, Reads, Result, Results, Subject, SummedStatistic, Sums

if TYPE_CHECKING:
    from compress.plan import ModelShape


@dataclass(frozen=True)
class Table:
    """One tensor at one length, behind the axes (layer, group).

    Attributes:
        unit: what one number counts.
        axes: further axes, with their sizes.
    """

    unit: str
    axes: Mapping[str, int]

    def __init__(self, unit: str, **axes: int) -> None:
        object.__setattr__(self, "unit", unit)
        object.__setattr__(self, "axes", axes)


class HeadStatistic(SummedStatistic):
    """Base of the statistics of head groups: tensors (layer, group, ...) at every profiled length.

    A result is the mean over samples of what `add` and `add_layer` summed in float64. The methods are called layer by
    layer, in no promised order, and see one sample at a time.

    Attributes:
        tiled: whether `add` is called; without any such statistic no tile is computed.
        needs_lse: whether `add` reads `Tile.lse`.
    """

    reads: ClassVar[Reads] = "attention"
    tiled: ClassVar[bool] = True
    needs_lse: ClassVar[bool] = False

    @property
    def needs_inputs(self) -> bool:
        """Whether `add_layer` reads what the attention modules get, `LayerTensors.hidden` and `rotary`."""
        return False

    @abstractmethod
    def tables(self, shape: ModelShape, length: int) -> dict[str, Table]:
        """The tensors at a length in tokens, by `Key.part`."""

    def add(self, sums: Sums, tile: Tile, item: Item) -> None:
        """Take one tile. Its tensors are shared with other statistics: read only.

        Args:
            sums: `[layers, groups, ...]` float64 by part, to be added to.
        """

    def add_layer(self, sums: Sums, layer: LayerTensors, item: Item) -> None:
        """Take the queries, keys, values and gradients of one layer, before its tiles."""

    def counted(self, item: Item) -> Iterable[str] | None:
        """The parts for which a sample counts in the mean; None for all."""
        return None

    def scores_heads(self, shape: ModelShape) -> bool:
        return "heads" in self.tables(shape, 1)

    def begin(self, subject: Subject, lengths: Sequence[int]) -> dict[int, Sums]:
        sizes = (subject.shape.layers, subject.shape.kv_heads)
        return {
            length: {
                part: torch.zeros(*sizes, *table.axes.values(), dtype=torch.float64, device=subject.device)
                for part, table in self.tables(subject.shape, length).items()
            }
            for length in lengths
        }

    def count(self, item: Item) -> Mapping[str, int]:
        """One for each part that counts; all parts of a length under its empty name."""
        parts = self.counted(item)
        return {f"{item.length}/*": 1} if parts is None else {f"{item.length}/{part}": 1 for part in parts}

    def bad_place(self, place: int, name: str, total: torch.Tensor) -> tuple[str, int]:
        finite = torch.isfinite(total.flatten(1)).all(1)
        return str(Key(self.registered, name, place)), int((~finite).nonzero()[0])

    def results(self, totals: Sequence[tuple[dict[int, Sums], Counter[str]]], subject: Subject) -> Results:
        """Means over samples; a tensor for which no sample counted is left out."""
        ((sums, counts),) = totals
        means: Results = {}
        for length, parts in sums.items():
            for part, table in self.tables(subject.shape, length).items():
                number = counts[f"{length}/*"] or counts[f"{length}/{part}"]
                if number:
                    values = (parts[part] / number).float().cpu()
                    means |= self.named(Key(self.registered, part, length), table, values)
        return means

    def named(self, key: Key, table: Table, values: torch.Tensor) -> Results:
        """The results that one table gives; a single one, but for statistics that split theirs."""
        return {key: Result(values, ("layer", "group", *table.axes), table.unit)}
