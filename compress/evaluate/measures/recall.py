"""Recall of a hidden number by generation through the KV cache, by length and depth."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, computed_field

from compress.bench.file import MOST_TOKENS
from compress.data.prompt import Prompt, Task, check_scored
from compress.errors import NotFiniteError
from compress.evaluate.cell import Cell, by_part
from compress.evaluate.labels import distinct_labels
from compress.evaluate.measure import Inputs, Job, Measure, Reading, Result, Setting, Step, Subject
from compress.evaluate.paired import wilson
from compress.files import text_key
from compress.models.cache_bytes import cache_bytes
from compress.models.placement import input_device
from compress.plan import ModelShape
from compress.registry import measures, tasks
from compress.runtime.modeling_compress import CACHE
from compress.words import counted

Tasks = tuple[Annotated[Task, tasks], ...]
WRITTEN = 12  # tokens of an answer, about
DEPTHS = tuple(number / 5 for number in range(6))


class RecallItem(BaseModel):
    """One prompt's outcome; `answer` is what the model wrote."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    depth: float = Field(ge=0, le=1)
    expected: str
    answer: str
    correct: bool


class RecallResult(Result):
    """Outcome of one task at one length. Items are in the order of the prompts, so two models can be paired.

    Attributes:
        cache_bytes: most bytes that the KV cache held for one sequence at the end of a generation.
        haystack: what surrounded the evidence; empty in results of older versions.
        batch_size: prompts that were answered at once; 0 in results of older versions.
    """

    measure: Literal["recall"] = "recall"
    task: str
    length: int = Field(ge=1, le=MOST_TOKENS)
    items: list[RecallItem] = Field(min_length=1)
    cache_bytes: int | None = None
    haystack: str = ""
    batch_size: int = 0

    @computed_field  # type: ignore[prop-decorator]
    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return sum(item.correct for item in self.items) / len(self.items)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the accuracy."""
        return wilson(sum(item.correct for item in self.items), len(self.items))

    def cells(self) -> list[Cell]:
        """Accuracy in all, and by depth of the evidence."""
        outcomes = tuple(float(item.correct) for item in self.items)
        whole = Cell(
            self.task,
            "right answers",
            self.accuracy,
            "higher",
            length=self.length,
            interval=self.interval,
            interval_kind="Wilson's 95% interval",
            count=len(self.items),
            items=outcomes,
            table="summary",
            note=counted(len(self.items), "prompt"),
        )
        placed = [(item.depth, outcome) for item, outcome in zip(self.items, outcomes, strict=True)]
        return [whole, *by_part(whole, "depth", placed, DEPTHS)]

    def words(self) -> str:
        """Prompts, text and batch."""
        around = f" in {self.haystack} text" if self.haystack else ""
        batch = f", batch {self.batch_size}" if self.batch_size else ""
        prompts = counted(len(self.items), "prompt")
        return f"{self.task} at {self.length:,}: {prompts}{around}{batch}, Wilson's 95% interval"


def is_right(answer: str, expected: str) -> bool:
    """Whether an answer is the expected one.

    Where that is a whole number, the first whole number of the answer has to be it, digit for digit; all else has to
    stand at the start of the answer, letter case, punctuation and spaces aside.
    """
    if expected.isdecimal():
        number = re.search(r"\d+", answer)
        return number is not None and number.group() == expected
    return re.match(rf"{re.escape(_plain(expected))}( |$)", _plain(answer)) is not None


def _plain(text: str) -> str:
    """Letters and digits in lower case, with one space for everything between them."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


