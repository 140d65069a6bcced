"""Labels that tell apart the results of one task with different settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def distinct_labels(labels: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The labels, each with what sets its task apart from the first one of the same label and length.

    Args:
        settings: of every task, as in the recipe.
    """
    first: dict[tuple[str, Any], Mapping[str, Any]] = {}
    distinct: list[str] = []
    for label, task in zip(labels, settings, strict=True):
        other = first.setdefault((label, task.get("length")), task)
        apart = [_words(key, task[key]) for key in task if task[key] != other.get(key)]
        distinct.append(", ".join([label, *apart]))
    return distinct


def _words(key: str, value: Any) -> str:
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return value if isinstance(value, str) else f"{key} {value}"
