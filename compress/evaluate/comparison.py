"""The side-by-side result of several models on the same items: its file form and its table."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from rich.table import Table

from compress.bench.file import Bytes, Tokens
from compress.evaluate.harness import Paired, TaskResult, averaged, paired
from compress.evaluate.latency import LatencyResult
from compress.evaluate.perplexity import PerplexityResult
from compress.evaluate.recall import RecallResult
from compress.evaluate.size import SizeResult
from compress.files import write_text
from compress.json_file import AGAIN, read_model, sealed

MOST_BYTES = 256 << 20  # every item of every task of every variant is in it
UNTRAINED = " before recovery"  # behind the name of a row that was not trained, beside one that was
CONTROL_ROW = "dense, recovered"


def _asked(**kinds: type) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A check that a request names what the tables say of it."""

    def check(request: dict[str, Any]) -> dict[str, Any]:
        for key, kind in kinds.items():
            value = request.get(key)
            if type(value) is not kind or (isinstance(value, int) and value < 1):
                expected = "a whole number from 1 on" if kind is int else "a text"
                raise ValueError(f"{key}: expected {expected}, got {reprlib.repr(value)}")
        return request

    return check


PerplexityAsked = Annotated[dict[str, Any], AfterValidator(_asked(length=int, windows=int))]
RecallAsked = Annotated[dict[str, Any], AfterValidator(_asked(task=str, length=int, count=int, haystack=str))]
LatencyAsked = Annotated[dict[str, Any], AfterValidator(_asked(length=int, batch=int))]


