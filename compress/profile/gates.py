"""DuoAttention's gates (arXiv 2410.10819): a trained number a head group, how much it needs full attention.

Gates saturate (of the published ones 81 to 95% of key/value heads are at 0.5 or more), so the `heads` solver reports
how far apart the two sides of its cut are. `train.gates` trains them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from compress.data.document import Document
from compress.errors import UserError
from compress.limits import FACTOR, LONGEST, STEPS
from compress.partial import read_partial, write_partial
from compress.profile.statistic import Accumulator, Reads, Statistic, per_length
from compress.profile.tiles import Tile
from compress.registry import statistics
from compress.runtime.span import Span
from compress.train.gates import train_gates
from compress.train.schedule import Schedule

if TYPE_CHECKING:
    from compress.models.load import LoadedModel
    from compress.models.shape import ModelShape

UNIT = "gate, 0 streaming to 1 full"


@statistics.register("gates")
class Gates(Statistic):
    """Trained gate of every head group between full and streaming attention (trains; needs a backward pass a step)."""

    sink: int = Field(64, ge=0, le=LONGEST, description="tokens at the start that streaming attention sees")
    recent: int = Field(256, ge=1, le=LONGEST, description="tokens of streaming attention's window")
    task: str | None = Field("passkeys", description="task of the documents that are trained on; null takes all")
    steps: int = Field(2000, ge=1, le=STEPS, description="documents trained on, one a step")
    rate: float = Field(
        0.02, gt=0, le=FACTOR, description="learning rate of AdamW; warm-up and decay take a fifth each"
    )
    penalty: float = Field(0.05, ge=0, le=FACTOR, description="weight of the mean gate beside the squared difference")

    needs_gradient: ClassVar[bool] = False
    reads: ClassVar[Reads] = "training"
    unit: ClassVar[str] = UNIT
    gives: ClassVar[Mapping[str, str]] = {"gates": "groups"}

    def begin(self, shape: ModelShape, lengths: Sequence[int], device: torch.device | str = "cpu") -> GatesAccumulator:
        """`gates.<longest length>` (layer, group); 1 in layers that slide by themselves."""
        return GatesAccumulator(per_length(shape, [max(lengths)], {"gates": UNIT}), device)

    def learn(
        self,
        loaded: LoadedModel,
        shape: ModelShape,
        documents: Mapping[int, Sequence[Document]],
        accumulator: Accumulator,
        folder: Path,
        key: str,
        seed: int,
        progress: Callable[[int, int, str], None],
    ) -> None:
        """Train on the task's documents, in random order; `gates.partial` in the folder continues an interrupted run.

        Raises:
            UserError: there are no documents of the task, or the loss is not finite.
        """
        queue = [document for _, group in sorted(documents.items()) for document in group]
        chosen = [document for document in queue if self.task in (None, document.task)]
        if not chosen:
            raise UserError(
                f"the gates have no documents of task `{self.task}` to train on",
                where="calibration.training",
                expected=f"`- {{task: {self.task}, ...}}`",
                found=", ".join(sorted({document.task for document in queue})),
                fix="add such documents, or set the statistic's `task` to null to train on all",
            )
        store = _File(folder / "gates.partial", key)
        span, schedule = Span(self.sink, self.recent, 0.0), Schedule.trapezoid(self.rate, self.steps)
        gates = train_gates(loaded.model, shape, chosen, span, schedule, self.penalty, store, seed, progress)
        store.path.unlink(missing_ok=True)
        for name, total in accumulator.sums.items():
            total.copy_(gates)
            accumulator.counts[name] = 1


class GatesAccumulator(Accumulator):
    """Holds the trained gates; tiles and documents of the common pass say nothing about them."""

    def add(self, tile: Tile) -> None:
        """Nothing."""

    def counted(self) -> list[str]:
        """No document counts."""
        return []


@dataclass(frozen=True)
class _File:
    """The state of an interrupted training in one file."""

    path: Path
    key: str

    def read(self) -> tuple[int, dict[str, torch.Tensor]] | None:
        """See `Store.read`."""
        content = read_partial(self.path, self.key)
        return None if content is None else (int(content[0]["step"]), content[1])

    def write(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """See `Store.write`."""
        write_partial(self.path, self.key, {"step": step}, tensors)
