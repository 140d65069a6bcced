"""What every task has in common: its parameters, the prompts that it makes, and the check of their length."""

from __future__ import annotations

import random
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from compress.data.sample import TextSample
from compress.errors import UserError
from compress.limits import DOCUMENTS, LONGEST
from compress.registry import Method, tasks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """A document whose answer is still to be written.

    Attributes:
        tokens: token ids of the prompt.
        budget: tokens kept for the answer; `len(tokens) + budget` is the length that was asked for.
        reference: token ids of the right answer (recall) or of the text's own continuation; at most `budget` of them.
        evidence, task, expected, depth: as in `TextSample`.
    """

    tokens: tuple[int, ...]
    budget: int
    reference: tuple[int, ...]
    evidence: tuple[tuple[int, int], ...] = ()
    task: str = "text"
    expected: str | None = None
    depth: float | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and answer together."""
        return len(self.tokens) + self.budget

    def answered(self, answer: Sequence[int]) -> TextSample:
        """The document with an answer, which fills the budget exactly.

        Raises:
            ValueError: the answer has another number of tokens.
        """
        if len(answer) != self.budget:
            raise ValueError(f"an answer of {self.budget} tokens is expected, got {len(answer)}")
        return TextSample(
            tokens=(*self.tokens, *answer),
            answer=(len(self.tokens), self.length),
            evidence=self.evidence,
            task=self.task,
            expected=self.expected,
            depth=self.depth,
        )


class Task(Method):
    """Parameters of every task. A task makes prompts of an exact length in the model's own tokens."""

    hides: ClassVar[bool] = True  # whether its documents have evidence, a place that the answer has to be read from
    scored: ClassVar[bool] = False  # whether its prompts have a right answer that a written one is compared with

    task: str = Field(description="name of the task")
    length: int = Field(ge=16, le=LONGEST, description="tokens of a document, prompt and answer together")
    count: int = Field(ge=1, le=DOCUMENTS, description="number of documents")
    answer: Literal["model", "text"] = Field(
        "model",
        description="whose answer a calibration document carries: the dense model's own, or the right one of the text",
    )

    def answering(self, seed: int) -> dict[str, Any]:
        """Arguments of `answer`, for a model's own answer to a prompt; greedy unless a task says otherwise."""
        return {}

    @property
    def around(self) -> str:
        """What surrounds a hidden answer, `natural` or `filler`; empty where a task with right answers hides none."""
        return ""

    @property
    def label(self) -> str:
        """How messages and tables name it, without the length."""
        return self.task

    @property
    def name(self) -> str:
        """How messages and tables name it."""
        return f"{self.label} {self.length}"

    def make(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text: Sequence[int],
        seed: int | str,
        *,
        context: int | None = None,
    ) -> list[Prompt]:
        """`count` prompts, the same for the same (seed, parameters, tokenizer, text).

        Args:
            text: token ids of the text that haystacks are cut from.
            context: longest input of the model in tokens (`max_position_embeddings`); None where there is no limit.

        Raises:
            UserError: the length exceeds the model's context, or holds less than needle, question and answer, or the
                text is shorter than a haystack. Nothing is ever cut to fit.
        """
        if context is not None and self.length > context:
            raise UserError(
                "the documents are longer than the model's context",
                where=self.name,
                expected=f"length of at most {context} tokens",
                found=f"{self.length} tokens",
            )
        prompts = self.prompts(tokenizer, text, random.Random(f"{seed}/{self.task}/{self.length}"))
        wrong = [prompt.length for prompt in prompts if prompt.length != self.length]
        if wrong or len(prompts) != self.count:
            raise RuntimeError(f"{self.name}: made {len(prompts)} prompts, {len(wrong)} of another length: {wrong[:3]}")
        return prompts

    @abstractmethod
    def prompts(self, tokenizer: PreTrainedTokenizerBase, text: Sequence[int], rng: random.Random) -> list[Prompt]:
        """The prompts; `make` has checked the context and checks count and lengths afterwards."""


def check_scored(task: Task) -> None:
    """Refuse to count the right answers of a task that has none. Raises UserError."""
    if not task.scored:
        raise UserError(
            f"`{task.task}` has no right answer to compare with",
            where=task.name,
            expected=f"a task with a right answer: {', '.join(name for name, kind in tasks.items() if kind.scored)}",
        )


def _ascending(depths: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= depths[0] <= depths[1] <= 1:
        raise ValueError("expected [from, to] with 0 <= from <= to <= 1")
    return depths


Depths = Annotated[tuple[float, float], AfterValidator(_ascending)]


class RecallTask(Task):
    """Parameters of the tasks whose answer is hidden in a haystack."""

    scored: ClassVar[bool] = True

    depth: Depths = Field(
        (0.0, 1.0), description="range of depths of the hidden sentence: 0 is the start, 1 just before the question"
    )
    haystack: Literal["natural", "filler"] = Field(
        "natural", description="what surrounds the hidden sentence: the text, or a few sentences repeated"
    )
    answer_tokens: int | None = Field(
        None,
        ge=1,
        le=LONGEST,
        description="tokens of the answer; by default those of the right answer and two more",
    )

    @property
    def around(self) -> str:
        return self.haystack

    def depths(self, rng: random.Random) -> list[float]:
        """One depth for each prompt, spread evenly over the range, in a random order."""
        low, high = self.depth
        depths = [low + (high - low) * (i + 0.5) / self.count for i in range(self.count)]
        rng.shuffle(depths)
        return depths

    def budget(self, reference: Sequence[int]) -> int:
        """Tokens kept for the answer.

        Raises:
            UserError: `answer_tokens` is fewer than the right answer takes.
        """
        if self.answer == "text":
            return len(reference)
        if self.answer_tokens is None:
            return len(reference) + 2
        if self.answer_tokens < len(reference):
            raise UserError(
                "`answer_tokens` is too small for the right answer",
                where=self.name,
                expected=f"at least {len(reference)}",
                found=str(self.answer_tokens),
            )
        return self.answer_tokens


def random_number(rng: random.Random, digits: int) -> str:
    """A random number of `digits` digits that does not start with 0."""
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


class NumberTask(RecallTask):
    """Parameters of the tasks whose answer is a number."""

    digits: int = Field(5, ge=1, le=12, description="digits of the hidden number")

    def number(self, rng: random.Random) -> str:
        """A random number of `digits` digits."""
        return random_number(rng, self.digits)
