"""Measures several variants of one model on the same items, one in memory at a time, and keeps what is done."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress.data.reader import Loaded, Progress, Reader
from compress.data.text import EmbeddedText, Source
from compress.errors import UserError
from compress.evaluate.comparison import Comparison, VariantResult
from compress.evaluate.device import device_name
from compress.evaluate.measure import Job, Measure, Result, Setting, Step, Subject, Variant, texts_of
from compress.evaluate.names import file_part
from compress.files import key_of, write_text
from compress.json_file import read_sealed, sealed
from compress.models.placement import input_device
from compress.models.processes import Processes
from compress.registry import measures
from compress.versions import versions

SCHEMA = 1  # of the kept measurements
ALONE = Processes()


def compare(
    loaded: Loaded,
    variants: Sequence[Variant],
    asked: Sequence[Measure],
    *,
    text: Source | None = None,
    seed: int,
    cache_dir: Path,
    batch_size: int = 1,
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> Comparison:
    """What each measure finds on every variant, on the same windows, prompts and items.

    Windows and prompts are of the evaluation part of the text.

    Each measurement of each variant is a file in `cache_dir`, named after all that it depends on; what is there is
    not measured again.

    Args:
        loaded: the dense model, whose tokenizer, context, precision and device hold for all variants.
        variants: the dense one first, named `dense`.
        asked: the measures; those that every evaluation has are added where they are left out.
        text: where haystacks come from if no measure names a text for them; the embedded one by default.
        progress: called with (steps done, steps in all, what), a step being a window or a prompt of one variant.
        processes: the others call `share` with the same arguments and one `cache_dir`.

    Raises:
        UserError: a measure fits neither the model's context nor the text; nothing has been measured then.
        ValueError: the first variant is not `dense`, or two have one name.
    """
    work = _Work.of(loaded, variants, asked, text, seed, cache_dir, batch_size, progress)
    if processes.world > 1:
        work.share(processes)
    rows = []
    for variant in variants:
        bench = work.bench(variant)
        results = [bench.result(measure, job) for measure, job in work.jobs]
        rows.append(VariantResult(name=variant.name, results=results, seconds=round(bench.seconds, 2)))
    packages = dict.fromkeys(name for measure in work.asked for name in measure.packages())
    reads = [reading for measure in work.asked for reading in measure.readings(seed)]
    return Comparison(
        model=loaded.name,
        fingerprint=work.facts[1],
        dtype=work.facts[2],
        device=device_name(input_device(loaded.model)),
        seed=seed,
        batch_size=batch_size,
        asked=[{"measure": measure.registered} | measure.model_dump(mode="json") for measure in work.asked],
        text=work.setting.text.model_dump(mode="json") if any(reading.source is None for reading in reads) else None,
        versions={"python": platform.python_version(), **versions(*packages)},
        variants=rows,
    )


def share(
    loaded: Loaded,
    variants: Sequence[Variant],
    asked: Sequence[Measure],
    *,
    text: Source | None = None,
    seed: int,
    cache_dir: Path,
    batch_size: int = 1,
    progress: Progress | None = None,
    processes: Processes,
) -> None:
    """What all processes but the main one do of a `compare`, whose arguments these are: a share of its measurements.

    Each is made as one process would make it, and lies in `cache_dir` afterwards.
    """
    _Work.of(loaded, variants, asked, text, seed, cache_dir, batch_size, progress).share(processes)


@dataclass(frozen=True)
class _Work:
    """All that is to be measured in one comparison.

    Attributes:
        facts: what every measurement depends on: the schema, the model's fingerprint, its dtype and kind of device.
    """

    loaded: Loaded
    variants: Sequence[Variant]
    asked: list[Measure]
    setting: Setting
    jobs: list[tuple[Measure, Job]]
    facts: list[Any]
    folder: Path
    meter: _Meter

    @staticmethod
    def of(
        loaded: Loaded,
        variants: Sequence[Variant],
        asked: Sequence[Measure],
        text: Source | None,
        seed: int,
        cache_dir: Path,
        batch_size: int,
        progress: Progress | None,
    ) -> _Work:
        """The work of `compare`, with its arguments; raises as it does."""
        names = [variant.name for variant in variants]
        if not names or names[0] != "dense" or len(set(names)) != len(names):
            raise ValueError(f"expected different variants with `dense` first, got {names}")
        asked = sorted([*_always(asked), *asked], key=lambda measure: not measure.always)
        shared = sorted({measure.registered for measure in asked if measure.one_tokenizer})
        if shared and any(variant.tokenizer for variant in variants):
            raise UserError(
                f"models with different tokenizers cannot be compared by {', '.join(shared)}",
                fix="compare these models on lm-eval tasks and suites only",
            )
        lengths = tuple(sorted({length for measure in asked for length in measure.input_lengths}))
        reader = Reader(loaded, seed, cache_dir, progress)
        costs = [variant.cost for variant in variants if variant.cost is not None]
        varies = bool(lengths) and any(cost(lengths[-1]).varies for cost in costs)
        setting = Setting(reader, texts_of(asked, text or EmbeddedText()), seed, batch_size, lengths, varies)
        for measure in asked:
            measure.check(setting.context)
        jobs = [(measure, job) for measure in asked for job in measure.jobs(setting)]
        dtype = str(next(loaded.model.parameters()).dtype).removeprefix("torch.")
        facts = [SCHEMA, loaded.shape.fingerprint, dtype, input_device(loaded.model).type]
        meter = _Meter(sum(job.steps for _, job in jobs) * len(variants), progress)
        return _Work(loaded, variants, asked, setting, jobs, facts, cache_dir, meter)

    def bench(self, variant: Variant) -> _Bench:
        """What measures one variant."""
        subject = Subject(variant, self.variants[0], self.loaded.model, self.loaded.tokenizer)
        return _Bench(subject, self.folder, [*self.facts, variant.name, variant.key], self.meter)

    def share(self, processes: Processes) -> None:
        """Make this process's share of the measurements that are kept, until all processes have made theirs."""
        place = 0
        for variant in self.variants:
            bench = self.bench(variant)
            for measure, job in self.jobs:
                if job.kept and not job.timed:
                    if place % processes.world == processes.rank:
                        bench.result(measure, job)
                    place += 1
        processes.wait()


