"""Haystacks at token level: cut from a text or made of filler, with sentences inserted at known places."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.data.text import leading_tokens, tokenise
from compress.errors import UserError

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

# The sentences that pass-key tests repeat since Landmark Attention (arXiv 2305.16300).
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
GAP = "\n\n"


def windows(text: Sequence[int], sizes: Sequence[int], rng: random.Random, where: str) -> list[list[int]]:
    """One window of each size, their starts spread over the text: one random start in each equal stretch of it.

    Raises:
        UserError: the text is shorter than a window.
    """
    if max(sizes) > len(text):
        raise UserError(
            "the text is too short",
            where=where,
            expected=f"at least {max(sizes)} tokens in this part of the text",
            found=f"{len(text)} tokens",
            fix="ask for shorter documents, or give a longer text",
        )
    result = []
    for number, size in enumerate(sizes):
        room = len(text) - size
        start = int(room * (number + rng.random()) / len(sizes))
        result.append(list(text[start : start + size]))
    return result


def filler(tokenizer: PreTrainedTokenizerBase, size: int) -> list[int]:
    """`size` tokens of repeated filler sentences."""
    unit = tokenise(tokenizer, FILLER)
    return (unit * (size // len(unit) + 1))[:size]


def haystacks(
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    text: Sequence[int],
    sizes: Sequence[int],
    rng: random.Random,
    where: str,
) -> list[list[int]]:
    """One haystack of each size, `natural` or `filler`.

    Raises:
        UserError: a size is not positive (needle and question fill the length), or the text is too short.
    """
    if min(sizes) < 1:
        raise UserError(
            "the length has no room for a haystack",
            where=where,
            expected=f"a length of at least {1 - min(sizes)} tokens more",
        )
    if kind == "filler":
        return [filler(tokenizer, size) for size in sizes]
    return windows(text, sizes, rng, where)


class Frame:
    """The parts of a prompt around its haystack, tokenised once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.start = leading_tokens(tokenizer)
        self.gap = tokenise(tokenizer, GAP)

    def needle(self, sentence: str) -> list[int]:
        """Token ids of a sentence that `insert` sets between blank lines."""
        return tokenise(self.tokenizer, sentence)

    def overhead(self, needles: Sequence[Sequence[int]], question: Sequence[int]) -> int:
        """Tokens of a prompt besides its haystack."""
        inserted = sum(len(needle) + 2 * len(self.gap) for needle in needles)
        return len(self.start) + inserted + len(self.gap) + len(question)

    def insert(
        self,
        haystack: Sequence[int],
        needles: Sequence[tuple[float, Sequence[int]]],
        question: Sequence[int],
    ) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
        """The prompt, and the token range of each needle in the order given.

        Args:
            needles: (depth, token ids); depth 0 is before the haystack and 1 behind it.
        """
        tokens, ranges, done = list(self.start), [(0, 0)] * len(needles), 0
        for number in sorted(range(len(needles)), key=lambda i: needles[i][0]):
            depth, needle = needles[number]
            place = round(depth * len(haystack))
            tokens += [*haystack[done:place], *self.gap]
            ranges[number] = (len(tokens), len(tokens) + len(needle))
            tokens += [*needle, *self.gap]
            done = place
        tokens += [*haystack[done:], *self.gap, *question]
        return tuple(tokens), ranges


def reference_answer(tokenizer: PreTrainedTokenizerBase, question: Sequence[int], text: str, answer: str) -> list[int]:
    """Token ids of `answer` as the tokenizer writes them behind a question, whose own tokens are `question`.

    Some tokenizers mark the space before a word and others the word, so the answer is read off the joint text.
    """
    joint = tokenise(tokenizer, f"{text} {answer}")
    if joint[: len(question)] == list(question):
        return joint[len(question) :]
    return tokenise(tokenizer, f" {answer}")
