"""Continuation: a window of the text is the prompt, what the model says next is the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.data.haystack import windows
from compress.data.prompt import Prompt, Task
from compress.data.text import leading_tokens
from compress.errors import UserError
from compress.limits import LONGEST
from compress.registry import tasks

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase


@tasks.register("continuation")
class Continuation(Task):
    """Plain text, continued by the model: what a compressed model has to keep besides recall."""

    hides: ClassVar[bool] = False

    task: Literal["continuation"] = Field("continuation", description="continue a long text")
    answer_tokens: int = Field(64, ge=1, le=LONGEST, description="tokens of the answer")
    decoding: Literal["sample", "greedy"] = Field(
        "sample", description="how the dense model answers; greedy answers of small models soon repeat themselves"
    )
    temperature: float = Field(1.0, ge=0.01, le=100, description="temperature of `sample`")

    def answering(self, seed: int) -> dict[str, Any]:
        return {"decoding": self.decoding, "temperature": self.temperature, "seed": seed}

    def prompts(self, tokenizer: PreTrainedTokenizerBase, text: Sequence[int], rng: random.Random) -> list[Prompt]:
        """Prompts without evidence; the reference is the text itself."""
        start = leading_tokens(tokenizer)
        size = self.length - len(start)
        if size <= self.answer_tokens:
            raise UserError(
                "the answer leaves no room for a prompt",
                where=self.name,
                expected=f"answer_tokens below {size}",
                found=str(self.answer_tokens),
            )
        cuts = windows(text, [size] * self.count, rng, self.name)
        return [
            Prompt(
                (*start, *cut[: -self.answer_tokens]),
                self.answer_tokens,
                tuple(cut[-self.answer_tokens :]),
                task=self.task,
            )
            for cut in cuts
        ]