class VariantResult(BaseModel):
    """One row: a model variant and all that was measured on it.

    Attributes:
        kv_bytes: bytes of KV cache of one sequence by length, as the plan predicts them.
        size: counted parameters; None in files that were written before they were counted.
        recall: one result for each recall task, in the order of the columns.
        tasks: lm-eval tasks and suites, in the order of the request.
        seconds: wall clock of the measurements, from the run that made them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kv_bytes: dict[Tokens, Bytes] = {}
    size: SizeResult | None = None
    latency: LatencyResult | None = None
    perplexity: PerplexityResult | None = None
    recall: list[RecallResult] = []
    tasks: list[TaskResult] = []
    seconds: float = Field(default=0.0, ge=0)


class Comparison(BaseModel):
    """Variants beside each other, the dense model first.

    Attributes:
        perplexity, recall, lm_eval, latency: the requests, as in the recipe.
        text: what the recall haystacks were cut from, as in the recipe.
        versions: Python, torch and transformers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)

    schema_: Literal[1] = Field(1, alias="schema")
    model: str
    fingerprint: str
    dtype: str
    device: str
    seed: int
    batch_size: int
    perplexity: PerplexityAsked | None
    recall: list[RecallAsked]
    lm_eval: dict[str, Any] | None = None
    latency: LatencyAsked | None = None
    text: dict[str, Any] | None
    versions: dict[str, str]
    variants: list[VariantResult] = Field(min_length=1)

    @model_validator(mode="after")
    def _rows_alike(self) -> Comparison:
        first = self.variants[0]
        for row in self.variants:
            for what, found, expected in (
                ("results of recall", len(row.recall), len(self.recall)),
                ("tasks", len(row.tasks), len(first.tasks)),
                ("ranges of perplexity", _ranges(row, first), _ranges(first, row)),
            ):
                if found != expected:
                    raise ValueError(f"variant {reprlib.repr(row.name)}: expected {expected} {what}, got {found}")
        return self

    @property
    def dense(self) -> VariantResult:
        """The row that the others are measured against."""
        return self.variants[0]

    def write(self, path: Path) -> None:
        """Write the JSON file, atomically."""
        write_text(path, sealed(self.model_dump(mode="json", by_alias=True)))

    def table(self) -> Table:
        """The table: a row a variant, columns for KV bytes, perplexity and each recall task."""
        table = Table(title=f"{self.model}, {self.dtype} on {self.device}, seed {self.seed}", caption=self._caption())
        table.add_column("variant", no_wrap=True)
        lengths = sorted({length for variant in self.variants for length in variant.kv_bytes})
        for length in lengths:
            table.add_column(f"KV bytes\nat {length:,}", justify="right")
        if self.perplexity is not None:
            table.add_column(f"perplexity\nat {self.perplexity['length']:,}", justify="right")
            table.add_column("over\ndense", justify="right")
        for request in self.recall:
            table.add_column(f"{request['task']}\nat {request['length']:,}", justify="right")
        for variant in self.variants:
            table.add_row(variant.name, *self._cells(variant, lengths))
        return table

    def tables(self, depth: bool = True) -> list[Table]:
        """The main table, then size and time, perplexity by position, recall by depth, and tasks: what there is."""
        found = [self.table()]
        if self.latency is not None or self.pruned:
            found.append(self._by_cost())
        if all(variant.perplexity is not None for variant in self.variants) and self.perplexity is not None:
            found.append(self._by_position())
        if depth:
            found += [self._by_depth(number) for number in range(len(self.recall))]
        return [*found, self._by_task()] if self.dense.tasks else found

    @property
    def pruned(self) -> bool:
        """Whether a variant has fewer or more parameters than the dense model."""
        return any(row.size is not None and row.size != self.dense.size for row in self.variants)

    def against_dense(self, variant: VariantResult, number: int) -> Paired | None:
        """Paired difference of a task's main metric to the dense model's."""
        task = variant.tasks[number]
        return paired(task, self.dense.tasks[number], task.main())

    def worst_drop(self, variant: VariantResult) -> tuple[str, Paired] | None:
        """The task that lost most against the dense model; None where no task can be paired."""
        found = []
        for number, task in enumerate(variant.tasks):
            gap = self.against_dense(variant, number)
            if gap is not None:
                found.append((gap.difference if task.higher[task.main()] else -gap.difference, task.task, gap))
        return min(found)[1:] if found else None

    def average(self, variant: VariantResult) -> Paired | None:
        """Mean over the tasks of the paired differences to dense; None where one has none, or less is better."""
        gaps = [self.against_dense(variant, number) for number in range(len(variant.tasks))]
        found = [gap for gap in gaps if gap is not None]
        whole = len(found) == len(gaps) > 0 and all(task.higher[task.main()] for task in variant.tasks)
        return averaged(found) if whole else None

    def _by_cost(self) -> Table:
        """Exact parameters, and measured time with its share of the dense model's."""
        title = "parameters" + (" and time" if self.latency is not None else "")
        table = Table(title=title, pad_edge=False)  # two columns less, to fit a terminal of 80
        table.add_column("variant", no_wrap=True)
        for head in ("parameters", "of the layers"):
            table.add_column(head, justify="right")
        if self.latency is not None:
            length, batch = self.latency["length"], self.latency["batch"]
            table.add_column(f"prefill,\n{length:,} tokens", justify="right")
            table.add_column(f"decode step,\nbatch {batch}", justify="right")
            found = self.dense.latency
            if found is not None:
                names = ", ".join(f"{what} {name}" for what, name in sorted(found.backend.items()))
                table.caption = (
                    "medians, and in parentheses the share of the dense model's time, which was measured right after; "
                    f"dense attention: {names}" + ("; decode steps in a CUDA graph" if found.graph else "")
                )
        for variant in self.variants:
            cells = [variant.name, *self._size_cells(variant)]
            if self.latency is not None:
                cells += self._time_cells(variant)
            table.add_row(*cells)
        return table

    def _size_cells(self, variant: VariantResult) -> list[str]:
        own, base = variant.size, self.dense.size
        if own is None or base is None:
            return ["", ""]
        share = own.block_parameters / base.block_parameters
        return [f"{own.parameters:,}", f"{own.block_parameters:,} ({share:.2%})"]

    def _time_cells(self, variant: VariantResult) -> list[str]:
        found = variant.latency
        if found is None:
            return ["", ""]
        if variant is self.dense:
            return [f"{found.own.prefill_ms:.4g} ms", f"{found.own.decode_ms:.4g} ms"]
        return [
            f"{found.own.prefill_ms:.4g} ms ({found.prefill_share:.3f})",
            f"{found.own.decode_ms:.4g} ms ({found.decode_share:.3f})",
        ]

    def _by_task(self) -> Table:
        """lm-eval tasks, a row for every task and variant, and at the end their means and what each lost most."""
        table = Table(
            title="lm-eval tasks and suites",
            caption="standard errors behind the plus-minus signs; differences are paired over the same items, * where "
            "one is more than 1.96 of its own standard errors",
        )
        table.add_column("task", overflow="fold")
        table.add_column("variant", no_wrap=True)
        table.add_column("value", justify="right")
        table.add_column("difference\nto dense", justify="right")
        last = len(self.variants) - 1
        for number, task in enumerate(self.dense.tasks):
            kind = "" if task.generates else ", scored"
            about = [task.task, f"{task.main()}{kind}, {len(task.samples)} items"]
            for row, variant in enumerate(self.variants):
                # With a single row both lines stand in one cell.
                head = "\n".join(about) if not last else about[row] if row < 2 else ""
                table.add_row(head, variant.name, *self._task_cells(variant, number), end_section=row == last)
        if len(self.dense.tasks) > 1 and all(self.average(variant) for variant in self.variants):
            for row, variant in enumerate(self.variants):
                head = "" if row else "mean"
                table.add_row(head, variant.name, *self._mean_cells(variant), end_section=row == last)
        head = "lost most"
        for variant in self.variants[1:]:
            drop = self.worst_drop(variant)
            if drop is not None:
                table.add_row(head, variant.name, drop[0], f"{drop[1].difference:+.3f}")
                head = ""
        return table

    def _task_cells(self, variant: VariantResult, number: int) -> tuple[str, str]:
        task = variant.tasks[number]
        metric = task.main()
        value = f"{task.metrics[metric]:.4g}"
        if metric in task.errors:
            value += f" ± {task.errors[metric]:.3f}"
        gap = None if variant is self.dense else self.against_dense(variant, number)
        return value, "" if gap is None else _gap_cell(gap)

    def _mean_cells(self, variant: VariantResult) -> tuple[str, str]:
        values = [task.metrics[task.main()] for task in variant.tasks]
        gap = None if variant is self.dense else self.average(variant)
        return f"{sum(values) / len(values):.4g}", "" if gap is None else _gap_cell(gap)

    def _by_position(self) -> Table:
        """Perplexity in ranges of the position within a window, a row a variant."""
        table = Table(title="perplexity by position of the token in its window")
        table.add_column("variant", no_wrap=True)
        for number, variant in enumerate(self.variants):
            assert variant.perplexity is not None
            buckets = variant.perplexity.buckets
            if number == 0:
                for bucket in buckets:
                    table.add_column(f"{bucket.start:,} to {bucket.end:,}", justify="right")
            table.add_row(variant.name, *(f"{bucket.perplexity:.3f}" for bucket in buckets))
        return table

    def _by_depth(self, number: int) -> Table:
        """Recall of one task in ranges of the evidence's depth, a row a variant."""
        request = self.recall[number]
        table = Table(title=f"{request['task']} at {request['length']:,} by depth, 0 is the start (prompts)")
        table.add_column("variant", no_wrap=True)
        for low, high, count, _ in self.dense.recall[number].by_depth():
            table.add_column(f"{low:.1f} to {high:.1f} ({count})", justify="right")
        for variant in self.variants:
            shares = [share for *_, share in variant.recall[number].by_depth()]
            table.add_row(variant.name, *("" if share is None else f"{share:.2f}" for share in shares))
        return table

    def _cells(self, variant: VariantResult, lengths: list[int]) -> list[str]:
        cells = []
        for length in lengths:
            size, dense = variant.kv_bytes.get(length), self.dense.kv_bytes.get(length)
            share = f" ({size / dense:.0%})" if size is not None and dense else ""
            cells.append("" if size is None else f"{size / 2**20:,.2f} MiB{share}")
        if self.perplexity is not None:
            own, base = variant.perplexity, self.dense.perplexity
            cells.append("" if own is None else f"{own.perplexity:.3f}")
            if own is None or base is None or variant is self.dense:
                cells.append("")
            else:
                cells.append(f"{own.perplexity / base.perplexity - 1:+.1%}")
        for result in variant.recall:
            low, high = result.interval
            cells.append(f"{result.accuracy:.2f} ({low:.2f} to {high:.2f})")
        return cells

    def _caption(self) -> str:
        parts = []
        if self.perplexity is not None:
            parts.append(f"perplexity: {self.perplexity['windows']} windows of {self.perplexity['length']:,} tokens")
        for request in self.recall:
            parts.append(
                f"{request['task']} at {request['length']:,}: {request['count']} prompts in {request['haystack']} text"
            )
        if self.recall:
            parts.append(f"in parentheses Wilson's 95% interval; batch {self.batch_size}")
        return "; ".join(parts)


def _ranges(row: VariantResult, beside: VariantResult) -> int:
    """Ranges of perplexity by position; 0 where one of the two rows has none."""
    return 0 if row.perplexity is None or beside.perplexity is None else len(row.perplexity.buckets)


def _gap_cell(gap: Paired) -> str:
    return f"{gap.difference:+.3f} ± {gap.error:.3f}{'*' if gap.significant else ''}"


def read_comparison(path: Path) -> Comparison:
    """Read what `Comparison.write` wrote.

    Raises:
        UserError: the file is missing, damaged or of another version; all problems at once.
    """
    return read_model(Comparison, path, "the comparison", fix=AGAIN, most=MOST_BYTES, finite=False)
