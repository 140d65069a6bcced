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
from compress.models.stream import LayerByLayer, stream_of
from compress.profile.passes.base import Pass, Run, Samples
from compress.profile.statistic import Item, Results
from compress.profile.sums import Sheet

SAVE_BYTES = 32 << 20  # sums of n times as much are written after every nth sample

# Runs samples and adds to their sheets; the loss of each, None without a backward pass.
Read = Callable[[Sequence[Item], Sequence[Sheet]], list[float | None]]


def one_by_one(read: Callable[[Item, Sheet], None]) -> Read:
    """What runs a sample, for several of them; without losses."""

    def each(items: Sequence[Item], sheets: Sequence[Sheet]) -> list[float | None]:
        for item, sheet in zip(items, sheets, strict=True):
            read(item, sheet)
        return [None] * len(items)

    return each


class SamplePass(Pass):
    """Sums over samples.

    Each process reads one of as many samples as there are processes, or several where they pass a model together that
    is read layer by layer (`models.stream`); their sums are then added in the order of the samples. So the number of
    processes changes no bit (where the processes compute alike), and another number of them may continue what one of
    them wrote. All processes have to read the same folder.
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
                batch = queue[done : done + self._at_once(run, queue[done:], statistics)]
                message = _take(batch, totals, run, statistics, read)
                before, done = done, done + len(batch)
                run.partial.seconds += time.perf_counter() - started
                run.partial.peak = max(run.partial.peak, most_bytes(run.subject.model))
                if done // interval > before // interval and run.processes.main:
                    self._save(run, step, done, totals)
                run.report(done, len(queue), message)
        pairs = [list(zip(total.sums, total.counts, strict=True)) for total in totals]
        results = {
            statistic.registered: statistic.results([pair[number] for pair in pairs], run.subject)
            for number, statistic in enumerate(statistics)
        }
        run.partial.finish(step, results)
        return results

    def _at_once(self, run: Run, queue: Sequence[Item], statistics: Sequence[Any]) -> int:
        """How many samples all processes read before their sums are added."""
        _, world = run.share
        if stream_of(run.subject.model) is None:
            return world
        gradient = any(statistic.needs_gradient for statistic in statistics)
        samples = [item.sample for item in queue[::world]]
        group: int = run.processes.broadcast(LayerByLayer(run.subject.model).group(samples, gradient), 0)
        return world * group

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
    """Read samples in each process, every world-th of them, and add all of them; what to say of the last."""
    processes, message = run.processes, ""
    share, shares = run.share
    own = batch[share::shares]
    sheets = [Sheet(statistics, run.subject, [item.length]) for item in own]
    problems: list[Problem] | None = None
    losses: list[float | None] = []
    try:
        losses = read(own, sheets) if own else []
    except UserError as error:
        if processes.world == 1:
            raise
        problems = error.problems
    if run.sharing is not None:  # before sums are added: none may wait for one that has none
        problems = next((found for found in processes.gather(problems) if found is not None), None)
    if problems is None:
        for item, sheet, loss in zip(own, sheets, losses, strict=True):
            if loss is not None:
                sheet.loss.fill_(loss)
            if run.sharing is not None:
                run.sharing.add([*(total for _, total in sheet.tensors()), sheet.loss])
            sheet.close(item)
    for number, item in enumerate(batch):
        source = number % shares * (processes.world // shares)
        # All processes stop together: none may wait for one that has stopped.
        if (refused := processes.broadcast(problems, source)) is not None:
            raise UserError(refused)
        mine = number % shares == share
        sheet = sheets[number // shares] if mine else Sheet(statistics, run.subject, [item.length])
        processes.spread([*(total for _, total in sheet.tensors()), sheet.loss], source)
        sheet.check_finite(item.where)
        totals[item.corpus].add(sheet, item)
        message = item.where
        if not bool(sheet.loss.isnan()):
            run.partial.losses.append((item.length, float(sheet.loss)))
            message += f", loss {float(sheet.loss):.3f}"
    return message
