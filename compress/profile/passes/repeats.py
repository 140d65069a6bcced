"""The pass over attention with the loss on tokens that can be looked up in their context, not on answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from compress.profile.passes.attention import AttentionPass
from compress.profile.passes.base import Run, Work
from compress.profile.passes.samples import Read
from compress.profile.statistic import Item, Reads, Statistic

if TYPE_CHECKING:
    from compress.data.sample import Sample
    from compress.profile.heads.ar_loss import ArLoss


class RepeatsPass(AttentionPass):
    """Feeds statistics of head groups with the gradients of that loss; a sample without such tokens is left out."""

    reads: ClassVar[Reads] = "repeats"
    has_loss: ClassVar[bool] = False

    @classmethod
    def work(cls, statistics: Sequence[Statistic], alternatives: int) -> Work:
        return Work(forward=1, backward=True, alternatives=alternatives)

    @contextmanager
    def reader(self, run: Run, statistics: Sequence[Any]) -> Iterator[Read]:
        for statistic in statistics:
            statistic.know([sample for samples in run.corpora[0].values() for sample in samples])
        with super().reader(run, statistics) as read:
            yield read

    def sample_of(self, item: Item, statistics: Sequence[ArLoss]) -> Sample | None:  # type: ignore[override]
        """The sample with its loss on what can be looked up in it."""
        (sample,) = {statistic.looked_up(item.sample) for statistic in statistics}
        return sample
