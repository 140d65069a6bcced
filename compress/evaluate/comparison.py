"""The side-by-side result of several models on the same items: its file form and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.table import Table

from compress.errors import Problem, UserError
from compress.evaluate.harness import Paired, TaskResult, averaged, paired
from compress.evaluate.perplexity import PerplexityResult
from compress.evaluate.recall import RecallResult
from compress.files import write_text


class VariantResult(BaseModel):
    """One row: a model variant and all that was measured on it.

    Attributes:
        kv_bytes: bytes of KV cache of one sequence by length, as the plan predicts them.
        recall: one result for each recall task, in the order of the columns.
        tasks: lm-eval tasks and suites, in the order of the request.
        seconds: wall clock of the measurements, from the run that made them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kv_bytes: dict[int, int] = {}
    perplexity: PerplexityResult | None = None
    recall: list[RecallResult] = []
    tasks: list[TaskResult] = []
    seconds: float = 0.0


class Comparison(BaseModel):
    """Variants beside each other, the dense model first.

    Attributes:
        perplexity, recall: the requests, as in the recipe.
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
    perplexity: dict[str, Any] | None
    recall: list[dict[str, Any]]
    lm_eval: dict[str, Any] | None = None
    text: dict[str, Any] | None
    versions: dict[str, str]
    variants: list[VariantResult] = Field(min_length=1)

    @property
    def dense(self) -> VariantResult:
        """The row that the others are measured against."""
        return self.variants[0]

    def write(self, path: Path) -> None:
        """Write the JSON file, atomically."""
        write_text(path, self.model_dump_json(by_alias=True, indent=1) + "\n")

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
        """The main table, then perplexity by position, recall by depth, and tasks, where they were measured."""
        found = [self.table()]
        if all(variant.perplexity is not None for variant in self.variants) and self.perplexity is not None:
            found.append(self._by_position())
        if depth:
            found += [self._by_depth(number) for number in range(len(self.recall))]
        return [*found, self._by_task()] if self.dense.tasks else found

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

    def _by_task(self) -> Table:
        """lm-eval tasks, a row a task: value and standard error, and in parentheses the paired difference to dense."""
        table = Table(
            title="lm-eval tasks and suites",
            caption="standard errors behind the plus-minus signs; in parentheses the difference to dense over the same "
            "items, * where it is more than 1.96 of its own standard errors",
        )
        for head in ("task", "metric", "items"):
            table.add_column(head, no_wrap=True)
        for variant in self.variants:
            table.add_column(variant.name, justify="right")
        for number, task in enumerate(self.dense.tasks):
            cells = [self._task_cell(variant, number) for variant in self.variants]
            kind = "" if task.generates else " (scored, no cache)"
            table.add_row(task.task, f"{task.main()}{kind}", str(len(task.samples)), *cells)
        if len(self.dense.tasks) > 1 and all(self.average(variant) for variant in self.variants):
            cells = [self._mean_cell(variant) for variant in self.variants]
            table.add_row("mean", "", "", *cells, end_section=True)
        worst = [self.worst_drop(variant) for variant in self.variants[1:]]
        if any(worst):
            cells = ["" if drop is None else f"{drop[1].difference:+.3f} {drop[0]}" for drop in worst]
            table.add_row("worst", "", "", "", *cells)
        return table

    def _task_cell(self, variant: VariantResult, number: int) -> str:
        task = variant.tasks[number]
        metric = task.main()
        value = f"{task.metrics[metric]:.4g}"
        if metric in task.errors:
            value += f" ± {task.errors[metric]:.3f}"
        gap = None if variant is self.dense else self.against_dense(variant, number)
        if gap is None:
            return value
        return f"{value} {_gap_cell(gap)}"

    def _mean_cell(self, variant: VariantResult) -> str:
        values = [task.metrics[task.main()] for task in variant.tasks]
        value, gap = f"{sum(values) / len(values):.4g}", self.average(variant)
        return value if gap is None or variant is self.dense else f"{value} {_gap_cell(gap)}"

    def print(self, console: Console) -> None:
        """Print all tables."""
        for table in self.tables():
            console.print(table)

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


def _gap_cell(gap: Paired) -> str:
    return f"({gap.difference:+.3f} ± {gap.error:.3f}{'*' if gap.significant else ''})"


def read_comparison(path: Path) -> Comparison:
    """Read what `Comparison.write` wrote.

    Raises:
        UserError: the file is missing, damaged or of another version; all problems at once.
    """
    try:
        return Comparison.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError("the comparison cannot be read", where=str(path), found=error.strerror) from error
    except UnicodeDecodeError as error:
        raise UserError("the comparison is not UTF-8", where=str(path)) from error
    except ValidationError as error:
        raise UserError(
            [
                Problem(
                    f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}",
                    where=str(path),
                    found=str(item["input"])[:80],
                )
                for item in error.errors()
            ]
        ) from error
