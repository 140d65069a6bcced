"""Takes all statistics of a profile, pass by pass; continues after an interruption, never repeats itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compress.errors import Problem, UserError
from compress.files import digest_of
from compress.models.context.layout import Layout
from compress.models.context.processes import Sharing, check_processes
from compress.models.load import LoadedModel
from compress.models.placement import input_device, placement_of
from compress.models.prepared import prepared_for
from compress.models.processes import find_processes
from compress.models.stream import refuse_streamed
from compress.plan import ModelShape
from compress.profile.checks import check_second, check_shared, grid_of
from compress.profile.key import Key
from compress.profile.partial import Partial
from compress.profile.passes import PASSES, Run
from compress.profile.passes.base import Samples
from compress.profile.passes.samples import queue_of
from compress.profile.statistic import Progress, Results, Statistic, Subject
from compress.profile.store import (
    HEADER,
    Profile,
    ProfileHeader,
    StatisticEntry,
    TensorEntry,
    read_profile,
    write_profile,
)
from compress.runtime.rope import rope_change
from compress.versions import versions


def run_profile(
    loaded: LoadedModel,
    documents: Samples,
    statistics: Sequence[Statistic],
    folder: str | Path,
    *,
    seed: int,
    training: Samples | None = None,
    second: Samples | None = None,
    progress: Progress | None = None,
    checkpointing: bool | None = None,
    strip_bytes: int | None = None,
    known: Mapping[Key, torch.Tensor] | None = None,
    context: int = 1,
) -> Profile:
    """Profile a model and write `profile.json` and `statistics.safetensors`.

    Meanwhile the sums so far are written to `profile.partial`; a later call with the same model, statistics and
    samples continues there and gives the same bits. A finished profile of the same run is read and returned.

    Under `torchrun` every process calls this with the same arguments and one folder that all of them see. The
    samples are dealt out; only the main process writes, and all return the same profile.

    Args:
        loaded: the model.
        documents: length in tokens -> samples of that length or shorter.
        statistics: at least one, no two of one name.
        folder: where the profile lies; made if need be.
        seed: noted in the profile; only statistics that train have anything random.
        training: samples of the statistics that train; none takes `documents`.
        second: samples of another corpus, for importance statistics beside `documents`.
        progress: called with (samples done, samples in all, message), first before any sample.
        checkpointing: recompute layers in the backward pass; None decides from the free memory.
        strip_bytes: see `tiles`.
        known: what another profile of the model has, for statistics that read it.
        context: processes that share each sample; the others share the samples as ever.

    Raises:
        UserError: unsuitable documents or statistics, numbers that are not finite, or a disk that is full.
    """
    folder = Path(folder)
    training = training if training and any(training.values()) else documents
    second = second if second and any(second.values()) else None
    for group in (documents, training, *([second] if second else [])):
        check_inputs(group, statistics)
    if second is not None:
        check_second(statistics)
    longest = max(length for group in (documents, second or {}) for length, samples in group.items() if samples)
    check_context(loaded.model, statistics, context, longest)
    grid = grid_of(statistics)
    lengths = [length for length in documents if documents[length]]
    statistics = [statistic.resolved(loaded.shape, lengths) for statistic in statistics]
    subject = Subject(loaded, loaded.shape, input_device(loaded.model), known or {})
    trains = any(statistic.reads == "training" for statistic in statistics)
    key = run_key(
        subject.shape,
        loaded.model.get_input_embeddings().weight.dtype,
        documents,
        statistics,
        training=training if trains else None,
        seed=seed if trains else None,
        second=second,
        learnt=[
            option.record.sha256 for statistic in statistics for option in statistic.learnt(prepared_for(loaded.model))
        ],
        known=_read(known or {}, statistics),
    )
    processes = find_processes(subject.device)
    check_processes(context, processes.world, "profile.context")
    sharing = Sharing.join(context) if context > 1 else None
    finished = _finished(folder, key, subject.shape)
    partial = Partial(folder, key, writes=processes.main)
    # Otherwise one process may already write what another one looks for.
    processes.wait()
    if finished is not None:
        partial.remove()  # an interrupt may have come between the profile and this
        return finished
    for device in placement_of(loaded.model).devices:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
    corpora = (documents, second) if second else (documents,)
    report = progress or (lambda *_: None)
    run = Run(subject, corpora, training, seed, processes, partial, report, checkpointing, strip_bytes, sharing=sharing)
    results = measure_all(run, statistics)
    header = ProfileHeader(
        schema_version=1,
        key=key,
        model=subject.shape,
        fingerprint=subject.shape.fingerprint,
        lengths=tuple(sorted(length for length in documents if documents[length])),
        documents={length: len(group) for length, group in sorted(documents.items()) if group},
        second={length: len(group) for length, group in sorted((second or {}).items()) if group},
        statistics={statistic.registered: _entry(statistic, results[statistic.registered]) for statistic in statistics},
        grid=grid,
        loss=_mean_losses(partial.losses),
        peak_memory_bytes=partial.peak,
        seconds=partial.seconds,
        seed=seed,
        versions=versions(),
        sha256="",
    )
    if processes.main:
        tensors = {key: result.values for tensors in results.values() for key, result in tensors.items()}
        write_profile(folder, header, tensors)
        partial.remove()
    processes.wait()
    return read_profile(folder, subject.shape)


def measure_all(run: Run, statistics: Sequence[Statistic]) -> dict[str, Results]:
    """The results of all statistics by name, pass after pass; last those that read what others have measured."""
    results: dict[str, Results] = {}
    names = {statistic.registered for statistic in statistics}
    later = [one for one in statistics if names & {Key.parse(name).statistic for name in one.follows}]
    for number, of_round in enumerate(([one for one in statistics if one not in later], later)):
        known = dict(run.subject.known)
        known |= {key: result.values for tensors in results.values() for key, result in tensors.items()}
        taken = replace(run, subject=replace(run.subject, known=known), round=number)
        for kind in PASSES:
            chosen = [statistic for statistic in of_round if statistic.reads == kind.reads]
            if chosen:
                if not kind.streams:
                    what = ", ".join(f"`{statistic.registered}`" for statistic in chosen)
                    fix = "leave it out, or profile the whole model"
                    refuse_streamed(run.subject.model, what, "profile.statistics", fix)
                results |= kind().measure(taken, chosen)
    return results


def check_inputs(documents: Samples, statistics: Sequence[Statistic]) -> None:
    """Refuse what cannot be profiled, all problems at once.

    Raises:
        UserError: no statistic or one twice; no sample, one too long, or one with nothing to predict.
    """
    problems = []
    names = [statistic.registered for statistic in statistics]
    if not names or len(set(names)) != len(names):
        problems.append(Problem("statistics: expected at least one, each once", found=", ".join(names) or "none"))
    if not any(documents.values()):
        problems.append(Problem("there are no documents to profile", fix="add `documents:` to the recipe"))
    for item in queue_of(documents):
        sample, (first, end) = item.sample, item.sample.rows
        if sample.length > item.length:
            expected, actual = f"at most {item.length} {sample.unit}", f"{sample.length} {sample.unit}"
            problems.append(Problem("the sample is longer than its length says", item.where, expected, actual))
        if not 0 <= first < end <= sample.length:
            problems.append(
                Problem(
                    "the sample predicts nothing",
                    item.where,
                    f"outputs in 0 to {sample.length}",
                    f"[{first}, {end})",
                )
            )
        if any(not 0 <= low < high <= sample.length for low, high in sample.evidence):
            problems.append(Problem("the evidence lies outside the sample", item.where, found=str(sample.evidence)))
    if problems:
        raise UserError(problems)


def check_context(model: Any, statistics: Sequence[Statistic], context: int, longest: int = 0) -> None:
    """Refuse what cannot be measured where processes share samples.

    Args:
        longest: tokens of the longest sample.

    Raises:
        UserError: statistics that need whole samples in a process, a model that is read layer by layer, or one whose
            RoPE depends on the length of its input.
    """
    if context == 1:
        return
    refuse_streamed(model, "a sample that processes share", "profile.context", "leave one of the two out")
    change, multiple = rope_change(model.config), Layout.multiple(context)
    if change is not None and -(-longest // multiple) * multiple > change[1]:  # with the padding that is behind them
        most = change[1] // multiple * multiple
        raise UserError(
            f"the model's position frequencies ({change[0]}) depend on the length of the input",
            where="profile.context",
            expected=f"samples of at most {most} tokens, up to which those of all processes are the same",
            found=f"{longest} tokens",
            fix="set `profile.context` to 1",
        )
    check_shared(statistics)


def run_key(
    shape: ModelShape,
    dtype: torch.dtype,
    documents: Samples,
    statistics: Sequence[Statistic],
    training: Samples | None = None,
    seed: int | None = None,
    second: Samples | None = None,
    learnt: Sequence[str] = (),
    known: Sequence[str] = (),
) -> str:
    """Hash of everything the numbers depend on: model, dtype, statistics with parameters, documents, what
    statistics that train learn from, a second corpus, the tensors of prepared targets, and of another profile."""
    facts = {
        "schema": 1,
        "fingerprint": shape.fingerprint,
        "dtype": str(dtype),
        "statistics": [[statistic.registered, statistic.parameters()] for statistic in statistics],
        "documents": _facts(documents),
    }
    if training:
        facts |= {"training": _facts(training), "seed": seed}
    if second and any(second.values()):
        facts |= {"second": _facts(second)}
    if learnt:
        facts |= {"prepared": list(learnt)}
    if known:
        facts |= {"known": list(known)}
    return digest_of(facts)


def _read(known: Mapping[Key, torch.Tensor], statistics: Sequence[Statistic]) -> list[str]:
    """Names and contents of what statistics read of another profile."""
    read = {Key.parse(name).statistic for statistic in statistics for name in statistic.follows}
    tensors = {str(key): tensor for key, tensor in known.items() if key.statistic in read}
    return [f"{name} {digest_of(tensor.tolist())}" for name, tensor in sorted(tensors.items())]


def _facts(documents: Samples) -> list[Any]:
    return [
        [length, [[*sample.facts, sample.evidence] for sample in documents[length]]] for length in sorted(documents)
    ]


def _finished(folder: Path, key: str, shape: ModelShape) -> Profile | None:
    """The finished profile of this very run. Another run's profile is replaced; a damaged one is refused."""
    if not (folder / HEADER).exists():
        return None
    profile = read_profile(folder)
    return profile if profile.header.key == key and not shape.differing(profile.header.model.model_dump()) else None


def _mean_losses(losses: Sequence[tuple[int, float]]) -> dict[int, float]:
    """Mean loss of each length, nats per answer token; empty when no backward pass ran."""
    by_length: dict[int, list[float]] = {}
    for length, loss in losses:
        by_length.setdefault(length, []).append(loss)
    return {length: sum(values) / len(values) for length, values in by_length.items()}


def _entry(statistic: Statistic, results: Results) -> StatisticEntry:
    """The declaration of a statistic and of its results."""
    return StatisticEntry(
        parameters=statistic.parameters(),
        unit=statistic.unit,
        tensors={
            str(key): TensorEntry(shape=tuple(result.values.shape), axes=result.axes, unit=result.unit)
            for key, result in results.items()
        },
    )
