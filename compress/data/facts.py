"""Facts of many kinds in many wordings, stated once in a long text, one of them asked for at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from compress.data.haystack import Frame, haystacks, reference_answer
from compress.data.kinds import KINDS, Wordings
from compress.data.prompt import Prompt, RecallTask
from compress.data.text import tokenise
from compress.registry import tasks

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase


@tasks.register("facts")
class Facts(RecallTask):
    """Numbers, words, names, dates, identifiers, lines of a list, a passage to go on with ... in one long text.

    Every document states facts of different kinds and asks for one; the kinds take turns over the documents. The
    documents of `wordings: evaluation` have other wordings and words, and kinds of their own. With `asked` a document
    asks for several, as an answer of questions and answers in turn, of which a recall counts the first.
    """

    task: Literal["facts"] = Field("facts", description="find one of several facts of many kinds")
    wordings: Wordings = Field(
        "calibration",
        description="which kinds, wordings and words: those to calibrate with, or those kept for evaluation",
    )
    kinds: tuple[str, ...] | None = Field(
        None, min_length=1, description=f"kinds that are asked for, of {', '.join(KINDS)}; null is all that there are"
    )
    facts: int = Field(3, ge=1, le=len(KINDS), description="facts in a document, each of another kind")
    asked: int = Field(
        1,
        ge=1,
        le=len(KINDS),
        description="of how many of them is asked, one behind the other; more than one have `answer: text`, and a "
        "document of theirs says as much as so many documents, for one reading of the text",
    )

    @model_validator(mode="after")
    def _known(self) -> Facts:
        known = self._all()
        for kind in self.kinds or ():
            if kind not in known:
                raise ValueError(f"kinds: expected some of {', '.join(known)} for {self.wordings}, got {kind!r}")
        if self.facts > len(known):
            raise ValueError(f"facts: expected at most {len(known)} for {self.wordings}, got {self.facts}")
        if self.asked > self.facts:
            raise ValueError(f"asked: expected at most {self.facts}, the number of `facts`, got {self.asked}")
        if self.asked > 1 and self.answer != "text":
            raise ValueError(
                "asked: several questions have `answer: text`, since each stands behind the answers before"
            )
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `asked` where it is one: documents from before there were more stay the same."""
        written: dict[str, Any] = write(self)
        if written.get("asked") == 1:
            written.pop("asked")
        return written

    @property
    def label(self) -> str:
        """With the kinds, where they are chosen."""
        return self.task if self.kinds is None else f"{self.task} {', '.join(self.kinds)}"

    def _all(self) -> list[str]:
        return [name for name, kind in KINDS.items() if self.wordings in kind.forms]

    def prompts(self, tokenizer: PreTrainedTokenizerBase, text: Sequence[int], rng: random.Random) -> list[Prompt]:
        """Prompts whose evidence is the statement of each fact that is asked for.

        Of several questions the first ends the prompt; the others are in the reference, each behind the answer before.
        """
        frame, asked = Frame(tokenizer), list(self.kinds or self._all())
        depths = self.depths(rng)
        made = [self._document(frame, asked[i % len(asked)], rng) for i in range(self.count)]
        sizes = [self.length - frame.overhead(needles, question) - budget for needles, question, _, _, budget in made]
        texts = haystacks(self.haystack, tokenizer, text, sizes, rng, self.name)
        prompts = []
        for (needles, question, expected, reference, budget), hay, depth in zip(made, texts, depths, strict=True):
            places = [depth, *(rng.random() for _ in needles[1:])]
            tokens, ranges = frame.insert(hay, list(zip(places, needles, strict=True)), question)
            evidence = tuple(ranges[: self.asked])
            prompts.append(Prompt(tokens, budget, tuple(reference), evidence, self.task, expected, depth))
        return prompts

    def _document(
        self, frame: Frame, asked: str, rng: random.Random
    ) -> tuple[list[list[int]], list[int], str, list[int], int]:
        """Statements (those asked for first), the first question, its answer, the reference and the budget for it."""
        others = rng.sample([kind for kind in self._all() if kind != asked], self.facts - 1)
        (statement, first, expected), *more = [KINDS[kind].stated(self.wordings, rng) for kind in (asked, *others)]
        ids = tokenise(frame.tokenizer, first)
        reference = reference_answer(frame.tokenizer, ids, first, expected)
        for _, question, answer in more[: self.asked - 1]:
            joint = tokenise(frame.tokenizer, question)
            reference += [*frame.gap, *joint, *reference_answer(frame.tokenizer, joint, question, answer)]
        needles = [frame.needle(text) for text in (statement, *(other[0] for other in more))]
        return needles, ids, expected, reference, self.budget(reference)
