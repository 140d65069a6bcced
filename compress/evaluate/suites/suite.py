"""What every suite has in common: items with exact answers, sized to a length, and how an answer is scored."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from compress.data.text import tokenise
from compress.errors import UserError


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        prompt: the text that the model goes on with.
        answers: what it should write; how many of them count is the suite's score.
        depth: where the evidence lies, 0 at the start to 1 at the question; None where it lies everywhere.
        gap: tokens from the evidence to where it is needed, None where that is not one number.
    """

    prompt: str
    answers: tuple[str, ...]
    depth: float | None = None
    gap: int | None = None


@dataclass(frozen=True)
class Room:
    """A length in tokens that a prompt has to fit in, the answer's tokens already taken off.

    Attributes:
        text: natural text for haystacks.
    """

    tokenizer: Any
    tokens: int
    text: str = ""
    name: str = ""
    sentences: list[str] = field(default_factory=list)

    def size(self, prompt: str) -> int:
        """Tokens of a prompt as the harness counts them, with what the tokenizer puts before a text."""
        return len(self.tokenizer(prompt, verbose=False)["input_ids"])

    def largest(self, build: Callable[[int], str], most: int) -> int:
        """The greatest n <= `most` for which `build(n)` fits, by bisection; `build` must grow with n.

        Raises:
            UserError: not even `build(0)` fits, or all of `build(most)` leaves more than a tenth of the length empty.
        """
        if self.size(build(0)) > self.tokens:
            raise UserError("the length has no room for this suite", where=self.name, expected="a greater length")
        low, high = 0, 1
        while high < most and self.size(build(high)) <= self.tokens:
            low, high = high, min(most, 2 * high)
        if high == most and self.size(build(most)) <= self.tokens:
            if self.size(build(most)) < 0.9 * self.tokens:
                raise UserError(
                    "the text is too short to fill the length",
                    where=self.name,
                    expected=f"at least {self.tokens} tokens",
                    found=f"{self.size(build(most))} tokens",
                    fix="give a longer text",
                )
            return most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.size(build(middle)) <= self.tokens else (low, middle)
        return low


Score = Callable[[str, Sequence[str]], float]


def share_of_all(written: str, answers: Sequence[str]) -> float:
    """Share of the answers that occur in what was written, case ignored (RULER, `string_match_all`)."""
    return sum(answer.lower() in written.lower() for answer in answers) / len(answers)


def any_of(written: str, answers: Sequence[str]) -> float:
    """1 when one of the answers occurs, case ignored (RULER, `string_match_part`)."""
    return float(any(answer.lower() in written.lower() for answer in answers))


def last_number(written: str, answers: Sequence[str]) -> float:
    """1 when the last whole number written is the answer (LongEval lines)."""
    numbers = re.findall(r"\d+", written)
    return float(bool(numbers) and numbers[-1] == answers[0])


def first_number(written: str, answers: Sequence[str]) -> float:
    """1 when the first whole number written is the answer."""
    number = re.search(r"\d+", written)
    return float(number is not None and number.group() == answers[0])


def words_in_order(written: str, answers: Sequence[str]) -> float:
    """Share of the answers that are written in their places, one word each."""
    words = written.split()
    return sum(word == answer for word, answer in zip(words, answers, strict=False)) / len(answers)


@dataclass(frozen=True)
class Suite:
    """A family of questions: `make` writes one that fits, `answer_tokens` are kept for the answer."""

    name: str
    make: Callable[[Room, random.Random], Item]
    answer_tokens: int
    score: Score
    source: str

    def items(self, tokenizer: Any, length: int, count: int, seed: int | str, text: str) -> list[Item]:
        """`count` items of at most `length` tokens, prompt and answer together; the same for the same arguments.

        Raises:
            UserError: the length holds no item.
        """
        if tokenise(tokenizer, "a") == [] or length <= self.answer_tokens:
            raise UserError(
                "the length has no room for an answer",
                where=f"{self.name} at {length}",
                expected=f"more than {self.answer_tokens} tokens",
            )
        room = Room(tokenizer, length - self.answer_tokens, text, f"{self.name} at {length}", sentences_of(text))
        return [self.make(room, random.Random(f"{seed}/{self.name}/{length}/{number}")) for number in range(count)]


SUITES: dict[str, Suite] = {}


def register(name: str, answer_tokens: int, score: Score, source: str) -> Callable[[Any], Any]:
    """Decorator of a `make` function. Raises ValueError when the name is taken."""

    def add(make: Callable[[Room, random.Random], Item]) -> Callable[[Room, random.Random], Item]:
        if name in SUITES:
            raise ValueError(f"suite {name!r} is registered twice")
        SUITES[name] = Suite(name, make, answer_tokens, score, source)
        return make

    return add


def sentences_of(text: str) -> list[str]:
    """The sentences of a text on one line each, without those that are longer than 600 characters."""
    joined = " ".join(text.split())
    return [part for part in re.split(r"(?<=[.!?]) ", joined) if 0 < len(part) <= 600]


def spread(parts: Sequence[str], inserted: Sequence[tuple[float, str]], glue: str = " ") -> str:
    """`parts` with sentences inserted at depths between 0 and 1, all joined by `glue`."""
    pieces, done = [], 0
    for depth, sentence in sorted(inserted, key=lambda pair: pair[0]):
        place = round(depth * len(parts))
        pieces += [*parts[done:place], sentence]
        done = place
    return glue.join([*pieces, *parts[done:]])
