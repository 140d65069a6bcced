"""Associations of words said once and asked for later, at distances that follow one law: MQAR in a model's own words.

Multi-query associative recall (Zoology, arXiv 2312.04927) trains small models on it. Here a pretrained model reads it:
keys and values are words of one token, the context is `k1 v1 k2 v2 ...`, each key comes again once among other words,
and the model has to say its value there. A value follows its key both times, so that the text obeys its own rule.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.data.text import leading_tokens, tokenise
from compress.errors import UserError

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

WORD = re.compile(r" [a-z]{3,}")
POWER = 0.01  # of the law of gaps, Zoology's: nearly as many between 1 and 2 as between 1,000 and 2,000


@dataclass(frozen=True)
class Query:
    """A key that comes again.

    Attributes:
        position: of the key; the model's most likely next token there is its answer.
        value: the token that is right.
        gap: tokens from the value in the context to the key that comes again.
    """

    position: int
    value: int
    gap: int


@dataclass(frozen=True)
class Associations:
    """One text: token ids, and the queries in the order of their positions."""

    tokens: tuple[int, ...]
    queries: tuple[Query, ...]


def words_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that are a space and a word in small letters, which is written as this one token."""
    known = sorted(tokenizer.get_vocab().values())
    texts = tokenizer.batch_decode([[number] for number in known])
    plain = [(number, text) for number, text in zip(known, texts, strict=True) if WORD.fullmatch(text)]
    return [number for number, text in plain if tokenise(tokenizer, text) == [number]]


def associations(
    tokenizer: PreTrainedTokenizerBase,
    words: Sequence[int],
    length: int,
    pairs: int,
    count: int,
    rng: random.Random,
    before: int = 0,
) -> list[Associations]:
    """`count` texts of `length` tokens, or one less, with `pairs` keys each.

    Gaps are drawn without replacement with p(j) proportional to j^(power - 1), in slots of two tokens, as in Zoology.

    Args:
        words: as of `words_of`.
        before: other words before the context, which tokens that always stay visible at the start are among.

    Raises:
        UserError: the length has no room for so many pairs, or the tokenizer has too few words.
    """
    start = leading_tokens(tokenizer)
    free = length - len(start) - before
    slots = free // 2 - pairs
    if slots < pairs:
        raise UserError(
            "the texts have no room for so many associations",
            where=f"length {length}",
            expected=f"at most {max(0, free // 4)} pairs",
            found=f"{pairs}",
        )
    if len(words) < 3 * pairs:
        raise UserError(
            "the tokenizer has too few words of one token",
            where=f"{pairs} pairs",
            expected=f"at least {3 * pairs} words",
            found=f"{len(words)}",
        )
    return [_text(start, words, slots, pairs, rng, before) for _ in range(count)]


def _text(
    start: Sequence[int], words: Sequence[int], slots: int, pairs: int, rng: random.Random, before: int
) -> Associations:
    drawn = rng.sample(list(words), 2 * pairs)
    keys, values = drawn[:pairs], drawn[pairs:]
    taken = set(drawn)
    others = [word for word in words if word not in taken]
    tokens = [*start, *(rng.choice(others) for _ in range(before))]
    first = len(tokens)
    tokens += [token for pair in zip(keys, values, strict=True) for token in pair]
    base = len(tokens)
    tokens += [rng.choice(others) for _ in range(2 * slots)]
    # The largest of u^(1/w) are a sample without replacement by weights w (Efraimidis and Spirakis, 2006).
    levels = [(math.log(1.0 - rng.random()) * (slot + 1) ** (1 - POWER), slot) for slot in range(slots)]
    places = [slot for _, slot in sorted(levels, reverse=True)[:pairs]]
    queries = []
    for number, slot in enumerate(places):
        position = base + 2 * slot
        tokens[position : position + 2] = keys[number], values[number]
        queries.append(Query(position, values[number], position - (first + 2 * number + 1)))
    return Associations(tuple(tokens), tuple(sorted(queries, key=lambda query: query.position)))
