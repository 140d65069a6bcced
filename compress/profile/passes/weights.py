"""The pass of statistics that need the weights alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

from compress.profile.passes.base import Pass, Run, Work
from compress.profile.statistic import Reads, Results, Statistic


class WeightsPass(Pass):
    """No sample is read."""

    reads: ClassVar[Reads] = "weights"
    streams: ClassVar[bool] = True

    @classmethod
    def work(cls, statistics: Sequence[Statistic], alternatives: int) -> Work:
        return Work()

    def measure(self, run: Run, statistics: Sequence[Any]) -> dict[str, Results]:
        return {
            statistic.registered: statistic.results([(statistic.begin(run.subject, []), Counter())], run.subject)
            for statistic in statistics
        }
