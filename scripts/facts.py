"""Facts for the training text of scripts: stated between paragraphs, and asked for later."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterable, Iterator

from compress.data.key_value import FORMS, NAMES
from compress.data.kinds import KINDS, REWORDED
from compress.data.passkey import NEEDLE, QUESTION
from compress.data.prompt import random_number
from compress.data.questions import DIGITS, TASKS


def drawn_fact(rng: random.Random) -> tuple[str, str, str]:
    """A statement, the question for it and its answer, in the wordings and words for calibration: a pass key, a line
    with a number, or a fact of a kind."""
    kind = rng.choice([*TASKS, *REWORDED])
    if kind == "passkey":
        number = random_number(rng, DIGITS)
        return NEEDLE.format(key=number), QUESTION, number
    if kind == "key_value":
        statement, question = FORMS["sentence"]
        name, number = rng.choice(NAMES), random_number(rng, DIGITS)
        return statement.format(key=name, value=number), question.format(key=name), number
    return KINDS[kind].stated("calibration", rng)


def with_facts(paragraphs: Iterable[str], rng: random.Random, between: int, gaps: tuple[float, float]) -> Iterator[str]:
    """Paragraphs, with facts that are stated between them and asked for later, each with its answer.

    Args:
        between: characters between two statements.
        gaps: of characters from a statement to its question, the least and the most; every doubling of the distance
            is as likely as another. A question whose answer another statement has changed is left out.
    """
    low, high = map(math.log, gaps)
    due: list[tuple[float, int, str, str]] = []  # where, the number of the statement, question and answer
    latest: dict[str, int] = {}  # the number of the last statement by its question
    place, next_statement, number = 0, between, 0
    for paragraph in paragraphs:
        yield paragraph
        place += len(paragraph)
        while due and due[0][0] <= place:
            _, stated, question, answer = heapq.heappop(due)
            if latest[question] == stated:
                yield f"{question} {answer}."
        if place >= next_statement:
            statement, question, answer = drawn_fact(rng)
            yield statement
            number, next_statement = number + 1, place + between
            latest[question] = number
            heapq.heappush(due, (place + math.exp(rng.uniform(low, high)), number, question, answer))
