"""Measures several variants of one model on the same items, one in memory at a time, and keeps what is done."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from pydantic import BaseModel, ValidationError

from compress.data.calibration import Loaded, Progress
from compress.data.prompt import Prompt, Task
from compress.data.text import EmbeddedText, TextSource, part_of
from compress.errors import UserError
from compress.evaluate.comparison import Comparison, VariantResult
from compress.evaluate.device import device_name
from compress.evaluate.harness import HarnessRequest, TaskResult, run_task, task_keys
from compress.evaluate.harness import check_request as check_harness
from compress.evaluate.latency import LatencyRequest, LatencyResult, check_latency, latency
from compress.evaluate.names import file_part
from compress.evaluate.perplexity import PerplexityRequest, PerplexityResult, check_request, perplexity
from compress.evaluate.recall import RecallResult, recall
from compress.evaluate.size import SizeResult, size
from compress.files import file_key, key_of, text_key, write_text
from compress.json_file import read_sealed, sealed
from compress.models.vocabulary import check_tokens

SCHEMA = 1  # of the kept measurements
Result = TypeVar("Result", bound=BaseModel)


@dataclass(frozen=True)
class Variant:
    """A model to measure.

    Attributes:
        name: its row in the table: `dense`, `plan`, `uniform`, ...
        build: makes the model; called only when something is not measured yet, and the model is let go afterwards.
        key: what the variant depends on besides the dense model's weights (a hash of its plan), for resuming.
        kv_bytes: bytes of KV cache of one sequence by length.
        tokenizer: makes its tokenizer, where that is not the dense model's; then only lm-eval tasks can be compared.
    """

    name: str
    build: Callable[[], Any]
    key: str = ""
    kv_bytes: dict[int, int] = field(default_factory=dict)
    tokenizer: Callable[[], Any] | None = None


def compare(
    loaded: Loaded,
    variants: Sequence[Variant],
    *,
    perplexity_request: PerplexityRequest | None,
    recall_requests: Sequence[Task],
    recall_text: TextSource | None = None,
    harness_request: HarnessRequest | None = None,
    latency_request: LatencyRequest | None = None,
    seed: int,
    cache_dir: Path,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Comparison:
    """Size, time, perplexity, recall and tasks of every variant, on the same windows, prompts and items.

    Windows and prompts are of the evaluation part of the text.

    Each measurement of each variant is a file in `cache_dir`, named after all that it depends on; what is there is
    not measured again.

    Args:
        loaded: the dense model, whose tokenizer, context, precision and device hold for all variants.
        variants: the dense one first, named `dense`.
        recall_text: where the haystacks come from; by default the perplexity's text, or else the embedded one.
        progress: called with (steps done, steps in all, what), a step being a window or a prompt of one variant.

    Raises:
        UserError: a request fits neither the model's context nor the text; nothing has been measured then.
        ValueError: the first variant is not `dense`, or two have one name.
    """
    names = [variant.name for variant in variants]
    if not names or names[0] != "dense" or len(set(names)) != len(names):
        raise ValueError(f"expected different variants with `dense` first, got {names}")
    if recall_text is None:
        recall_text = EmbeddedText() if perplexity_request is None else perplexity_request.text
    context = getattr(loaded.model.config, "max_position_embeddings", None)
    if harness_request is not None:
        check_harness(harness_request, context)
    if latency_request is not None:
        check_latency(latency_request, context)
    if any(variant.tokenizer for variant in variants) and (perplexity_request is not None or recall_requests):
        raise UserError(
            "perplexity and recall compare models of one tokenizer",
            fix="compare these models on lm-eval tasks and suites only",
        )
    windows: list[int] = []
    if perplexity_request is not None:
        windows = part_of(loaded.tokenizer, perplexity_request.text, "evaluation", perplexity_request.tokens)
        check_request(perplexity_request, len(windows), context)
        check_tokens(windows, loaded.model.config, f"the {perplexity_request.text.source} text of the perplexity")
    asked = _prompts(loaded, recall_requests, recall_text, seed, context)

    parameter = next(loaded.model.parameters())
    dtype, device = str(parameter.dtype).removeprefix("torch."), device_name(parameter.device)
    fingerprint = loaded.shape.fingerprint
    tasks = task_keys(harness_request) if harness_request is not None else []
    steps = (perplexity_request.windows if perplexity_request else 0) + sum(map(len, asked)) + len(tasks)
    steps += latency_request is not None
    meter = _Meter(steps * len(variants), progress)
    rows = []
    for variant in variants:
        facts = [SCHEMA, fingerprint, dtype, parameter.device.type, variant.name, variant.key]
        bench = _Bench(variant, loaded.tokenizer, cache_dir, facts, meter)
        timed = bench.latency(latency_request, loaded.model) if latency_request is not None else None
        measured = bench.perplexity(perplexity_request, windows) if perplexity_request is not None else None
        recalled = [
            bench.recall(task, prompts, batch_size) for task, prompts in zip(recall_requests, asked, strict=True)
        ]
        ran = [bench.task(harness_request, *task, seed, recall_text) for task in tasks if harness_request is not None]
        rows.append(
            VariantResult(
                name=variant.name,
                kv_bytes=variant.kv_bytes,
                size=bench.size(),
                latency=timed,
                perplexity=measured,
                recall=recalled,
                tasks=ran,
                seconds=round(bench.seconds, 2),
            )
        )
    return Comparison(
        model=loaded.name,
        fingerprint=fingerprint,
        dtype=dtype,
        device=device,
        seed=seed,
        batch_size=batch_size,
        perplexity=perplexity_request.model_dump(mode="json") if perplexity_request else None,
        recall=[task.model_dump(mode="json") for task in recall_requests],
        lm_eval=harness_request.model_dump(mode="json") if harness_request else None,
        latency=latency_request.model_dump(mode="json") if latency_request else None,
        text=recall_text.model_dump(mode="json") if recall_requests or harness_request else None,
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        | ({"lm-eval": version("lm_eval")} if tasks else {}),
        variants=rows,
    )


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

    def __init__(self, variant: Variant, tokenizer: Any, folder: Path, facts: list[Any], meter: _Meter) -> None:
        self.variant, self.tokenizer, self.folder, self.facts, self.meter = variant, tokenizer, folder, facts, meter
        self.seconds = 0.0
        self._model: Any = None

    def size(self) -> SizeResult:
        """Parameters, counted or read."""
        return self._kept(["size"], SizeResult, lambda: size(self.model))

    def latency(self, request: LatencyRequest, dense: Any) -> LatencyResult:
        """Times beside the dense model, measured or read; of another machine or torch they are measured again."""
        step = self.meter.within(f"{self.variant.name}: latency")
        machine = [device_name(dense.device), torch.get_num_threads(), torch.__version__]
        facts = ["latency", request.model_dump(mode="json"), machine]
        return self._kept(facts, LatencyResult, lambda: latency(self.model, dense, request), step, 1)

    def perplexity(self, request: PerplexityRequest, text: list[int]) -> PerplexityResult:
        """Perplexity, measured or read."""
        step = self.meter.within(f"{self.variant.name}: perplexity")
        facts = ["perplexity", request.model_dump(mode="json"), text_key(str(text))]
        return self._kept(
            facts, PerplexityResult, lambda: perplexity(self.model, text, request, progress=step), step, request.windows
        )

    def recall(self, task: Task, prompts: list[Prompt], batch_size: int) -> RecallResult:
        """One recall task, measured or read."""
        step = self.meter.within(f"{self.variant.name}: {task.name}")
        tokens = text_key(str([(prompt.tokens, prompt.budget) for prompt in prompts]))
        facts = ["recall", task.model_dump(mode="json"), tokens, batch_size]
        return self._kept(
            facts,
            RecallResult,
            lambda: recall(self.model, self.tokenizer, task, prompts, batch_size=batch_size, progress=step),
            step,
            len(prompts),
        )

    def task(self, request: HarnessRequest, name: str, length: int | None, seed: int, source: TextSource) -> TaskResult:
        """One lm-eval task or suite, measured or read."""
        label = name if length is None else f"{name} at {length}"
        step = self.meter.within(f"{self.variant.name}: {label}")
        text = source.load() if length is not None else ""
        own: dict[str, Any] = {"include": _contents(request), "limit": request.limit, "batch_size": request.batch_size}
        if length is not None:
            own = {"count": request.count, "batch_size": request.batch_size, "text": text_key(text)}
        facts = ["task", name, length, own, seed if length is not None else None, version("lm_eval")]

        def measure() -> TaskResult:
            tokenizer = self.tokenizer if self.variant.tokenizer is None else self.variant.tokenizer()
            return run_task(self.model, tokenizer, request, name, length, seed=seed, text=text, sizer=self.tokenizer)

        return self._kept(facts, TaskResult, measure, step, 1)

    @property
    def model(self) -> Any:
        """The variant's model."""
        if self._model is None:
            self._model = self.variant.build()
        return self._model

    def _kept(
        self,
        facts: list[Any],
        kind: type[Result],
        measure: Callable[[], Result],
        step: Callable[[int, int], None] | None = None,
        steps: int = 0,
    ) -> Result:
        path = self.folder / f"{file_part(self.variant.name)}-{facts[0]}-{key_of(self.facts, facts)}.json"
        try:
            result = kind.model_validate_json(json.dumps(read_sealed(path)), strict=True)
        except ValidationError:
            started = time.perf_counter()
            result = measure()
            self.seconds += time.perf_counter() - started
            write_text(path, sealed(result.model_dump(mode="json")))
        if step is not None:
            step(steps, steps)
        return result


def _contents(request: HarnessRequest) -> list[tuple[str, str]]:
    """Names and contents of the task files that a request brings along."""
    return [(str(path), file_key(path)) for path in request.files()]


def _prompts(
    loaded: Loaded, requests: Sequence[Task], text: TextSource, seed: int, context: int | None
) -> list[list[Prompt]]:
    """The prompts of every request."""
    if not requests:
        return []
    for task in requests:
        if not task.scored:
            raise UserError(
                f"`{task.task}` has no right answer to compare with",
                where=task.name,
                expected="a task with a right answer: passkey, key_value, facts",
            )
    tokens = part_of(loaded.tokenizer, text, "evaluation", max(task.length for task in requests))
    made = [task.make(loaded.tokenizer, tokens, f"{seed}/evaluation", context=context) for task in requests]
    for task, prompts in zip(requests, made, strict=True):
        for prompt in prompts:
            check_tokens(prompt.tokens, loaded.model.config, f"a prompt of {task.name}")
    return made
