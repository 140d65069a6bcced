"""What a plan costs for an input: the bytes of KV cache that the runtime allocates, and the attention it computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from compress.runtime.span import PAGE, AnySpan, spans_at


def page_bytes(head_dim: int, itemsize: int) -> int:
    """Bytes of one cache page of one head group: keys and values of 64 tokens."""
    return PAGE * 2 * head_dim * itemsize


def kv_bytes(spans: Iterable[Iterable[AnySpan]], length: int, head_dim: int, itemsize: int) -> int:
    """Bytes that the paged cache holds for one sequence of `length` tokens under a plan's spans `[layers][groups]`."""
    pages = sum(span.page_count(length) for row in spans_at(spans, length) for span in row)
    return pages * page_bytes(head_dim, itemsize)


def dense_kv_bytes(groups: int, length: int, head_dim: int, itemsize: int) -> int:
    """Bytes that transformers' own cache holds for one sequence: `length` tokens in each of all `groups`."""
    return groups * length * 2 * head_dim * itemsize


def stock_kv_bytes(
    windows: Sequence[int | None], kv_heads: int | Sequence[int], length: int, head_dim: int, itemsize: int
) -> int:
    """Bytes that transformers' own cache holds for one sequence while it decodes token `length`.

    Args:
        kv_heads: key/value heads of every layer, or layer by layer.
        windows: per layer, its sliding window in tokens; None where it sees everything. A sliding layer keeps
            `window - 1` tokens between two steps, and the new one is beside them while a step runs.
    """
    heads = [kv_heads] * len(windows) if isinstance(kv_heads, int) else kv_heads
    return sum(
        dense_kv_bytes(own, length if window is None else min(length, window), head_dim, itemsize)
        for own, window in zip(heads, windows, strict=True)
    )


def prefill_density(spans: Iterable[Iterable[AnySpan]], length: int) -> float:
    """Visible pairs of query and key over causal pairs in a prefill, all head groups together, token by token.

    One minus this is the prefill sparsity of Sparse Frontier (arXiv 2504.17768), which counts whole blocks.
    """
    t = torch.arange(length)
    counts = Counter(span for row in spans_at(spans, length) for span in row)
    seen = 0
    for span, number in counts.items():
        first = span.first(t)
        seen += number * int((t + 1 - first + first.clamp(max=span.sink)).sum())
    return seen / (counts.total() * length * (length + 1) / 2)


def visible_keys(span: AnySpan, length: int) -> int:
    """Keys that the query at the end of `length` tokens sees in one head group."""
    fixed = span.at_length(length)
    first = int(fixed.first(length - 1))
    return length - first + min(fixed.sink, first)


def decode_density(spans: Iterable[Iterable[AnySpan]], length: int) -> float:
    """Keys that the query at the end of `length` tokens sees over all keys, all head groups together.

    One minus this is the decode sparsity of Sparse Frontier; the bytes held are whole pages, `kv_bytes`.
    """
    counts = Counter(span for row in spans for span in row)
    return sum(number * visible_keys(span, length) for span, number in counts.items()) / (counts.total() * length)
