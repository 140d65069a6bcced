"""Many questions behind one text, through a model's own cache: the text is read once, and its cache copied.

An answer is right when each of its tokens is the most likely one behind the right ones before it, which is when greedy
decoding writes these tokens. So all answers of a text are one pass, and nothing is decoded step by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compress.data.questions import Question, QuestionedText
from compress.models.cache_bytes import cache_bytes
from compress.models.placement import input_device
from compress.runtime.modeling_compress import CACHE


@dataclass(frozen=True)
class Answers:
    """What a model answered behind one text.

    Attributes:
        right: whether each question was answered right, in their order.
        held: bytes of the cache when the text was read.
    """

    right: tuple[bool, ...]
    held: int


def asked_tokens(question: Question) -> tuple[int, ...]:
    """What is put behind the text: the question and its answer, but the last token, behind which nothing is asked."""
    return (*question.tokens, *question.answer[:-1])


def is_answered(question: Question, likely: Sequence[int]) -> bool:
    """Whether the most likely tokens behind each of `asked_tokens` are the answer's."""
    return tuple(likely[len(question.tokens) - 1 :]) == question.answer


@torch.inference_mode()
def read_text(model: Any, tokens: Sequence[int]) -> Any:
    """The cache of a text, whose logits are of no interest."""
    ids = torch.tensor([list(tokens)], device=input_device(model))
    return getattr(model(input_ids=ids, use_cache=True, logits_to_keep=1), CACHE)


@torch.inference_mode()
def ask(model: Any, text: QuestionedText, cache: Any = None) -> Answers:
    """Read a text, and ask all its questions behind it.

    Args:
        model: dense or planned; its windows may not depend on the length of the input.
        cache: of the text (`read_text`), which is used up; None reads it.
    """
    cache = read_text(model, text.tokens) if cache is None else cache
    held = cache_bytes(cache) or 0
    pieces = [asked_tokens(question) for question in text.questions]
    width = max(map(len, pieces))
    # What pads on the right comes behind the answer, and changes nothing before it.
    ids = torch.tensor([[*piece, *[0] * (width - len(piece))] for piece in pieces])
    cache.batch_repeat_interleave(len(pieces))
    first = min(len(question.tokens) for question in text.questions) - 1
    output = model(
        input_ids=ids.to(input_device(model)),
        use_cache=True,
        logits_to_keep=width - first,
        **{CACHE: cache},
    )
    likely = output.logits.argmax(-1).tolist()
    right = []
    for question, piece, row in zip(text.questions, pieces, likely, strict=True):
        right.append(is_answered(question, [*[-1] * first, *row][: len(piece)]))
    return Answers(tuple(right), held)
