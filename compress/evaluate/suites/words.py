"""Counting words: common words and frequent coded words (RULER, arXiv 2404.06654, appendix B)."""

from __future__ import annotations

import random
import string

from compress.data.key_value import NAMES, NOUNS
from compress.evaluate.suites.suite import Item, Room, register, share_of_all

COMMON, COMMON_TIMES, OTHER_TIMES = 10, 30, 3
COMMON_PROMPT = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 "
    "words that appear most often in the list are:"
)
FREQUENT_PROMPT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text? Answer: According to the coded text above, the "
    "three most frequently appeared words are:"
)
ALPHA = 2.0  # of the zeta distribution
VOCABULARY = 2000


def _listed(words: list[str], rng: random.Random) -> str:
    shuffled = list(words)
    rng.shuffle(shuffled)
    return " ".join(f"{number}. {word}" for number, word in enumerate(shuffled, 1))


@register("cwe", 120, share_of_all, "RULER, arXiv 2404.06654")
def common_words(room: Room, rng: random.Random) -> Item:
    """Ten words thirty times each among words that come three times, behind a small solved example.

    Where the length does not hold the ten words thirty times, they come ten times, and the others once.
    """
    pool = rng.sample(NAMES, len(NAMES))
    common, others = pool[:COMMON], pool[COMMON:]
    shown, shown_others = others[:COMMON], others[COMMON : 2 * COMMON]
    others = others[2 * COMMON :]
    others += [
        f"{name}-{noun}" for name in others for noun in NOUNS.split()
    ]  # for lengths that hold more than all names
    example = COMMON_PROMPT.format(context=_listed(shown * 10 + shown_others, random.Random(rng.random())))
    example += " " + " ".join(f"{number}. {word}" for number, word in enumerate(shown, 1)) + "\n"
    order = rng.random()
    full = room.size(example + COMMON_PROMPT.format(context=_listed(common * COMMON_TIMES, rng)))
    times, other_times = (COMMON_TIMES, OTHER_TIMES) if full <= room.tokens else (10, 1)

    def build(n: int) -> str:
        words = common * times + others[:n] * other_times
        return example + COMMON_PROMPT.format(context=_listed(words, random.Random(order)))

    return Item(build(room.largest(build, len(others))), tuple(common))


@register("fwe", 50, share_of_all, "RULER, arXiv 2404.06654")
def frequent_words(room: Room, rng: random.Random) -> Item:
    """Coded words whose counts follow a zeta law; the first place is taken by dots, the next three are asked for."""
    words: list[str] = []
    while len(words) < VOCABULARY:
        word = "".join(rng.choices(string.ascii_lowercase, k=6))
        if word not in words:
            words.append(word)
    words[0] = "...."
    weights = [(rank + 1) ** -ALPHA for rank in range(VOCABULARY)]
    total = sum(weights)
    order = rng.random()

    def build(n: int) -> str:
        # Counts by the law itself, largest first, so that the ranks are exact.
        coded = [word for word, weight in zip(words, weights, strict=True) for _ in range(int(n * weight / total))]
        random.Random(order).shuffle(coded)
        return FREQUENT_PROMPT.format(context=" ".join(coded))

    return Item(build(room.largest(build, 2 * room.tokens)), tuple(words[1:4]))
