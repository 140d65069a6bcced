"""A pass over samples that feeds sums of statistics; in several processes, and continued if stopped."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from compress.errors import Problem, UserError
from compress.models.placement import most_bytes
from compress.profile.passes.base import Pass, Run, Samples
from compress.profile.statistic import Item, Results
from compress.profile.sums import Sheet

SAVE_BYTES = 32 << 20  # sums of n times as much are written after every nth sample

# Runs one sample and adds to the sheet; the loss, None without a backward pass.
Read = Callable[[Item, Sheet], float | None]


class SamplePass(Pass):
    """Sums over samples.

    Each process reads one of as many samples as there are processes; their sums are then added in the order of the
    samples. So the number of processes changes no bit (where the processes compute alike), and another number of them
    may continue what one of them wrote. All processes have to read the same folder.
    """

    corpora: ClassVar[int] = 1

    @abstractmethod
    def reader(self, run: Run, statistics: Sequence[Any]) -> AbstractContextManager[Read]:
        """A context in which the model is read sample by sample."""

    def measure(self, run: Run, statistics: Sequence[Any]) -> dict[str, Results]:
        step = self.reads if not run.round else f"{self.reads}-{run.round}"
        corpora = run.corpora[: self.corpora]
        queue = queue_of(*corpora)
        if step in run.partial.done:
            run.report(len(queue), len(queue), "continuing")
            return run.partial.done[step]
        lengths = sorted({item.length for item in queue})
        totals = [Sheet(statistics, run.subject, lengths) for _ in corpora]
        done = 0
        state = run.partial.state(step)
        if state is not None:
            notes, tensors = state
            done = notes["done"]
            for number, total in enumerate(totals):
                start = f"{number}/"
                held = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
                total.restore(held, notes["counts"][number])
        run.processes.wait()
        run.report(done, len(queue), "continuing" if done else "starting")
        interval = max(1, math.ceil(sum(total.size() for total in totals) / SAVE_BYTES))
        with self.reader(run, statistics) as read:
            while done < len(queue):
                started = time.perf_counter()
                batch = queue[done : done + run.processes.world]
                message = _take(batch, totals, run, statistics, read)
                before, done = done, done + len(batch)
                run.partial.seconds += time.perf_counter() - started
                run.partial.peak = max(run.partial.peak, most_bytes(run.subject.model))
                if done // interval > before // interval and run.processes.main:
                    self._save(run, step, done, totals)
                run.report(done, len(queue), message)
        pairs = [list(zip(total.sums, total.counts, strict=True)) for total in totals]
        results = {
            statistic.name: statistic.results([pair[number] for pair in pairs], run.subject)
            for number, statistic in enumerate(statistics)
        }
        run.partial.finish(step, results)
        return results

    def _save(self, run: Run, step: str, done: int, totals: Sequence[Sheet]) -> None:
        tensors = {
            f"{number}/{name}": tensor for number, total in enumerate(totals) for name, tensor in total.state().items()
        }
        run.partial.save(step, {"done": done, "counts": [total.counts for total in totals]}, tensors)


def queue_of(*corpora: Samples) -> list[Item]:
    """All samples, corpus after corpus, by length."""
    behind = ("", ", second corpus")
    return [
        Item(sample, length, corpus, f"{sample.noun} {number + 1} of {length} {sample.unit}{behind[corpus]}")
        for corpus, samples in enumerate(corpora)
        for length in sorted(samples)
        for number, sample in enumerate(samples[length])
    ]


def _take(batch: Sequence[Item], totals: Sequence[Sheet], run: Run, statistics: Sequence[Any], read: Read) -> str:
    """Read one sample in each process and add all of them; what to say of it."""
    processes, message = run.processes, ""
    mine = Sheet(statistics, run.subject, [batch[min(processes.rank, len(batch) - 1)].length])
    problems: list[Problem] | None = None
    if processes.rank < len(batch):
        try:
            loss = read(batch[processes.rank], mine)
        except UserError as error:
            if processes.world == 1:
                raise
            problems = error.problems
        else:
            if loss is not None:
                mine.loss.fill_(loss)
            mine.close(batch[processes.rank])
    for source, item in enumerate(batch):
        # All processes stop together: none may wait for one that has stopped.
        if (refused := processes.broadcast(problems, source)) is not None:
            raise UserError(refused)
        sheet = mine if source == processes.rank else Sheet(statistics, run.subject, [item.length])
        processes.spread([*(total for _, total in sheet.tensors()), sheet.loss], source)
        sheet.check_finite(item.where)
        totals[item.corpus].add(sheet, item)
        message = item.where
        if not bool(sheet.loss.isnan()):
            run.partial.losses.append((item.length, float(sheet.loss)))
            message += f", loss {float(sheet.loss):.3f}"
    return message