def _always(asked: Sequence[Measure]) -> list[Measure]:
    """The measures of every evaluation that nobody asked for by name."""
    return [kind() for _, kind in measures.items() if kind.always and not any(type(item) is kind for item in asked)]


class _Meter:
    """Counts steps over all variants."""

    def __init__(self, total: int, report: Progress | None) -> None:
        self.total, self.report, self.done = total, report, 0

    def within(self, what: str) -> Callable[[int, int], None]:
        """A callback for one measurement that starts at what is done so far."""
        start = self.done

        def step(done: int, _: int) -> None:
            self.done = start + done
            if self.report is not None:
                self.report(self.done, self.total, what)

        return step


class _Bench:
    """One variant: builds its model when first needed, and reads or writes its measurements."""

    def __init__(self, subject: Subject, folder: Path, facts: list[Any], meter: _Meter) -> None:
        self.subject, self.folder, self.facts, self.meter = subject, folder, facts, meter
        self.seconds = 0.0

    def result(self, measure: Measure, job: Job) -> Result:
        """The result of a job, measured or read."""
        step = self.meter.within(f"{self.subject.variant.name}: {job.label}")
        result = self._kept(measure, job, step) if job.kept else job.run(self.subject, step)
        if job.steps:
            step(job.steps, job.steps)
        return result

    def _kept(self, measure: Measure, job: Job, step: Step) -> Result:
        name = file_part(self.subject.variant.name)
        path = self.folder / f"{name}-{job.facts[0]}-{key_of(self.facts, job.facts)}.json"
        try:
            return measure.result.model_validate_json(json.dumps(read_sealed(path)), strict=True)
        except ValidationError:
            started = time.perf_counter()
            result = job.run(self.subject, step)
            self.seconds += time.perf_counter() - started
            write_text(path, sealed(result.model_dump(mode="json")))
            return result
