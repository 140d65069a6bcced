"""The pass of statistics that train: each runs the model as it needs, on samples of its own."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from compress.models.placement import most_bytes
from compress.profile.partial import Step
from compress.profile.passes.base import Pass, Run, Samples, Work
from compress.profile.statistic import Progress, Reads, Results, Statistic, Subject


class TrainedStatistic(Statistic):
    """Base of the statistics that train."""

    reads: ClassVar[Reads] = "training"

    @abstractmethod
    def train(
        self, subject: Subject, samples: Samples, lengths: Sequence[int], step: Step, seed: int, progress: Progress
    ) -> Results:
        """Train, and give the tensors, the same in every process.

        Args:
            samples: what to train on, by length in tokens.
            lengths: profiled lengths in tokens.
            step: where the state of an interrupted training is read and written.
            progress: called with (done, in all, message).

        Raises:
            UserError: unsuitable samples, or a loss that is not finite.
        """


class TrainingPass(Pass):
    """One statistic after another."""

    reads: ClassVar[Reads] = "training"

    @classmethod
    def work(cls, statistics: Sequence[Statistic], alternatives: int) -> Work:
        return Work(forward=2, backward=True, trained=sum(statistic.steps_taken for statistic in statistics))

    def measure(self, run: Run, statistics: Sequence[Any]) -> dict[str, Results]:
        lengths = sorted(length for length, samples in run.corpora[0].items() if samples)
        results = {}
        for statistic in statistics:
            step = Step(run.partial, f"{self.reads}/{statistic.registered}")
            if step.name not in run.partial.done:
                started = time.perf_counter()
                trained = statistic.train(run.subject, run.training, lengths, step, run.seed, run.report)
                run.partial.seconds += time.perf_counter() - started
                run.partial.peak = max(run.partial.peak, most_bytes(run.subject.model))
                run.partial.finish(step.name, {statistic.registered: trained})
            results[statistic.registered] = run.partial.done[step.name][statistic.registered]
        return results
