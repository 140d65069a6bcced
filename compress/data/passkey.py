"""Pass key: a number said once in a long text, asked for at the end (Landmark Attention, arXiv 2305.16300)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from compress.data.haystack import Frame, haystacks, reference_answer
from compress.data.prompt import NumberTask, Prompt
from compress.data.text import tokenise
from compress.registry import tasks

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

# Said twice, as the paper does. The question says "Remember" because a small model sometimes takes "The pass key is"
# for the start of a definition and goes on in prose.
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "Remember the pass key. The pass key is"


@tasks.register("passkey")
class PassKey(NumberTask):
    """A number hidden in one sentence of a long text; the prompt ends where the number has to follow."""

    task: Literal["passkey"] = Field("passkey", description="find a number hidden in a long text")

    def prompts(self, tokenizer: PreTrainedTokenizerBase, text: Sequence[int], rng: random.Random) -> list[Prompt]:
        """Prompts with one needle each; its sentence is the evidence."""
        frame, question = Frame(tokenizer), tokenise(tokenizer, QUESTION)
        depths = self.depths(rng)
        keys = [self.number(rng) for _ in depths]
        needles = [frame.needle(NEEDLE.format(key=key)) for key in keys]
        references = [reference_answer(tokenizer, question, QUESTION, key) for key in keys]
        budgets = [self.budget(reference) for reference in references]
        sizes = [
            self.length - frame.overhead([needle], question) - budget
            for needle, budget in zip(needles, budgets, strict=True)
        ]
        texts = haystacks(self.haystack, tokenizer, text, sizes, rng, self.name)
        prompts = []
        for i, hay in enumerate(texts):
            tokens, evidence = frame.insert(hay, [(depths[i], needles[i])], question)
            prompts.append(
                Prompt(tokens, budgets[i], tuple(references[i]), tuple(evidence), self.task, keys[i], depths[i])
            )
        return prompts
