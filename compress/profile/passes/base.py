"""What a pass is: one way to read a model for all statistics that declare it, interrupted at any time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress.models.context.dense import SharedSample
from compress.models.context.layout import Layout
from compress.models.context.processes import Sharing
from compress.models.processes import Processes
from compress.profile.partial import Partial
from compress.profile.statistic import Progress, Reads, Results, Statistic, Subject

if TYPE_CHECKING:
    from compress.data.sample import Sample

Samples = Mapping[int, Sequence["Sample"]]


@dataclass(frozen=True)
class Work:
    """What a pass does with every document, for an estimate of the time.

    Attributes:
        forward: forward passes.
        backward: whether it runs backwards to the activations.
        weights: whether it runs backwards to the weights, too.
        alternatives: targets under which the attention of all head groups is computed again.
        tables: whether numbers are taken of every query and key.
        columns: whether sums over the columns of projections are taken.
        corpora: of how many corpora the documents are read, where there are so many.
        trained: samples that it is trained on, one after another, in place of the documents; None where these are read.
    """

    forward: int = 0
    backward: bool = False
    weights: bool = False
    alternatives: int = 0
    tables: bool = False
    columns: bool = False
    corpora: int = 1
    trained: int | None = None


@dataclass(frozen=True)
class Run:
    """What all passes of one run share.

    Attributes:
        corpora: samples by length in tokens, of the corpus and, where there is one, of the second one.
        training: samples of the statistics that train.
        checkpointing: recompute layers in the backward pass; None decides from the free memory.
        strip_bytes: see `tiles.tiles`.
        round: 0, or 1 for the statistics that read what others measured in the passes before.
        sharing: the processes that share each sample with this one; None where each reads whole ones.
    """

    subject: Subject
    corpora: tuple[Samples, ...]
    training: Samples
    seed: int
    processes: Processes
    partial: Partial
    report: Progress
    checkpointing: bool | None
    strip_bytes: int | None
    round: int = 0
    sharing: Sharing | None = None

    def taken(self, sample: Sample) -> Any:
        """What of a sample this process passes through the model: all, or its part (`SharedSample`)."""
        if self.sharing is None:
            return sample
        multiple = Layout.multiple(self.sharing.world)
        return SharedSample(sample, self.sharing.part(-(-sample.length // multiple) * multiple))

    @property
    def share(self) -> tuple[int, int]:
        """Which of the samples that are read at once this process reads, and how many these are."""
        together = 1 if self.sharing is None else self.sharing.world
        return self.processes.rank // together, self.processes.world // together


class Pass(ABC):
    """Base of the passes.

    Attributes:
        reads: what statistics declare to be taken in it.
        streams: whether it takes a model that is read layer by layer (`models.stream`).
    """

    reads: ClassVar[Reads]
    streams: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def work(cls, statistics: Sequence[Statistic], alternatives: int) -> Work:
        """What it does for statistics that declare it.

        Args:
            alternatives: what these compute again (`Statistic.alternatives`), all together.
        """

    @abstractmethod
    def measure(self, run: Run, statistics: Sequence[Statistic]) -> dict[str, Results]:
        """The results of statistics that declare this pass, by name, the same in every process.

        What an earlier, interrupted run left in `run.partial` is continued, to the same bits.

        Raises:
            UserError: a model that is not understood, or numbers that are not finite.
        """
