"""DuoAttention's gates (arXiv 2410.10819): a trained number a head group, how much it needs full attention.

Gates saturate (of the published ones 81 to 95% of key/value heads are at 0.5 or more), so the `heads` solver reports
how far apart the two sides of its cut are. `train.gates` trains them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

from pydantic import Field

from compress.errors import UserError, nearest
from compress.limits import FACTOR, LONGEST, STEPS
from compress.profile.key import Key
from compress.profile.partial import Step
from compress.profile.passes.base import Samples
from compress.profile.passes.training import TrainedStatistic
from compress.profile.statistic import Progress, Result, Results, Subject
from compress.registry import statistics
from compress.runtime.span import Span
from compress.train.gates import train_gates
from compress.train.schedule import Schedule


@statistics.register("gates")
class Gates(TrainedStatistic):
    """Trained gate of every head group between full and streaming attention (trains; needs a backward pass a step)."""

    sink: int = Field(64, ge=0, le=LONGEST, description="tokens at the start that streaming attention sees")
    recent: int = Field(256, ge=1, le=LONGEST, description="tokens of streaming attention's window")
    task: str | None = Field("passkeys", description="task of the documents that are trained on; null takes all")
    steps: int = Field(2000, ge=1, le=STEPS, description="documents trained on, one a step")
    rate: float = Field(
        0.02, gt=0, le=FACTOR, description="learning rate of AdamW; warm-up and decay take a fifth each"
    )
    penalty: float = Field(0.05, ge=0, le=FACTOR, description="weight of the mean gate beside the squared difference")

    unit: ClassVar[str] = "gate, 0 streaming to 1 full"
    gives: ClassVar[Mapping[str, str]] = {"gates": "groups"}

    @property
    def steps_taken(self) -> int:
        return self.steps

    def check_training(self, tasks: Collection[str]) -> None:
        if self.task is not None and self.task not in tasks:
            raise UserError(
                f"there are no documents of task `{self.task}` to train on",
                where="calibration.training",
                expected=f"`- {{task: {self.task}, ...}}` in `calibration.training`",
                found=", ".join(sorted(tasks)),
                fix=nearest(self.task, tasks) or "add such documents, or set `task` to null to train on all",
            )

    def train(
        self, subject: Subject, samples: Samples, lengths: Sequence[int], step: Step, seed: int, progress: Progress
    ) -> Results:
        """Train on the task's documents, in random order: (layer, group) under the longest length; 1 in layers that
        slide by themselves.

        Raises:
            UserError: there are no documents of the task, or the loss is not finite.
        """
        queue = [document for _, group in sorted(samples.items()) for document in group]
        self.check_training({document.task for document in queue})
        chosen = [document for document in queue if self.task in (None, document.task)]
        span, schedule = Span(self.sink, self.recent, 0.0), Schedule.trapezoid(self.rate, self.steps)
        gates = train_gates(subject.model, subject.shape, chosen, span, schedule, self.penalty, step, seed, progress)
        return {Key(self.registered, length=max(lengths)): Result(gates.float(), ("layer", "group"), self.unit)}
