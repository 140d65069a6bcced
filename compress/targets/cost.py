"""What a plan costs: the bytes of KV cache that the runtime allocates for it."""

from __future__ import annotations

from collections.abc import Iterable

from compress.runtime.span import PAGE, Span


def page_bytes(head_dim: int, itemsize: int) -> int:
    """Bytes of one cache page of one head group: keys and values of 64 tokens."""
    return PAGE * 2 * head_dim * itemsize


def kv_bytes(spans: Iterable[Iterable[Span]], length: int, head_dim: int, itemsize: int) -> int:
    """Bytes that the paged cache holds for one sequence of `length` tokens under a plan's spans `[layers][groups]`."""
    pages = sum(span.page_count(length) for row in spans for span in row)
    return pages * page_bytes(head_dim, itemsize)


def dense_kv_bytes(groups: int, length: int, head_dim: int, itemsize: int) -> int:
    """Bytes that transformers' own cache holds for one sequence: `length` tokens in each of all `groups`."""
    return groups * length * 2 * head_dim * itemsize
