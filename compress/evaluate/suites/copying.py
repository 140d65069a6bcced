"""Copying: a list of random words is begun again and has to be gone on with (copy of Repeat After Me, 2402.01032)."""

from __future__ import annotations

import random

from compress.data.key_value import ADJECTIVES, NOUNS
from compress.evaluate.suites.suite import Item, Room, register, words_in_order

GIVEN, ASKED = 8, 12  # words that are given again, and that have to follow


@register("copy", 48, words_in_order, "after Repeat After Me, arXiv 2402.01032")
def copy(room: Room, rng: random.Random) -> Item:
    """A list of random words, then eight consecutive words of it; the answer is the twelve words that follow them."""
    pool = [*ADJECTIVES.split(), *NOUNS.split()]
    words = [rng.choice(pool) for _ in range(room.tokens)]
    depth = rng.random()

    def build(n: int) -> str:
        count = n + GIVEN + ASKED
        start = round(depth * n)
        return f"{' '.join(words[:count])}\n\nOnce more: {' '.join(words[start : start + GIVEN])}"

    n = room.largest(build, len(words) - GIVEN - ASKED)
    start = round(depth * n) + GIVEN
    return Item(build(n), tuple(words[start : start + ASKED]), depth)