@measures.register("recall")
class Recall(Measure):
    """Share of right answers to recall tasks. The recipe's key is a list of tasks.

    Attributes:
        tasks: what is asked; their prompts are made of the evaluation part of the text.
    """

    result: ClassVar[type[Result]] = RecallResult
    one_tokenizer: ClassVar[bool] = True

    tasks: Tasks = Field(description="recall tasks, one entry per task and length")

    @classmethod
    def key(cls) -> tuple[Any, Any]:
        return Tasks, Field((), description="recall tasks, one entry per task and length")

    @classmethod
    def of(cls, value: Any) -> list[Measure]:
        """One measure for the whole list, so that all tasks take their haystacks from the same text."""
        return [cls(tasks=tuple(value))] if value else []

    @property
    def input_lengths(self) -> tuple[int, ...]:
        return tuple(task.length for task in self.tasks)

    def words(self) -> str:
        return "\n".join(
            f"{task.count} x {label} of {task.length:,} tokens"
            for label, task in zip(self._labels(), self.tasks, strict=True)
        )

    def _labels(self) -> list[str]:
        return distinct_labels([task.label for task in self.tasks], [task.model_dump() for task in self.tasks])

    def inputs(self, shape: ModelShape | None = None) -> list[Inputs]:
        return [Inputs(task.length, task.count, WRITTEN) for task in self.tasks]

    def passes(self) -> str:
        return f"{sum(task.count for task in self.tasks)} generations"

    def check(self, context: int | None) -> None:
        for task in self.tasks:
            check_scored(task)

    def readings(self, seed: int) -> list[Reading]:
        return [
            Reading(None, task.length, partial(self._prompts, seed, task), f"[{number}]")
            for number, task in enumerate(self.tasks)
        ]

    def jobs(self, setting: Setting) -> list[Job]:
        """One job for each task, on the same prompts for all variants."""
        tokens = setting.tokens(setting.text, max(self.input_lengths))
        jobs = []
        for label, task in zip(self._labels(), self.tasks, strict=True):
            prompts = self._prompts(setting.seed, task, setting.reader.tokenizer, tokens, setting.context)
            for prompt in prompts:
                setting.check(prompt.tokens, f"a prompt of {task.name}")
            asked = text_key(str([(prompt.tokens, prompt.budget) for prompt in prompts]))
            facts = ["recall", task.model_dump(mode="json"), asked, setting.batch_size]
            facts += [label] if label != task.label else []
            run = partial(self._measured, label, task, prompts, setting.batch_size)
            jobs.append(Job(f"{label} {task.length}", facts, len(prompts), run))
        return jobs

    def _prompts(
        self, seed: int, task: Task, tokenizer: Any, tokens: Sequence[int], context: int | None
    ) -> list[Prompt]:
        return task.make(tokenizer, tokens, f"{seed}/evaluation", context=context)

    def _measured(
        self, label: str, task: Task, prompts: list[Prompt], batch_size: int, subject: Subject, step: Step
    ) -> Result:
        result = recall(subject.model, subject.sizer, task, prompts, batch_size=batch_size, progress=step)
        return result.model_copy(update={"task": label})


@torch.inference_mode()
def recall(
    model: Any,
    tokenizer: Any,
    task: Task,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> RecallResult:
    """Ask every prompt by greedy `generate` with the model's own cache, and compare the number it writes.

    Args:
        prompts: what `task.make` made; all of the task's length.
        batch_size: prompts at once; shorter ones are padded on the left.
        progress: called with (prompts done, prompts in all).

    Raises:
        UserError: the task has no right answer to compare with.
        NotFiniteError: the model's logits are not finite.
    """
    check_scored(task)
    items, most = [], None
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        answers, held = _generate(model, tokenizer, batch)
        if held is not None:
            most = max(most or 0, -(-held // len(batch)))
        for prompt, tokens in zip(batch, answers, strict=True):
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            expected, depth = str(prompt.expected), float(prompt.depth or 0)
            items.append(RecallItem(depth=depth, expected=expected, answer=text, correct=is_right(text, expected)))
        if progress is not None:
            progress(len(items), len(prompts))
    return RecallResult(
        task=task.label,
        length=task.length,
        items=items,
        cache_bytes=most,
        haystack=task.around,
        batch_size=batch_size,
    )


def _generate(model: Any, tokenizer: Any, batch: Sequence[Prompt]) -> tuple[list[list[int]], int | None]:
    """Answer tokens of each prompt, and the bytes that the cache holds for all of them."""
    device = input_device(model)
    width = max(len(prompt.tokens) for prompt in batch)
    # The mask hides padding, so any token serves where the tokenizer has none of its own; behind an answer it is read,
    # so rather one that is no text.
    pad = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    tokens = torch.tensor([[pad] * (width - len(prompt.tokens)) + list(prompt.tokens) for prompt in batch])
    mask = torch.tensor([[0] * (width - len(prompt.tokens)) + [1] * len(prompt.tokens) for prompt in batch])
    output = model.generate(
        input_ids=tokens.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max(prompt.budget for prompt in batch),
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        use_cache=True,
        pad_token_id=pad,
        return_dict_in_generate=True,
        output_logits=True,
    )
    if not all(bool(torch.isfinite(step).all()) for step in output.logits):
        raise NotFiniteError("the model's logits are not finite")
    rows = output.sequences[:, width:].tolist()
    answers = [row[: prompt.budget] for row, prompt in zip(rows, batch, strict=True)]
    return answers, cache_bytes(getattr(output, CACHE))
