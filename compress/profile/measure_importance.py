"""One pass over the documents that feeds all importance statistics; in several processes, and continued if stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress.data.sample import TextSample as Document
from compress.models.shape import ModelShape
from compress.models.units import units_of
from compress.partial import read_partial, write_partial
from compress.profile.importance import Importance
from compress.profile.processes import Processes
from compress.profile.projections import Projections
from compress.profile.tally import Sheet, Tally

PARTIAL = "importance.partial"
SAVE_BYTES = 32 << 20  # sums of n times as much are written after every nth document


@dataclass(frozen=True)
class Item:
    """One document of the pass, the corpus it is from, and how it is called in messages."""

    document: Document
    corpus: int
    where: str


def queue_of(*corpora: Mapping[int, Sequence[Document]]) -> list[Item]:
    """All documents, corpus after corpus, by length."""
    return [
        Item(document, corpus, f"document {number + 1} of {length} tokens" + (", second corpus" if corpus else ""))
        for corpus, documents in enumerate(corpora)
        for length in sorted(documents)
        for number, document in enumerate(documents[length])
    ]


def measure_importance(
    model: Any,
    shape: ModelShape,
    statistics: Sequence[Importance],
    queue: Sequence[Item],
    folder: Path,
    key: str,
    processes: Processes,
    progress: Callable[[int, int, str], None],
    checkpointing: bool | None = None,
) -> tuple[Tally, float]:
    """Sums of all statistics over the documents, the same in every process, and the seconds spent.

    Each process reads one of as many documents as there are processes; their sums are then added in the order of the
    documents. So the number of processes changes no bit (where the processes compute alike), and
    `importance.partial`, which the main process writes, may be continued by another number of them. All processes
    have to read the same folder.

    Raises:
        UserError: projections that are not understood, or sums that are not finite.
    """
    units = units_of(model)
    tally = Tally(statistics, units, 1 + max((item.corpus for item in queue), default=0))
    if not any(statistic.reads == "projections" for statistic in statistics):
        return tally, 0.0
    partial = folder / PARTIAL
    done, seconds = _restore(partial, key, tally)
    processes.wait()
    progress(done, len(queue), "continuing" if done else "starting")
    every = max(1, math.ceil(tally.size() / SAVE_BYTES))
    own = Sheet(statistics, units)
    other = Sheet(statistics, units) if processes.world > 1 else own
    gradient = any(statistic.needs_gradient for statistic in statistics)
    taken = own.take_gradient if gradient else None
    with Projections(model, shape, units, own.take_inputs, taken, checkpointing) as projections:
        while done < len(queue):
            started = time.perf_counter()
            batch = queue[done : done + processes.world]
            own.clear()
            if processes.rank < len(batch):
                projections.run(batch[processes.rank].document)
            for source, item in enumerate(batch):
                sheet = own if source == processes.rank else other
                processes.spread((total for _, total in sheet.tensors()), source)
                # Only here, where every process has these sums: none may wait for one that has stopped.
                sheet.check_finite(item.where)
                tally.add(item.corpus, item.document, sheet)
            before, done = done, done + len(batch)
            seconds += time.perf_counter() - started
            if processes.main and done // every > before // every:
                notes = {"done": done, "seconds": seconds, "seen": [asdict(seen) for seen in tally.seen]}
                write_partial(partial, key, notes, tally.state())
            progress(done, len(queue), batch[-1].where)
    return tally, seconds


def _restore(partial: Path, key: str, tally: Tally) -> tuple[int, float]:
    """Documents done and seconds spent, from a partial file; nothing of one that is damaged or of another run."""
    found = read_partial(partial, key)
    if found is None:
        return 0, 0.0
    notes, state = found
    tally.restore(state, notes["seen"])
    return int(notes["done"]), float(notes["seconds"])
