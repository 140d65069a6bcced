"""Many pass keys in one long text, all asked for at the end: the synthetic data of DuoAttention (arXiv 2410.10819)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from compress.data.haystack import Frame, haystacks
from compress.data.prompt import Depths, Prompt, Task
from compress.data.text import tokenise
from compress.errors import UserError
from compress.registry import tasks

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"]
# The radio alphabet, whose words no text predicts.
ALPHABET = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec romeo "
    "sierra tango uniform victor whiskey xray yankee zulu"
)
NEEDLE = "Here is the {ordinal} pass key to the vault: {words}. Keep it."
ASK = "\nThe {ordinal} pass key to the vault:"


@tasks.register("passkeys")
class PassKeys(Task):
    """Several keys of random words; questions and answers for all of them follow the text, as one long answer.

    The answer carries the right words (`answer: text`), so that it is known where each row has to look.
    """

    task: Literal["passkeys"] = Field("passkeys", description="find several keys of random words")
    answer: Literal["text"] = Field("text", description="the right answers of the text; there is no other kind")
    keys: int = Field(10, ge=1, le=len(ORDINALS), description="number of keys")
    words: int = Field(8, ge=1, le=1024, description="words of a key; the paper has 32")
    depth: Depths = Field((0.05, 0.95), description="range of depths of the keys, 0 is the start")
    haystack: Literal["natural", "filler"] = Field("natural", description="what surrounds the keys")

    def prompts(self, tokenizer: PreTrainedTokenizerBase, text: Sequence[int], rng: random.Random) -> list[Prompt]:
        """Prompts whose reference is every question with its key but the first question, which ends the prompt.

        Raises:
            UserError: keys and questions fill the length.
        """
        frame = Frame(tokenizer)
        made = [self._keys(frame, tokenizer, rng) for _ in range(self.count)]
        sizes = [
            self.length - frame.overhead(needles, question) - len(reference) for needles, question, reference in made
        ]
        if min(sizes) < 1:
            raise UserError(
                "keys and questions leave no room for a text",
                where=self.name,
                expected=f"a length of at least {self.length + 1 - min(sizes)} tokens, or fewer or shorter keys",
                found=f"{self.length} tokens",
            )
        low, high = self.depth
        prompts = []
        texts = haystacks(self.haystack, tokenizer, text, sizes, rng, self.name)
        for (needles, question, reference), hay in zip(made, texts, strict=True):
            places = [rng.uniform(low, high) for _ in needles]
            tokens, ranges = frame.insert(hay, list(zip(places, needles, strict=True)), question)
            prompts.append(Prompt(tokens, len(reference), tuple(reference), tuple(ranges), self.task))
        return prompts

    def _keys(
        self, frame: Frame, tokenizer: PreTrainedTokenizerBase, rng: random.Random
    ) -> tuple[list[list[int]], list[int], list[int]]:
        """Sentences of the keys, the first question, and the answer with all later questions."""
        alphabet = ALPHABET.split()
        keys = [" ".join(rng.choice(alphabet) for _ in range(self.words)) for _ in range(self.keys)]
        needles = [frame.needle(NEEDLE.format(ordinal=ORDINALS[i], words=key)) for i, key in enumerate(keys)]
        question = tokenise(tokenizer, ASK.format(ordinal=ORDINALS[0]).strip())
        rest = "".join((ASK.format(ordinal=ORDINALS[i]) if i else "") + f" {key}." for i, key in enumerate(keys))
        return needles, question, tokenise(tokenizer, rest)
