"""Tasks of lm-eval and the long-context suites of this project, run by lm-eval on a model that is in memory."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from compress.errors import UserError, nearest
from compress.evaluate.harness import EXTRA, PREFILL, run_task, task_files
from compress.evaluate.measure import Inputs, Job, Measure, Reading, Result, Setting, Step, Subject
from compress.evaluate.suites import SUITES
from compress.evaluate.task_result import TaskResult
from compress.files import file_key, text_key
from compress.limits import BATCH, DOCUMENTS, ENTRIES, LONGEST, STEPS
from compress.plan import ModelShape
from compress.registry import PathText, measures

SUITE_ANSWER = 24  # tokens that an item of a suite generates, about


@measures.register("lm_eval")
class LmEval(Measure):
    """lm-eval tasks and long-context suites."""

    result: ClassVar[type[Result]] = TaskResult

    tasks: tuple[str, ...] = Field((), strict=False, description="lm-eval tasks by name, local ones or the hub's")
    include: PathText | None = Field(None, description="a folder of task files (.yaml) besides lm-eval's own")
    limit: int | None = Field(None, ge=1, le=STEPS, description="only the first items of every task")
    suites: tuple[str, ...] = Field(
        (), strict=False, description=f"of {', '.join(SUITES)}; NAME{PREFILL} scores the answer without a cache"
    )
    lengths: tuple[Annotated[int, Field(ge=1, le=LONGEST)], ...] = Field(
        (2048,), min_length=1, max_length=ENTRIES, strict=False, description="tokens of the suites' items"
    )
    count: int = Field(20, ge=1, le=DOCUMENTS, description="items of each suite and length")
    batch_size: int = Field(1, ge=1, le=BATCH, description="inputs at once")

    @property
    def input_lengths(self) -> tuple[int, ...]:
        """Those of the suites; tasks have items of any length."""
        return self.lengths if self.suites else ()

    def task_keys(self) -> list[tuple[str, int | None]]:
        """Every task by name and length, suites once for each length; other tasks have None for it."""
        return [(name, None) for name in self.tasks] + [
            (name, length) for name in self.suites for length in self.lengths
        ]

    def words(self) -> str:
        return "\n".join([*self.tasks, *self.suites])

    def inputs(self, shape: ModelShape | None = None) -> list[Inputs]:
        """The items of the suites; those of tasks are only known once these are loaded."""
        return [Inputs(length, self.count * len(self.suites), SUITE_ANSWER) for length in self.input_lengths]

    def passes(self) -> str:
        parts = [f"{self.count * len(self.suites) * len(self.lengths)} items of suites"] if self.suites else []
        return ", ".join([*parts, "the tasks, whose time is not foreseen"] if self.tasks else parts)

    def check(self, context: int | None) -> None:
        """Check names and lengths.

        Raises:
            UserError: no such suite, a length beyond the model's context, or lm-eval is not installed.
        """
        for name in (name.removesuffix(PREFILL) for name in self.suites):
            if name not in SUITES:
                raise UserError(
                    f"unknown suite `{name}`", expected=f"one of {', '.join(SUITES)}", fix=nearest(name, SUITES)
                )
        if self.suites and context is not None and max(self.lengths) > context:
            raise UserError(
                "the suites are longer than the model's context",
                expected=f"at most {context} tokens",
                found=f"{max(self.lengths)} tokens",
            )
        try:
            import lm_eval  # noqa: F401
        except ImportError as error:
            raise UserError("tasks and suites need the package lm-eval", fix=EXTRA) from error

    def readings(self, seed: int) -> list[Reading]:
        """The whole text, of which every suite cuts its haystacks."""
        return [Reading(None, None)] if self.suites else []

    @property
    def files_are(self) -> str:
        return "" if self.include is None else f"task files: {self.include}"

    def files(self) -> list[Path]:
        """Task files of `include`, and the files of data that they name where they are found; sorted.

        Raises:
            UserError: there is no such folder, or it holds too many files to be one of tasks.
        """
        return task_files(self.include) if self.include is not None else []

    def packages(self) -> list[str]:
        return ["lm-eval"]

    def jobs(self, setting: Setting) -> list[Job]:
        """One job for each task, and for each suite and length."""
        self.check(setting.context)
        text = setting.text.whole(setting.reader) if self.suites else ""
        return [self._job(name, length, setting.seed, text) for name, length in self.task_keys()]

    def _job(self, name: str, length: int | None, seed: int, text: str) -> Job:
        label = name if length is None else f"{name} at {length}"
        settings: dict[str, Any] = {"limit": self.limit, "batch_size": self.batch_size}
        if length is None:
            settings["include"] = [(str(path), file_key(path)) for path in self.files()]
        else:
            settings = {"count": self.count, "batch_size": self.batch_size, "text": text_key(text)}
        facts = ["task", name, length, settings, seed if length is not None else None, version("lm_eval")]
        return Job(label, facts, 1, partial(self._measured, name, length, seed, text))

    def _measured(self, name: str, length: int | None, seed: int, text: str, subject: Subject, step: Step) -> Result:
        of_suite = text if length is not None else ""
        return run_task(
            subject.model, subject.tokenizer, self, name, length, seed=seed, text=of_suite, sizer=subject.sizer
        )
