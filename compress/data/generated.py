"""Text that the dense model writes itself, so that training needs no corpus and a small one is not learnt by heart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from compress.data.text import MOST, PATTERN, Excerpt, Part, PartText, Source, TextSource, tokenise
from compress.errors import UserError
from compress.limits import BATCH, LONGEST
from compress.registry import sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from compress.data.reader import Reader

FORESEEN = 2**22  # tokens that stand for those of a text, at most
MOST_WRITTEN = 2**33  # tokens, which take 32 GiB on the disk
# Documents that are written at once, where the memory has room for them. On a GPU much of a step of 512 is small
# kernels, which take as long for twice as many.
AT_ONCE = {"cpu": 16, "cuda": 1024}


@sources.register("generated")
class GeneratedText(Source):
    """Documents that the dense model writes, as LLM-QAT does (arXiv 2305.17888).

    A document begins with a random word of the vocabulary, goes on with a few most likely tokens, and then with tokens
    drawn from the model's own distribution. The random beginning makes documents differ, the likely tokens behind it
    turn an unlikely word into the beginning of a sentence, and drawing keeps the model from repeating itself: of the
    three ways that LLM-QAT compares, this one loses least. Tokens that are much less likely than the likeliest are not
    drawn (LLM-QAT draws from the 50 most likely): each of them alone is rare, but a long text meets many, and a small
    model that has written them goes on in noise.
    """

    source: Literal["generated"] = Field("generated", description="text that the dense model writes itself")
    tokens: int = Field(
        ge=1,
        le=MOST_WRITTEN,
        description="tokens of the calibration part; those held out and for evaluation have half as many, of their own "
        "documents",
    )
    length: int = Field(
        1024,
        ge=16,
        le=LONGEST,
        description="tokens of a document, behind an end of text of several; no more than the model writes without "
        "repeating itself. Sequences of the training may hold several documents",
    )
    greedy: int = Field(4, ge=0, le=1024, description="most likely tokens behind the random first one of a document")
    temperature: float = Field(1.0, ge=0.01, le=100, description="temperature of all tokens behind these")
    least: int = Field(
        32,
        ge=0,
        le=1024,
        description="tokens that a text has at least before it may end: behind an unlikely word an end is often the "
        "most likely token",
    )
    min_p: float = Field(
        0.004,
        ge=0,
        lt=1,
        description="tokens whose probability is below this share of the most likely one's are not drawn; 0 draws from "
        "the whole distribution",
    )
    batch: int | None = Field(
        None, ge=1, le=BATCH, description="documents written at once; null takes what the device has room for"
    )
    given: TextSource | None = Field(None, description="another text to mix in; its parts stay apart, too")
    share: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="of `tokens`, written by the model; the rest is the given text, as far as it reaches"
    )

    @model_validator(mode="after")
    def _mixed(self) -> GeneratedText:
        if (self.given is None) != (self.share == 1):
            raise ValueError("expected both or neither of `given` and a `share` below 1")
        return self

    def size(self, part: Part) -> int:
        """Tokens of a part."""
        return math.ceil(self.tokens * PATTERN.count(part) / PATTERN.count("calibration"))

    def written(self, part: Part) -> int:
        return math.ceil(self.size(part) * self.share)

    @property
    def written_length(self) -> int:
        return self.length

    @property
    def facts(self) -> dict[str, Any]:
        """All that a written document depends on besides the model, its seed and its number."""
        return {
            "length": self.length,
            "greedy": self.greedy,
            "temperature": self.temperature,
            "min_p": self.min_p,
            "least": self.least,
        }

    def read(self, reader: Reader, part: Part, tokens: int) -> PartText:
        """All that there is of a part, whatever is asked for: the model's documents, then the given text.

        Raises:
            UserError: as `sampled`, or of the given text.
        """
        from compress.data.sampled import sampled

        sample, key = sampled(reader, self, part, self.written(part))
        if self.given is None:
            return PartText(sample, key)
        room = self.size(part) - len(sample)
        other = self.given.read(reader, part, room)
        sample.extend(other.ids[:room])
        return PartText(sample, f"{key} {other.key}")

    def whole(self, reader: Reader) -> str:
        """The part for evaluation, in words, without special tokens."""
        ids = self.read(reader, "evaluation", self.size("evaluation")).ids
        return str(reader.tokenizer.decode(list(ids), skip_special_tokens=True))

    def known(self, most: int = MOST) -> Excerpt:
        """What was asked for, and the given text: keys have the model and its seed besides."""
        asked = self.model_dump_json(exclude={"batch"})
        if self.given is None:
            return Excerpt(asked)
        given = self.given.known(most)
        return Excerpt(asked + given.text, given.used)

    def foreseen(self, tokenizer: PreTrainedTokenizerBase, known: str, part: Part) -> Sequence[int]:
        """As many tokens as there will be, all of them the same, and not more than documents can use."""
        return tokenise(tokenizer, " the")[:1] * min(self.size(part), FORESEEN)

    def check(self, context: int | None) -> None:
        """Check the length of the documents. Raises UserError."""
        if context is not None and self.length > context:
            raise UserError(
                "the documents that the model is to write are longer than its context",
                where="source: generated",
                expected=f"length of at most {context} tokens",
                found=f"{self.length}",
            )
