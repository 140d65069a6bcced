"""Takes all statistics of a profile, each kind in one pass; continues after an interruption, never repeats itself."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from compress.data.document import Document
from compress.errors import Problem, UserError
from compress.models.load import LoadedModel
from compress.models.memory import peak_bytes
from compress.models.shape import ModelShape
from compress.partial import read_partial, write_partial
from compress.profile.capture import Capture
from compress.profile.importance import Importance
from compress.profile.measure_importance import PARTIAL as IMPORTANCE_PARTIAL
from compress.profile.measure_importance import measure_importance, queue_of
from compress.profile.processes import Processes, find_processes
from compress.profile.statistic import Accumulator, AnyStatistic, Measure, Statistic, check_finite
from compress.profile.store import (
    HEADER,
    Profile,
    ProfileHeader,
    StatisticEntry,
    TensorEntry,
    read_profile,
    write_profile,
)
from compress.profile.tally import check_corpora
from compress.profile.tiles import LayerTensors, Workspace, tiles
from compress.targets.window import SpanGrid
from compress.versions import versions

PARTIAL = "profile.partial"

Progress = Callable[[int, int, str], None]
Results = dict[str, tuple[dict[str, Measure], dict[str, torch.Tensor]]]


def run_profile(
    loaded: LoadedModel,
    documents: Mapping[int, Sequence[Document]],
    statistics: Sequence[AnyStatistic],
    folder: str | Path,
    *,
    seed: int,
    training: Mapping[int, Sequence[Document]] | None = None,
    second: Mapping[int, Sequence[Document]] | None = None,
    progress: Progress | None = None,
    checkpointing: bool | None = None,
    strip_bytes: int | None = None,
) -> Profile:
    """Profile a model and write `profile.json` and `statistics.safetensors`.

    After each document the sums so far are written to `profile.partial` (`importance.partial` for importance
    statistics); a later call with the same model, statistics and documents continues there and gives the same bits. A
    finished profile of the same run is read and returned.

    Under `torchrun` every process calls this with the same arguments and one folder that all of them see. Documents
    of importance statistics are then dealt out; tiles are read by every process alike. Only the main process writes,
    and all return the same profile.

    Args:
        loaded: the model.
        documents: length in tokens -> documents of that length or shorter, each with an answer.
        statistics: at least one, no two of one name.
        folder: where the profile lies; made if need be.
        seed: noted in the profile; only statistics that train have anything random.
        training: documents of the statistics that train; none takes `documents`.
        second: documents of another corpus, for importance statistics beside `documents`.
        progress: called with (documents done, documents in all, message), first before any document.
        checkpointing: recompute layers in the backward pass; None decides from the free memory.
        strip_bytes: see `tiles`.

    Raises:
        UserError: unsuitable documents or statistics, numbers that are not finite, or a disk that is full.
    """
    folder = Path(folder)
    training = training if training and any(training.values()) else documents
    second = second or {}
    check_inputs(documents, statistics)
    check_inputs(training, statistics)
    if any(second.values()):
        check_inputs(second, statistics)
    check_corpora(statistics, second)
    grid = _grid(statistics)
    model: Any = loaded.model
    shape = loaded.shape
    weight = model.get_input_embeddings().weight
    dtype, device = weight.dtype, weight.device
    training = training if any(statistic.reads == "training" for statistic in statistics) else {}
    key = run_key(shape, dtype, documents, statistics, training, seed if training else None, second)
    processes = find_processes(device)
    finished = _finished(folder, key, shape)
    # Otherwise one process may already write what another one looks for.
    processes.wait()
    if finished is not None:
        if processes.main:
            _drop_partials(folder)  # a kill may have come between the profile and this
        return finished

    report = progress or (lambda *_: None)
    lengths = sorted(length for length in documents if documents[length])
    grouped = [statistic for statistic in statistics if isinstance(statistic, Statistic)]
    weighing = [statistic for statistic in statistics if isinstance(statistic, Importance)]
    accumulators = [(statistic.name, statistic.begin(shape, lengths, device)) for statistic in grouped]
    passing = any(statistic.reads == "tiles" for statistic in statistics)
    queue = [(length, number) for length in lengths for number in range(len(documents[length])) if passing]
    notes = _restore(folder / PARTIAL, key, accumulators)
    processes.wait()
    report(notes.done, len(queue), "continuing" if notes.done else "starting")
    workspace = Workspace(device)

    def consume(layer: LayerTensors) -> None:
        for tile in tiles(layer, workspace, strip_bytes):
            for _, accumulator in accumulators:
                accumulator.add(tile)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    gradient = any(statistic.needs_gradient for statistic in grouped)
    with Capture(model, shape, consume, gradient=gradient, checkpointing=checkpointing) as capture:
        for length, number in queue[notes.done :]:
            started = time.perf_counter()
            document = documents[length][number]
            for _, accumulator in accumulators:
                accumulator.open(length, document)
            loss = capture.run(torch.tensor([document.tokens], device=device), document.answer)
            where = f"document {number + 1} of {length} tokens"
            for name, accumulator in accumulators:
                accumulator.close()
                check_finite(name, accumulator, where)
            notes.done += 1
            notes.seconds += time.perf_counter() - started
            notes.peak = max(notes.peak, peak_bytes(device))
            if loss is not None:
                notes.losses.append(loss)
            _save(folder / PARTIAL, key, accumulators, notes, processes)
            report(notes.done, len(queue), where if loss is None else f"{where}, loss {loss:.3f}")

    results: Results = {}
    if weighing:
        items = queue_of(documents, second)
        tally, seconds = measure_importance(
            model, shape, weighing, items, folder, key, processes, report, checkpointing
        )
        notes.seconds += seconds
        results = {method.name: tally.results(number) for number, method in enumerate(weighing)}
    started = time.perf_counter()
    for statistic, (name, accumulator) in zip(grouped, accumulators, strict=True):
        statistic.learn(loaded, shape, training, accumulator, folder, key, seed, report)
        results[name] = (accumulator.measures, accumulator.result())
    notes.seconds += time.perf_counter() - started
    notes.peak = max(notes.peak, peak_bytes(device))
    entries, tensors = _entries(statistics, results)
    header = ProfileHeader(
        schema_version=1,
        key=key,
        model=shape,
        fingerprint=shape.fingerprint,
        lengths=tuple(lengths),
        documents={length: len(documents[length]) for length in lengths},
        second={length: len(group) for length, group in sorted(second.items()) if group},
        statistics=entries,
        grid=grid,
        loss=_mean_losses(queue, notes.losses),
        peak_memory_bytes=notes.peak,
        seconds=notes.seconds,
        seed=seed,
        versions=versions(),
        sha256="",
    )
    if processes.main:
        write_profile(folder, header, tensors)
        _drop_partials(folder)
    processes.wait()
    return read_profile(folder, shape)


def _drop_partials(folder: Path) -> None:
    for partial in (PARTIAL, IMPORTANCE_PARTIAL):
        (folder / partial).unlink(missing_ok=True)


def check_inputs(documents: Mapping[int, Sequence[Document]], statistics: Sequence[AnyStatistic]) -> None:
    """Refuse what cannot be profiled, all problems at once.

    Raises:
        UserError: no statistic or one twice; no document, one too long, or one without an answer behind a prompt.
    """
    problems = []
    names = [statistic.name for statistic in statistics]
    if not names or len(set(names)) != len(names):
        problems.append(Problem("statistics: expected at least one, each once", found=", ".join(names) or "none"))
    if not any(documents.values()):
        problems.append(Problem("there are no documents to profile", fix="add `documents:` to the recipe"))
    for length, group in sorted(documents.items()):
        for number, document in enumerate(group):
            where = f"document {number + 1} of {length} tokens"
            start, end = document.answer
            if document.length > length:
                problems.append(
                    Problem("longer than its length", where, f"at most {length} tokens", f"{document.length} tokens")
                )
            if not 0 < start < end <= document.length:
                problems.append(
                    Problem(
                        "no answer behind a prompt",
                        where,
                        f"a range in 1 to {document.length}",
                        f"[{start}, {end})",
                    )
                )
            if any(not 0 <= low < high <= document.length for low, high in document.evidence):
                problems.append(Problem("evidence outside the document", where, found=str(document.evidence)))
    if problems:
        raise UserError(problems)


def run_key(
    shape: ModelShape,
    dtype: torch.dtype,
    documents: Mapping[int, Sequence[Document]],
    statistics: Sequence[AnyStatistic],
    training: Mapping[int, Sequence[Document]] | None = None,
    seed: int | None = None,
    second: Mapping[int, Sequence[Document]] | None = None,
) -> str:
    """Hash of everything the numbers depend on: model, dtype, statistics with parameters, documents, what
    statistics that train learn from, and a second corpus."""
    facts = {
        "schema": 1,
        "fingerprint": shape.fingerprint,
        "dtype": str(dtype),
        "statistics": [[statistic.name, statistic.parameters()] for statistic in statistics],
        "documents": _facts(documents),
    }
    if training:
        facts |= {"training": _facts(training), "seed": seed}
    if second and any(second.values()):
        facts |= {"second": _facts(second)}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _facts(documents: Mapping[int, Sequence[Document]]) -> list[Any]:
    return [
        [length, [[document.tokens, document.answer, document.evidence] for document in documents[length]]]
        for length in sorted(documents)
    ]


def _finished(folder: Path, key: str, shape: ModelShape) -> Profile | None:
    """The finished profile of this very run. Another run's profile is replaced; a damaged one is refused."""
    if not (folder / HEADER).exists():
        return None
    profile = read_profile(folder)
    return profile if profile.header.key == key and not shape.differing(profile.header.model.model_dump()) else None


