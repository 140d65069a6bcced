"""One long text that states many facts, with a question for each: what compresses a text without knowing the question.

Every question is asked behind the same text, as in kvpress's pipeline, so the text is read once for all of them. The
kinds, wordings and words are those kept for evaluation (`kinds`), which no calibration document has; beside them are a
pass key and one of two lines, the tasks that other tables have.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.data.haystack import Frame, haystacks, reference_answer
from compress.data.key_value import FORMS, NAMES
from compress.data.kinds import KINDS, NEW_KINDS, REWORDED
from compress.data.passkey import NEEDLE, QUESTION
from compress.data.prompt import random_number
from compress.data.text import tokenise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

TASKS = ("passkey", "key_value")
ASKED = (*TASKS, *REWORDED, *NEW_KINDS)
DIGITS = 5


@dataclass(frozen=True)
class Question:
    """A question behind a text.

    Attributes:
        kind: of the fact, one of `ASKED`.
        tokens: token ids of the question, which the answer follows.
        answer: token ids of the right answer.
        expected: the same as text.
        evidence: half-open range of the statement's tokens in the text.
    """

    kind: str
    tokens: tuple[int, ...]
    answer: tuple[int, ...]
    expected: str
    evidence: tuple[int, int]


@dataclass(frozen=True)
class QuestionedText:
    """A text, and the questions that are asked behind it, each for itself and all in the order of `ASKED`."""

    tokens: tuple[int, ...]
    questions: tuple[Question, ...]


def questioned_texts(
    tokenizer: PreTrainedTokenizerBase, text: Sequence[int], length: int, count: int, seed: int | str
) -> list[QuestionedText]:
    """`count` texts of exactly `length` tokens, the same for the same (seed, length, tokenizer, text).

    Statements stand at random places, one in each equal stretch of a text, in a random order.

    Args:
        text: token ids of the text that haystacks are cut from.
        length: of a text, without its questions.

    Raises:
        UserError: the length has no room for the statements, or the text is too short.
    """
    rng = random.Random(f"{seed}/questions/{length}")
    frame = Frame(tokenizer)
    made = [[_fact(kind, rng) for kind in ASKED] for _ in range(count)]
    needles = [[frame.needle(statement) for fact in facts for statement in fact[0]] for facts in made]
    sizes = [length - frame.overhead(parts, []) for parts in needles]
    texts = []
    for facts, parts, hay in zip(
        made, needles, haystacks("natural", tokenizer, text, sizes, rng, f"questions {length}"), strict=True
    ):
        places = [(number + rng.random()) / len(parts) for number in range(len(parts))]
        rng.shuffle(places)
        tokens, ranges = frame.insert(hay, list(zip(places, parts, strict=True)), [])
        first, questions = 0, []
        for kind, (statements, question, expected) in zip(ASKED, facts, strict=True):
            ids = tokenise(tokenizer, question)
            answer = reference_answer(tokenizer, ids, question, expected)
            questions.append(Question(kind, tuple(ids), tuple(answer), expected, ranges[first]))
            first += len(statements)
        texts.append(QuestionedText(tokens, tuple(questions)))
    return texts


def _fact(kind: str, rng: random.Random) -> tuple[list[str], str, str]:
    """Statements (the one asked for first), question and answer."""
    if kind == "passkey":
        key = random_number(rng, DIGITS)
        return [NEEDLE.format(key=key)], QUESTION, key
    if kind == "key_value":
        line, ask = FORMS["sentence"]
        names, values = rng.sample(NAMES, 2), [random_number(rng, DIGITS) for _ in range(2)]
        lines = [line.format(key=name, value=value) for name, value in zip(names, values, strict=True)]
        return lines, ask.format(key=names[0]), values[0]
    statement, question, expected = KINDS[kind].stated("evaluation", rng)
    return [statement], question, expected
