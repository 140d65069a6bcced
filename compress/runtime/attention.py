"""The attention and mask functions that a planned model registers with transformers, and the choice of `impl`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from .paged_cache import PagedCache, PagedLayer
from .reference import decode as reference_decode
from .reference import prefill as reference_prefill


@dataclass(frozen=True)
class Impl:
    """One implementation of the two operations; `reference.py` documents their arguments and is their specification."""

    prefill: Callable[..., torch.Tensor]
    decode: Callable[..., torch.Tensor]


IMPLS = {"reference": Impl(reference_prefill, reference_decode)}


def choose_impl(name: str) -> Impl:
    """The implementation of that name; `auto` is the fastest that runs here.

    Raises:
        ValueError: no such implementation.
    """
    if name == "auto":
        return IMPLS["reference"]
    if name not in IMPLS:
        raise ValueError(f"compress_impl: expected auto or one of {', '.join(IMPLS)}, got {name!r}")
    return IMPLS[name]


# The registry is global to the process and the last registration wins, so the name carries the code's hash:
# two checkpoints with different runtimes can live in one process.
_SOURCES = ("span.py", "paged_cache.py", "reference.py", "attention.py")
_HASH = hashlib.sha256(b"".join(Path(__file__).with_name(name).read_bytes() for name in _SOURCES)).hexdigest()
NAME = f"compress_{_HASH[:12]}"


@dataclass
class Step:
    """What the layers of one forward pass share.

    Attributes:
        cache: the paged cache, None when nothing is cached.
        valid: `[B, T]` bool, which of the new columns are tokens; None when all are.
    """

    cache: PagedCache | None = None
    valid: torch.Tensor | None = None


def plan_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    compress_step: Step | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: `[B, H, T, D]` and the new `[B, G, T, D]` to `[B, T, H, D]`.

    Padding columns take part in nothing: they are neither keys nor stored, and their output is zero.

    Raises:
        RuntimeError: called outside a planned model's forward pass.
    """
    if compress_step is None:
        raise RuntimeError(f"attention {NAME} works only inside a model that carries a plan")
    layer = None if compress_step.cache is None else compress_step.cache.paged[module.layer_idx]
    impl = choose_impl(getattr(module.config, "compress_impl", "auto"))
    attend = _Attend(module.compress_spans, impl, layer, scaling, dropout)
    valid = compress_step.valid
    batch, _, count, _ = query.shape
    if valid is None and (layer is None or len(set(layer.lengths)) <= 1):
        return attend.together(query, key, value, list(range(batch))).transpose(1, 2), None
    out = query.new_zeros(*query.shape[:-1], value.shape[-1])
    rows = list(range(batch)) if valid is None else valid.any(dim=1).nonzero().flatten().tolist()
    if count == 1 and layer is not None:
        out[rows] = attend.one_each(query[rows], key[rows], value[rows], rows)
    else:
        for row in rows:
            kept = slice(None) if valid is None else valid[row].nonzero().flatten()
            part = slice(row, row + 1)
            out[part, :, kept] = attend.together(query[part, :, kept], key[part, :, kept], value[part, :, kept], [row])
    return out.transpose(1, 2), None


@dataclass
class _Attend:
    """The two ways through a layer: sequences that advance together, or one token each at different lengths."""

    spans: list[Any]
    impl: Impl
    layer: PagedLayer | None
    scale: float | None
    dropout: float

    def together(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """T new tokens of sequences of equal length; attends first, then stores, because storing evicts."""
        past = self.layer.lengths[rows[0]] if self.layer is not None else 0
        if self.layer is not None and query.shape[2] == 1 and past > 0:
            return self.one_each(query, key, value, rows)
        history = None
        if self.layer is not None and past > 0:
            history = [self.layer.history(rows, group) for group in range(len(self.spans))]
        out = self.impl.prefill(
            query, key, value, self.spans, past=past, history=history, scale=self.scale, dropout=self.dropout
        )
        if self.layer is not None:
            self.layer.append(key, value, rows)
        return out

    def one_each(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """One new token each; stored first, since what its page turn frees is out of this query's sight already."""
        layer = self.layer
        assert layer is not None
        layer.append_one(key, value, rows)
        places, numbers = layer.table()
        lengths = torch.tensor([layer.lengths[row] for row in rows], device=query.device)
        if len(rows) < places.shape[0]:
            places, numbers = places[rows], numbers[rows]
        out = self.impl.decode(
            query[:, :, 0], layer.keys, layer.values, places, numbers, lengths, self.spans, scale=self.scale
        )
        return out[:, :, None]


def plan_mask(*args: Any, **kwargs: Any) -> None:
    """transformers' mask interface: no mask tensor is ever built; spans and padding reach the layers in `Step`."""
    return None


AttentionInterface.register(NAME, plan_attention)
AttentionMaskInterface.register(NAME, plan_mask)