@dataclass
class _Notes:
    """What is kept beside the sums while a run is under way."""

    done: int = 0
    seconds: float = 0.0
    peak: int = 0
    losses: list[float] = field(default_factory=list)


def _save(
    path: Path, key: str, accumulators: Sequence[tuple[str, Accumulator]], notes: _Notes, processes: Processes
) -> None:
    """Write the sums so far, which every process has alike."""
    if not processes.main:
        return
    state = {
        f"{name}/{part}": tensor for name, accumulator in accumulators for part, tensor in accumulator.state().items()
    }
    write_partial(path, key, asdict(notes), state)


def _restore(path: Path, key: str, accumulators: Sequence[tuple[str, Accumulator]]) -> _Notes:
    """Continue from a partial file; with one that is damaged or of another run everything starts anew."""
    found = read_partial(path, key)
    if found is None:
        return _Notes()
    notes, state = found
    for name, accumulator in accumulators:
        start = f"{name}/"
        accumulator.restore(
            {part.removeprefix(start): value for part, value in state.items() if part.startswith(start)}
        )
    return _Notes(**notes)


def _mean_losses(queue: Sequence[tuple[int, int]], losses: Sequence[float]) -> dict[int, float]:
    """Mean loss of each length, nats per answer token; empty when no backward pass ran."""
    by_length: dict[int, list[float]] = {}
    for (length, _), loss in zip(queue, losses, strict=False):
        by_length.setdefault(length, []).append(loss)
    return {length: sum(values) / len(values) for length, values in by_length.items()}


def _entries(
    statistics: Sequence[AnyStatistic], results: Results
) -> tuple[dict[str, StatisticEntry], dict[str, torch.Tensor]]:
    """Declarations of all results, and the results."""
    entries, tensors = {}, {}
    for statistic in statistics:
        measures, values = results[statistic.name]
        entries[statistic.name] = StatisticEntry(
            parameters=statistic.parameters(),
            unit=statistic.unit,
            tensors={
                key: TensorEntry(shape=measures[key].shape, axes=measures[key].axes, unit=measures[key].unit)
                for key in values
            },
        )
        tensors.update(values)
    return entries, tensors


def _grid(statistics: Sequence[AnyStatistic]) -> SpanGrid | None:
    """The span grid of the statistics that have one.

    Raises:
        UserError: two statistics price different grids, so that no search could use both.
    """
    grids = {statistic.name: statistic.grid for statistic in statistics if hasattr(statistic, "grid")}
    if len(set(grids.values())) > 1:
        raise UserError(
            "the statistics price different span grids",
            where="profile.statistics",
            expected="one grid",
            found="; ".join(f"{name}: {grid!r}" for name, grid in grids.items()),
            fix="give every statistic the same `grid`, or leave it out everywhere",
        )
    return next(iter(grids.values()), None)
