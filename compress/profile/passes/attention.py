"""The pass over attention: queries, keys, values and gradients of every layer, whole and as tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from compress.profile.passes.base import Run, Work
from compress.profile.passes.capture import Capture
from compress.profile.passes.samples import Read, SamplePass
from compress.profile.passes.tiles import LayerTensors, Workspace, tiles
from compress.profile.statistic import Item, Reads, Statistic
from compress.profile.sums import Sheet
from compress.runtime.impl import current

if TYPE_CHECKING:
    from compress.data.sample import Sample
    from compress.profile.heads.base import HeadStatistic


class AttentionPass(SamplePass):
    """Feeds statistics of head groups layer by layer; backwards where any of them needs gradients."""

    reads: ClassVar[Reads] = "attention"
    streams: ClassVar[bool] = True
    has_loss: ClassVar[bool] = True  # that of the profile

    @classmethod
    def work(cls, statistics: Sequence[Statistic], alternatives: int) -> Work:
        gradient = any(statistic.needs_gradient for statistic in statistics)
        return Work(forward=1, backward=gradient, alternatives=alternatives, tables=True)

    @contextmanager
    def reader(self, run: Run, statistics: Sequence[HeadStatistic]) -> Iterator[Read]:
        gradient = any(statistic.needs_gradient for statistic in statistics)
        inputs = any(statistic.needs_inputs for statistic in statistics)
        feed = Feed(statistics, Workspace(run.subject.device), run.strip_bytes)
        model, checkpointing = run.subject.model, run.checkpointing
        with Capture(model, feed.layer, gradient=gradient, checkpointing=checkpointing, inputs=inputs) as capture:

            def read(items: Sequence[Item], sheets: Sequence[Sheet]) -> list[float | None]:
                taken = [self.sample_of(item, statistics) for item in items]
                places = [number for number, sample in enumerate(taken) if sample is not None]

                def begin(number: int) -> None:
                    feed.item, feed.sheet = items[places[number]], sheets[places[number]]

                losses: list[float | None] = [None] * len(items)
                shared = [run.taken(sample) for sample in taken if sample is not None]
                found = capture.run_all(shared, begin, run.report)
                for place, loss in zip(places, found if self.has_loss else [], strict=self.has_loss):
                    losses[place] = loss
                return losses

            yield read

    def sample_of(self, item: Item, statistics: Sequence[HeadStatistic]) -> Sample | None:
        """What passes through the model; None leaves an item out."""
        return item.sample


class Feed:
    """Hands the layers of one sample to statistics, and their tiles to those that take tiles.

    Attributes:
        item, sheet: the sample that is read, and where its sums go.
    """

    item: Item
    sheet: Sheet

    def __init__(self, statistics: Sequence[HeadStatistic], workspace: Workspace, strip_bytes: int | None) -> None:
        self.statistics = statistics
        self.workspace = workspace
        self.strip_bytes = strip_bytes

    def layer(self, tensors: LayerTensors) -> None:
        """Take one layer; the sums lie on one device, and all is computed there."""
        with current(self.workspace.device):
            self._take(tensors.on(self.workspace.device))

    def _take(self, tensors: LayerTensors) -> None:
        fed = [
            (statistic, sums[self.item.length])
            for statistic, sums in zip(self.statistics, self.sheet.sums, strict=True)
        ]
        for statistic, sums in fed:
            statistic.add_layer(sums, tensors, self.item)
        tiled = [(statistic, sums) for statistic, sums in fed if statistic.tiled]
        if tiled:
            keep_lse = any(statistic.needs_lse for statistic, _ in tiled)
            for tile in tiles(tensors, self.workspace, self.strip_bytes, keep_lse=keep_lse):
                for statistic, sums in tiled:
                    statistic.add(sums, tile, self.item)
