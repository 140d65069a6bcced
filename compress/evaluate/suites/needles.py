"""Needles in a haystack: RULER's eight retrieval tasks (arXiv 2404.06654, appendix B) and the pass key."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from compress.data.haystack import FILLER
from compress.data.key_value import NAMES
from compress.data.passkey import NEEDLE, QUESTION
from compress.evaluate.suites.suite import Item, Room, first_number, register, share_of_all, spread

SENTENCE = "One of the special magic {kind} for {key} is: {value}."
PROMPT = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {asked} mentioned in the provided "
    "text? The special magic {kind} for {asked} mentioned in the provided text are"
)
ONE_SENTENCE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat is the special magic {kind} for {asked} mentioned in the provided text? "
    "The special magic {kind} for {asked} mentioned in the provided text is"
)
SOURCE = "RULER, arXiv 2404.06654"


@dataclass(frozen=True)
class Needles:
    """One of RULER's retrieval tasks: what surrounds the needles, what keys and values are, and how many there are.

    Args:
        haystack: `noise` repeats five sentences, `text` is natural, `needles` is made of other needles.
        keys: needles with keys that are not asked for are `keys` less `queries`.
        values: values of every key that is asked for.
    """

    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


TASKS = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("text"),
    "niah_single_3": Needles("text", value="uuids"),
    "niah_multikey_1": Needles("text", keys=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", key="uuids", value="uuids"),
    "niah_multivalue": Needles("text", values=4),
    "niah_multiquery": Needles("text", keys=4, queries=4),
}


def draw(kind: str, rng: random.Random) -> str:
    """A random word pair, 7-digit number or UUID."""
    if kind == "words":
        return rng.choice(NAMES)
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _maker(task: Needles) -> Callable[[Room, random.Random], Item]:
    def make(room: Room, rng: random.Random) -> Item:
        keys: list[str] = []
        while len(keys) < max(task.keys, task.queries):
            key = draw(task.key, rng)
            if key not in keys:
                keys.append(key)
        values = [[draw(task.value, rng) for _ in range(task.values)] for _ in keys]
        pairs = [(key, value) for key, answers_of_key in zip(keys, values, strict=True) for value in answers_of_key]
        depths = [rng.random() for _ in pairs]
        needles = [
            (depth, SENTENCE.format(kind=task.value, key=key, value=value))
            for depth, (key, value) in zip(depths, pairs, strict=True)
        ]
        asked = ", ".join(keys[: task.queries - 1]) + (", and " if task.queries > 1 else "") + keys[task.queries - 1]
        plain = task.values == 1 and task.queries == 1
        form, kind = (ONE_SENTENCE, task.value.removesuffix("s")) if plain else (PROMPT, task.value)
        others: list[str] = []
        offset = rng.randrange(max(1, len(room.sentences)))

        def parts(n: int) -> list[str]:
            if task.haystack == "noise":
                return [FILLER.strip()] * n
            if task.haystack == "text":
                return (room.sentences[offset:] + room.sentences[:offset])[:n]
            while len(others) < n:
                key = draw(task.key, rng)
                if key not in keys:
                    others.append(SENTENCE.format(kind=task.value, key=key, value=draw(task.value, rng)))
            return others[:n]

        glue = " " if task.haystack == "text" else "\n"

        def build(n: int) -> str:
            return form.format(kind=kind, asked=asked, context=spread(parts(n), needles, glue))

        most = len(room.sentences) if task.haystack == "text" else room.tokens
        answers = tuple(value for answers_of_key in values[: task.queries] for value in answers_of_key)
        return Item(build(room.largest(build, most)), answers, depths[0] if len(answers) == 1 else None)

    return make


for _name, _task in TASKS.items():
    register(_name, 128, share_of_all, SOURCE)(_maker(_task))


@register("passkey", 12, first_number, "Landmark Attention, arXiv 2305.16300; needle and question as in calibration")
def passkey(room: Room, rng: random.Random) -> Item:
    """A five-digit number said twice in one sentence of natural text."""
    key, depth = str(rng.randint(10**4, 10**5 - 1)), rng.random()
    needle = (depth, f"\n\n{NEEDLE.format(key=key)}\n\n")
    offset = rng.randrange(len(room.sentences))
    hay = room.sentences[offset:] + room.sentences[:offset]

    def build(n: int) -> str:
        return f"{spread(hay[:n], [needle])}\n\n{QUESTION}"

    return Item(build(room.largest(build, len(hay))), (key,), depth)
