"""Linear heads of a layer by the Triton kernels: what they take, with the arguments that a mixer has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from .linear_layout import Layout
from .linear_states import Rule
from .maps import FeatureMap
from .pages import Pages
from .reference import Rows
from .span import PAGE, Span
from .triton_linear import additive
from .triton_linear_decode import absorb as absorb_page
from .triton_linear_decode import read_one
from .triton_linear_delta import gated_delta
from .triton_linear_features import KINDS, features, features_of_both, sides
from .triton_linear_layout import SEGMENT
from .triton_linear_layout import Layout as Where
from .triton_linear_layout import layout as place

MOST_FEATURES = 1024
MOST_WIDTH = 256  # projected numbers of a map, and features of the delta rule, that a program holds at once


def takes(rule: Rule, count: int, *, trained_decay: bool = False) -> bool:
    """Whether the kernels compute heads of `count` features: all but gradients of an additive state's decays."""
    return count <= MOST_WIDTH if rule == "delta" else count <= MOST_FEATURES and not trained_decay


def fused(kind: str, count: int) -> bool:
    """Whether the kernels compute the feature map of that name."""
    return kind in KINDS and count // sides(kind) <= MOST_WIDTH


def query_features(
    made: FeatureMap,
    kind: str,
    query: torch.Tensor,
    scale: float,
    positions: torch.Tensor | None,
    gain: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Features `[B, H, T, F]` of queries `[B, H, T, D]`, and where they are asked for logarithms of gains `[B, H, T]`.

    Args:
        made, kind: the map and its name.
        positions: `[B, H, T]` or what broadcasts to it.
        gain: `[H]` and `[H, D]`: a number, and what is multiplied with a query and added.
    """
    of, turn = (None, None) if gain is None else gain
    if fused(kind, made.features):
        bias = None if made.query_bias is None else made.query_bias.flatten(0, 1)
        one = query.shape[2] == 1  # then a program has that token of many sequences, as the map is theirs, too
        query = query.transpose(0, 2) if one else query
        found, gains = features(query, made.query.flatten(0, 1), bias, kind, scale, of, turn)
        return (found.transpose(0, 2), None if gains is None else gains.transpose(0, 2)) if one else (found, gains)
    gains = None
    if of is not None and turn is not None:
        gains = of.float()[:, None] + (query.float() * turn.float()[:, None]).sum(-1)
    return made.of_query(query, scale, positions), gains


def pass_features(
    made: FeatureMap,
    kind: str,
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    positions: tuple[torch.Tensor | None, torch.Tensor | None],
    gain: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """What `query_features` gives, and features `[B, G, M, F]` of keys `[B, G, M, D]`.

    Args:
        positions: of queries and of keys.
    """
    ours = fused(kind, made.features)
    bias = made.key_bias
    if ours and not torch.is_grad_enabled() and 0 < key.shape[2] <= query.shape[2] and query.dtype == key.dtype:
        biases = None if made.query_bias is None or bias is None else (made.query_bias.flatten(0, 1), bias)
        return features_of_both(query, key, (made.query.flatten(0, 1), made.key), biases, kind, scale, *(gain or ()))
    k = features(key, made.key, bias, kind, scale)[0] if ours else made.of_key(key, scale, positions[1])
    return *query_features(made, kind, query, scale, positions[0], gain), k


@lru_cache(maxsize=64)
def _where(layout: Layout, rows: Rows, stream: int, own: bool, segment: int) -> Where:
    return place(rows, layout.chunk, stream, count=layout.keys, absorbed=layout.last * PAGE, own=own, segment=segment)


def read_new(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    held: torch.Tensor | None,
    layout: Layout,
    rows: Rows,
    *,
    rule: Rule,
    alone: bool,
    log_decay: torch.Tensor | None,
    strength: torch.Tensor | None,
    mean: bool,
    mass: bool,
    window: tuple[torch.Tensor, torch.Tensor] | None = None,
    log_gain: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What new columns find, and the states behind them, `[B, G, F, E]`.

    Args:
        query: features `[B, H, T, F]`, column by column.
        key, value: features `[B, G, M, F]` and values of the keys of `layout`.
        held: the states before, `[B, G, F, E]` float32; None when they are empty.
        layout: of the whole pass, in one part.
        mean: divide by the sums of weights, and merge with `window`; else the result is a sum, with `mass` in float32.
        mass: then put the sums of weights behind it, `[B, H, T, V + 1]`.
        window, log_gain: see `additive`.
    """
    if not key.shape[2]:
        key, value = (x.new_zeros(*x.shape[:2], PAGE, x.shape[-1]) for x in (key, value))
        strength = None
        log_decay = None if log_decay is None or log_decay.dim() > 1 else log_decay
    # Gradients of the delta rule want the state before every chunk.
    segment = 1 if rule == "delta" and torch.is_grad_enabled() else SEGMENT
    where = _where(layout, rows, key.shape[2], alone, segment)
    if rule == "delta":
        return gated_delta(query, key, value, held, where, log_decay=log_decay, strength=strength)
    options: dict[str, Any] = {"log_decay": log_decay, "mean": mean, "window": window, "log_gain": log_gain}
    options["mass"] = mass
    found, masses, last = additive(query, key, value, held, where, **options)
    return torch.cat([found, masses[..., None]], dim=-1) if mass and not mean else found, last


def absorb(
    held: torch.Tensor,
    pages: Pages,
    lengths: torch.Tensor,
    spans: Sequence[Span],
    made: FeatureMap,
    kind: str,
    scale: float,
    log_decay: torch.Tensor | None,
) -> bool:
    """Take in the pages that leave the sight with a token of each sequence, in place; False where no kernel does."""
    if not fused(kind, made.features):
        return False
    absorb_page(held, pages, lengths, spans, kind, made.key, made.key_bias, scale, log_decay)
    return True


KERNELS = (takes, query_features, pass_features, read_new, absorb, read_one)
