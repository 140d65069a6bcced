"""In-context associative recall: pairs of words, one key again after a gap (MQAR of Zoology, arXiv 2312.04927).

Zoology trains on the task with a vocabulary of its own. A language model is asked in words that are one token
each, one query an item, the gap drawn by the same power law, so that recall can be told inside and beyond a window.
"""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

from compress.errors import UserError
from compress.evaluate.suites.suite import Item, Room, register, words_in_order

PAIRS = 8
POWER = 0.01


@lru_cache(maxsize=8)
def _single(tokenizer: Any) -> tuple[str, ...]:
    """Words of four letters or more that the tokenizer writes as one token behind a space."""
    words = []
    for token in range(len(tokenizer)):
        word = tokenizer.decode([token])
        if word[:1] == " " and len(word) > 4 and word[1:].isascii() and word[1:].isalpha() and word[1:].islower():
            words.append(word[1:])
    return tuple(sorted(set(words)))


@register("mqar", 4, words_in_order, "after MQAR, Zoology, arXiv 2312.04927")
def recall(room: Room, rng: random.Random) -> Item:
    """Eight pairs of a key and a value, random words that are not keys, then one key: the answer is its value.

    `gap` is the distance between the pair and the question in tokens.
    """
    words = _single(room.tokenizer)
    if len(words) < 4 * PAIRS:
        raise UserError("this tokenizer has too few words that are one token", where=room.name, found=str(len(words)))
    chosen = rng.sample(words, 2 * PAIRS)
    keys, values = chosen[:PAIRS], chosen[PAIRS:]
    rest = sorted(set(words) - set(chosen))
    # j^(a - 1) over 1..J by its inverse distribution function, J what the length holds.
    most = room.tokens - 2 * PAIRS - 4
    gap = max(1, min(most, int((rng.random() * (most**POWER - 1) + 1) ** (1 / POWER))))
    asked = rng.randrange(PAIRS)
    before = [rng.choice(rest) for _ in range(max(0, most - gap))]
    pairs = [word for pair in zip(keys, values, strict=True) for word in pair]
    between = [rng.choice(rest) for _ in range(gap)]
    prompt = " ".join([*before, *pairs, *between, keys[asked]])
    distance = gap + 2 * (PAIRS - asked)
    size = room.size(prompt)
    if size > room.tokens:  # words that are one token behind a space may be more at the start
        prompt = " ".join([*before[size - room.tokens :], *pairs, *between, keys[asked]])
    return Item(prompt, (values[asked],), gap=distance)
