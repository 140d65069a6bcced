"""The pass over attention: queries, keys, values and gradients of every layer, whole and as tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from compress.profile.passes.base import Run
from compress.profile.passes.capture import Capture
from compress.profile.passes.samples import Read, SamplePass
from compress.profile.passes.tiles import LayerTensors, Workspace, tiles
from compress.profile.statistic import Item, Reads
from compress.profile.sums import Sheet
from compress.runtime.impl import current

if TYPE_CHECKING:
    from compress.profile.heads.base import HeadStatistic


class AttentionPass(SamplePass):
    """Feeds statistics of head groups layer by layer; backwards where any of them needs gradients."""

    reads: ClassVar[Reads] = "attention"

    @contextmanager
    def reader(self, run: Run, statistics: Sequence[HeadStatistic]) -> Iterator[Read]:
        gradient = any(statistic.needs_gradient for statistic in statistics)
        inputs = any(statistic.needs_inputs for statistic in statistics)
        feed = Feed(statistics, Workspace(run.subject.device), run.strip_bytes)
        model, checkpointing = run.subject.model, run.checkpointing
        with Capture(model, feed.layer, gradient=gradient, checkpointing=checkpointing, inputs=inputs) as capture:

            def read(item: Item, sheet: Sheet) -> float | None:
                feed.item, feed.sheet = item, sheet
                return self.run(capture, item, statistics)

            yield read

    def run(self, capture: Capture, item: Item, statistics: Sequence[HeadStatistic]) -> float | None:
        """Pass one sample through the model; its mean loss in nats, None without a backward pass."""
        return capture.run(item.sample)


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
