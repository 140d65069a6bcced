"""The suites as documents that lm-eval takes: from our own command, and from lm-eval's by the files beside this."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compress.data.text import EmbeddedText
from compress.evaluate.suites import SUITES


def documents(name: str, tokenizer: Any, length: int, count: int, seed: int | str, text: str) -> Any:
    """One suite's items as the split `test` of a data set."""
    from datasets import Dataset

    items = SUITES[name].items(tokenizer, length, count, seed, text)
    return {"test": Dataset.from_list([{"suite": name, **vars(item)} for item in items])}


def score(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval's `process_results`."""
    return {"score": SUITES[doc["suite"]].score(results[0], doc["answers"])}


def load(
    suite: str,
    tokenizer: str | None = None,
    pretrained: str | None = None,
    length: int = 2048,
    count: int = 20,
    seed: int = 0,
    **_: Any,
) -> Any:
    """lm-eval's `custom_dataset`: haystacks are cut from the text that every Python carries.

    Args:
        tokenizer: name or folder; by default that of the model that is evaluated.
    """
    from compress.models.load import load_tokenizer

    name = tokenizer or pretrained
    if name is None:
        raise ValueError('a suite is sized in tokens: give --metadata \'{"tokenizer": "..."}\'')
    return documents(suite, load_tokenizer(name), length, count, seed, EmbeddedText().load())
