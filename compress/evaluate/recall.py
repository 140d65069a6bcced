"""Recall of a hidden number by generation through the KV cache, by length and depth."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, computed_field

from compress.bench.file import MOST_TOKENS
from compress.data.prompt import Prompt, Task
from compress.errors import NotFiniteError, UserError
from compress.runtime.modeling_compress import CACHE

Z = 1.959963984540054  # two-sided 95% of the normal distribution


class RecallItem(BaseModel):
    """One prompt's outcome; `answer` is what the model wrote."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    depth: float = Field(ge=0, le=1)
    expected: str
    answer: str
    correct: bool


class RecallResult(BaseModel):
    """Outcome of one task at one length. Items are in the order of the prompts, so two models can be paired.

    Attributes:
        cache_bytes: most bytes that the KV cache held for one sequence at the end of a generation.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    task: str
    length: int = Field(ge=1, le=MOST_TOKENS)
    items: list[RecallItem] = Field(min_length=1)
    cache_bytes: int | None = None

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

    def by_depth(self, bins: int = 5) -> list[tuple[float, float, int, float | None]]:
        """(from, to, prompts, accuracy) for equal ranges of depth; accuracy is None where there is no prompt."""
        rows: list[tuple[float, float, int, float | None]] = []
        for number in range(bins):
            hits = [item.correct for item in self.items if min(bins - 1, int(item.depth * bins)) == number]
            rows.append((number / bins, (number + 1) / bins, len(hits), sum(hits) / len(hits) if hits else None))
        return rows


def wilson(right: int, total: int) -> tuple[float, float]:
    """Wilson's score interval at 95% for `right` of `total` (E. B. Wilson, JASA 22, 1927).

    Raises:
        ValueError: `total` is not positive or `right` is not between 0 and it.
    """
    if total < 1 or not 0 <= right <= total:
        raise ValueError(f"expected 0 <= right <= total and total >= 1, got {right} of {total}")
    share, scale = right / total, 1 + Z * Z / total
    centre = (share + Z * Z / (2 * total)) / scale
    half = Z / scale * math.sqrt(share * (1 - share) / total + Z * Z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


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


def cache_bytes(cache: Any) -> int | None:
    """Bytes of keys and values that a cache holds: what a paged cache says itself, else its tensors' storage."""
    if hasattr(cache, "allocated_bytes"):
        return int(cache.allocated_bytes())
    tensors = [
        tensor
        for layer in getattr(cache, "layers", [])
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if isinstance(tensor, torch.Tensor)
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) if tensors else None


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
    if any(prompt.expected is None or prompt.depth is None for prompt in prompts):
        raise UserError(
            f"`{task.task}` has no right answer to compare with",
            where=task.name,
            expected="a task with a right answer: passkey, key_value, facts",
        )
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
    return RecallResult(task=task.label, length=task.length, items=items, cache_bytes=most)


def _generate(model: Any, tokenizer: Any, batch: Sequence[Prompt]) -> tuple[list[list[int]], int | None]:
    """Answer tokens of each prompt, and the bytes that the cache holds for all of them."""
    device = next(model.parameters()).device
    width = max(len(prompt.tokens) for prompt in batch)
    # The mask hides padding, so any token serves where the tokenizer has none of its own.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
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
