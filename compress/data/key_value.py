"""Key-value recall: one of several `name: number` lines is asked for (the lines task of LongEval, LMSYS 2023;
used by MoA, arXiv 2406.14909)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from compress.data.haystack import Frame, haystacks, reference_answer
from compress.data.prompt import NumberTask, Prompt
from compress.data.text import tokenise
from compress.errors import UserError
from compress.registry import tasks

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable, Sequence

    from transformers import PreTrainedTokenizerBase

# A line, and the question behind which its number follows.
FORMS = {
    "sentence": ("The number of the {key} is {value}.", "The number of the {key} is"),
    "register": ("line {key}: REGISTER_CONTENT is {value}", "line {key}: REGISTER_CONTENT is"),
}
ADJECTIVES = (
    "amber brave calm dusty eager faint gentle happy icy jolly kind lucky merry noble odd proud quiet rapid shy tall "
    "urban vivid warm young zesty bitter clever distant early frozen golden hollow idle jagged loyal mellow narrow "
    "orange pale rusty"
)
NOUNS = (
    "anchor basket candle drum engine feather garden hammer island jacket kettle ladder mirror needle orchard pencil "
    "river saddle temple window apple bridge carpet desert eagle forest glove harbor insect jungle kitten lantern "
    "meadow napkin otter planet quilt rocket spider tunnel"
)
NAMES = [f"{adjective}-{noun}" for adjective in ADJECTIVES.split() for noun in NOUNS.split()]


@tasks.register("key_value")
class KeyValue(NumberTask):
    """Lines that give numbers to names, spread over a long text; the prompt asks for one far back.

    LongEval fills the whole length with `register` lines. SmolLM2-135M is often wrong with a few such lines already,
    even when dense, so by default two plain sentences lie in natural text: a model that sees only the other one
    gives the wrong number.
    """

    task: Literal["key_value"] = Field("key_value", description="find the number that belongs to a name")
    lines: int | None = Field(2, ge=1, le=len(NAMES), description="number of lines; null fills the length with lines")
    form: Literal["sentence", "register"] = Field(
        "sentence", description="wording: a plain sentence, or LongEval's `line ...: REGISTER_CONTENT is ...`"
    )

    @property
    def around(self) -> str:
        """Filler in what room a length full of lines has left."""
        return "filler" if self.lines is None else self.haystack

    def prompts(self, tokenizer: PreTrainedTokenizerBase, text: Sequence[int], rng: random.Random) -> list[Prompt]:
        """Prompts with `lines` needles each; the line that is asked for is the evidence."""
        frame = Frame(tokenizer)
        depths = self.depths(rng)
        items = [self._item(frame, tokenizer, depth, rng) for depth in depths]
        sizes = [
            self.length - frame.overhead(needles, question) - budget for _, needles, _, question, _, budget in items
        ]
        prompts = []
        for item, hay, depth in zip(
            items, haystacks(self.around, tokenizer, text, sizes, rng, self.name), depths, strict=True
        ):
            value, needles, places, question, reference, budget = item
            tokens, ranges = frame.insert(hay, list(zip(places, needles, strict=True)), question)
            prompts.append(Prompt(tokens, budget, reference, (ranges[0],), self.task, value, depth))
        return prompts

    def _item(
        self, frame: Frame, tokenizer: PreTrainedTokenizerBase, depth: float, rng: random.Random
    ) -> tuple[str, list[list[int]], list[float], list[int], tuple[int, ...], int]:
        """Value, lines (the one asked for first), their depths, question, reference and budget of one prompt."""
        keys = self._keys(rng)
        values = [self.number(rng) for _ in keys]
        line, ask = FORMS[self.form]
        asked = ask.format(key=keys[0])
        question = tokenise(tokenizer, asked)
        reference = reference_answer(tokenizer, question, asked, values[0])
        budget = self.budget(reference)
        made = (frame.needle(line.format(key=key, value=value)) for key, value in zip(keys, values, strict=True))
        needles = list(made) if self.lines is not None else self._fitting(frame, made, self.length - budget, question)
        others = len(needles) - 1
        places = [depth, *((i + 0.5) / others for i in range(others))]
        return values[0], needles, places, question, tuple(reference), budget

    def _keys(self, rng: random.Random) -> list[str]:
        """Different names, the one that is asked for first."""
        return rng.sample(NAMES, self.lines if self.lines is not None else len(NAMES))

    def _fitting(
        self, frame: Frame, needles: Iterable[list[int]], room: int, question: Sequence[int]
    ) -> list[list[int]]:
        """As many lines as the length holds, less the few tokens of filler that make it exact.

        Raises:
            UserError: not even one line fits, or there are too few names for so long a document.
        """
        fitting: list[list[int]] = []
        used = frame.overhead([], question)
        for needle in needles:
            used += frame.overhead([needle], []) - frame.overhead([], [])
            if used >= room and not fitting:
                raise UserError(
                    "the length has no room for a line",
                    where=self.name,
                    expected=f"a length above {self.length - room + used}",
                )
            if used >= room:
                return fitting
            fitting.append(needle)
        raise UserError(
            "there are not enough names to fill the length with lines",
            where=self.name,
            expected=f"at most {used} tokens",
            found=f"{self.length} tokens",
            fix="set `lines` to a number, and text fills the rest",
        )
