"""What a window costs a head group on tokens that can be looked up in their context, to first order.

Most of what windows and linear heads lose to attention lies in few tokens: those that end a pair which stood in the
context before, and which the weights do not know (associative recall, AR; Zoology, arXiv 2312.04927). The mean loss
hides them, and answers are few. So the loss of this pass is that of all such tokens of a document, and what the group's
window changes is priced as `effect` does it, with the gradient of that loss. Groups where it is high are worth their
full attention.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, PrivateAttr

from compress.data.repeats import Pair
from compress.limits import LONGEST
from compress.profile.heads.base import HeadStatistic, Table
from compress.profile.heads.effect import effects_of
from compress.profile.passes.tiles import LayerTensors
from compress.profile.statistic import Item, Reads, Sums
from compress.registry import statistics
from compress.targets.window import WindowGroup

if TYPE_CHECKING:
    from compress.data.sample import Sample
    from compress.plan import ModelShape


@statistics.register("ar_loss")
class ArLoss(HeadStatistic):
    """Loss that a window costs on tokens that end a rare pair again, to first order (needs a backward pass)."""

    sink: int = Field(64, ge=0, le=LONGEST, description="tokens at the start that stay visible")
    window: int = Field(256, ge=1, le=LONGEST, description="tokens of the window")
    rare: int = Field(
        8,
        ge=1,
        le=LONGEST,
        description="how often a pair of tokens may have been seen, in the document so far and in all others together, "
        "to count as rare",
    )

    reads: ClassVar[Reads] = "repeats"
    needs_gradient: ClassVar[bool] = True
    tiled: ClassVar[bool] = False
    unit: ClassVar[str] = "change of the mean cross-entropy of these tokens, nats"
    gives: ClassVar[Mapping[str, str]] = {"ar_loss": "groups", "ar_loss.signed": "groups"}

    _pairs: Counter[Pair] = PrivateAttr(Counter())

    def alternatives(self, shape: ModelShape, lengths: Sequence[int]) -> int:
        """The window."""
        return 1

    def know(self, samples: Sequence[Sample]) -> None:
        """Take all samples, whose texts say which pairs are rare."""
        self._pairs = Counter()
        for sample in samples:
            self._pairs.update(sample.pairs())

    def looked_up(self, sample: Sample) -> Sample | None:
        """A sample with the loss on its tokens that can be looked up; None where there are none."""
        elsewhere = {pair: self._pairs[pair] - count for pair, count in sample.pairs().items()}
        return sample.repeats(elsewhere, self.rare)

    def tables(self, shape: ModelShape, length: int) -> dict[str, Table]:
        """(layer, group), means over the samples that have such tokens: the part without a name sums the sizes of what
        rows lose or gain, `signed` lets them make up for each other. 0 in layers that slide by themselves.
        """
        return {"": Table(self.unit), "signed": Table(self.unit)}

    def counted(self, item: Item) -> list[str] | None:
        return [] if self.looked_up(item.sample) is None else None

    def add_layer(self, sums: Sums, layer: LayerTensors, item: Item) -> None:
        window = WindowGroup(sink=self.sink, alpha=self.window, beta=0.0)
        alternatives = {0: [window] * layer.key.shape[0]} if layer.window is None else {}
        for _, signed, absolute in effects_of(layer, alternatives):
            sums["signed"][layer.layer] += signed
            sums[""][layer.layer] += absolute
