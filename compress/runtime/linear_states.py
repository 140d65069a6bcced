"""States of linear attention in plain PyTorch, the specification: chunked, recurrent and parallel form of one function.

A state is a matrix that keys write into and queries read from. Two rules write, with a decay a <= 1 a token that is
kept as its logarithm:

    add     S <- a S + k [v, 1]^T                          the last column sums the keys: the normaliser
            (arXiv 2006.16236; with a decay arXiv 2307.08621, 2401.04658)
    delta   S <- a S;  S <- S + b k (v - S^T k)^T          b is the write strength (arXiv 2406.06484, 2412.06464)

and y = S^T q reads. Keys and queries are features, what the maps made of them. What accumulates is float32, whatever
comes in; float64 stays float64. Decays are only ever applied as powers of differences that are <= 0, so that none
overflows.

Shapes: B sequences, G key/value heads, H query heads (head h reads the state of group h // (H / G)), F features, V
numbers of a value, E = V + 1 columns for `add` and V for `delta`, N chunks of 64 tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional

from .span import PAGE

Rule = Literal["add", "delta"]


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32, or in float64 where it is that already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def state_columns(rule: Rule, size: int) -> int:
    """Columns of a state for values of `size` numbers."""
    return size + (rule == "add")


def written(value: torch.Tensor, rule: Rule) -> torch.Tensor:
    """What a rule writes of values `[..., V]`: `[..., E]`."""
    value = wide(value)
    return functional.pad(value, (0, 1), value=1.0) if rule == "add" else value


def chunk_states(
    key: torch.Tensor,
    value: torch.Tensor,
    first: torch.Tensor | None = None,
    *,
    rule: Rule = "add",
    count: torch.Tensor | None = None,
    log_decay: torch.Tensor | None = None,
    strength: torch.Tensor | None = None,
) -> torch.Tensor:
    """The state before every chunk of 64 tokens, and the one after the last; differentiable in all but `count`.

    Args:
        key: features `[B, G, M, F]`; M is a multiple of 64.
        value: `[B, G, M, V]`.
        first: state `[B, G, F, E]` before the first token; None for an empty one.
        count: `[B, G]`, how many tokens there are, from the start; the others write nothing and may hold anything.
            None where all M are tokens.
        log_decay: logarithms, <= 0, of the decays: `[B, G, M]`, or `[G]` where they are one for all tokens of a group.
        strength: b of `delta`, `[B, G, M]`; None for 1.

    Returns:
        `[B, G, N + 1, F, E]` in float32 at least.
    """
    k, w, decay, beta = _chunks(key, value, rule, count, log_decay, strength)
    batch, groups, chunks, _, features = k.shape
    start = k.new_zeros(batch, groups, features, w.shape[-1]) if first is None else first.to(k.dtype)
    if rule == "add":
        if decay is None:
            sums = (k.transpose(-1, -2) @ w).cumsum(2)
            return torch.cat([start[:, :, None], start[:, :, None] + sums], dim=2)
        total = decay[..., -1]  # [B, G, N]
        rest = torch.exp(total[..., None] - decay)[..., None]
        sums = torch.cat([start[:, :, None], (k * rest).transpose(-1, -2) @ w], dim=2)  # [B, G, N + 1, F, E]
        passed = functional.pad(total.cumsum(-1), (1, 0))  # logarithm of all decays before a chunk, [B, G, N + 1]
        between = passed[..., :, None] - passed[..., None, :]
        later = torch.ones(chunks + 1, chunks + 1, dtype=torch.bool, device=k.device).tril()
        weights = torch.exp(between.masked_fill(~later, float("-inf")))
        return (weights @ sums.flatten(3)).unflatten(3, sums.shape[3:])
    writes, erases = delta_writes(k, w, decay, beta)
    if not chunks:  # still a function of no tokens: processes that share a sequence exchange all gradients, or none
        start = start + writes.sum() + erases.sum()
    states = [start]
    for chunk in range(chunks):
        before = states[-1]
        keys, update = k[:, :, chunk], writes[:, :, chunk] - erases[:, :, chunk] @ before
        if decay is not None:
            total = decay[:, :, chunk, -1:, None]
            before = torch.exp(total) * before
            keys = torch.exp(total - decay[:, :, chunk, :, None]) * keys
        states.append(before + keys.transpose(-1, -2) @ update)
    return torch.stack(states, dim=2)


def passage(
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    rule: Rule = "add",
    count: torch.Tensor | None = None,
    log_decay: torch.Tensor | None = None,
    strength: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What some tokens do to any state before them: S becomes `carry(gain, S) + made`.

    With this a sequence can be cut: its parts are read at once, and then joined in order (arXiv 2502.07563).

    Args:
        key, value, count, log_decay, strength: as in `chunk_states`.

    Returns:
        The gain, of `add` the factor `[B, G, 1, 1]` and of `delta` a matrix `[B, G, F, F]`, and what the tokens make of
        an empty state, `[B, G, F, E]`; in float32 at least.
    """
    features = key.shape[-1]
    if rule == "delta":  # a second value, zero, for which the state starts as the identity: what is left of it
        columns = value.shape[-1]
        start = torch.eye(features, dtype=wide(value).dtype, device=value.device).expand(*key.shape[:2], -1, -1)
        start = functional.pad(start, (columns, 0))
        beside = functional.pad(value, (0, features))
        options = {"count": count, "log_decay": log_decay, "strength": strength}
        last = chunk_states(key, beside, start, rule=rule, **options)[:, :, -1]
        return last[..., columns:], last[..., :columns]
    k, w, decay, _ = _chunks(key, value, rule, count, log_decay, strength)
    gain = k.new_ones(*k.shape[:2], 1, 1)
    if decay is not None:
        total = decay[..., -1]
        after = total.flip(-1).cumsum(-1).flip(-1)  # from the end, where most is left: logarithms there are small
        k = torch.exp((after[..., None] - decay).clamp(max=0))[..., None] * k
        gain = torch.exp(total.sum(-1))[..., None, None]
    return gain, k.flatten(2, 3).transpose(-1, -2) @ w.flatten(2, 3)


def carry(gain: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """What is left of a state `[..., F, E]` behind tokens whose `passage` has this gain."""
    return gain * state if gain.shape[-2:] == (1, 1) else gain @ state


def read(query: torch.Tensor, states: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
    """What queries find in states, a page of queries in one state.

    Args:
        query: features `[B, H, 64 * P, F]`.
        states: `[B, G, N + 1, F, E]`.
        chunk: `[B, G, P]`, which of the states the queries of each page read.

    Returns:
        `[B, H, 64 * P, E]` in the dtype of the states.
    """
    q = _by_page(query.to(states.dtype), states.shape[1])
    return _by_head(q @ _picked(states, chunk), query)


def own_chunk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    states: torch.Tensor,
    chunk: torch.Tensor,
    *,
    rule: Rule = "add",
    count: torch.Tensor | None = None,
    log_decay: torch.Tensor | None = None,
    strength: torch.Tensor | None = None,
) -> torch.Tensor:
    """What queries find in a state after it has taken in the keys of their own page up to themselves.

    Args:
        query: features `[B, H, 64 * P, F]`.
        key, value, count, log_decay, strength: as in `chunk_states`, of the same pages.
        states: `[B, G, N + 1, F, E]`.
        chunk: `[B, G, P]`, which of them is the one before each page.

    Returns:
        `[B, H, 64 * P, E]` in the dtype of the states; with all pages of a sequence its linear attention.
    """
    k, w, decay, beta = _chunks(key, value, rule, count, log_decay, strength)
    groups, before = k.shape[1], _picked(states, chunk)
    q = _by_page(query.to(states.dtype), groups)  # [B, G, P, R * 64, F]
    share = q.shape[3] // PAGE
    scores = q @ k.transpose(-1, -2)
    causal = torch.ones(PAGE, PAGE, dtype=torch.bool, device=k.device).tril().repeat(share, 1)
    scores = scores.masked_fill(~causal, 0)
    old = q @ before
    if decay is not None:
        scores = scores * _decays_between(decay).repeat(1, 1, 1, share, 1)
        old = old * torch.exp(decay).repeat(1, 1, 1, share)[..., None]
    if rule == "delta":
        writes, erases = delta_writes(k, w, decay, beta)
        w = writes - erases @ before
    return _by_head(old + scores @ w, query)


def recurrent(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    first: torch.Tensor | None = None,
    *,
    rule: Rule = "add",
    log_decay: torch.Tensor | None = None,
    strength: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule token by token: what every query finds behind its own token, and the last state.

    Args:
        query: features `[B, H, T, F]`.
        key, value, first, log_decay, strength: as in `chunk_states`, for T tokens.

    Returns:
        `[B, H, T, E]` and `[B, G, F, E]`.
    """
    k, w, groups = wide(key), written(value, rule), key.shape[1]
    q = query.to(k.dtype).unflatten(1, (groups, -1))  # [B, G, R, T, F]
    decay = None if log_decay is None else torch.exp(_per_token(log_decay, k))
    state = k.new_zeros(*k.shape[:2], k.shape[-1], w.shape[-1]) if first is None else first.to(k.dtype)
    found = []
    for t in range(k.shape[2]):
        at, new = k[:, :, t, :, None], w[:, :, t, None, :]
        if decay is not None:
            state = decay[:, :, t, None, None] * state
        if rule == "delta":
            new = new - at.transpose(-1, -2) @ state
            new = new if strength is None else strength[:, :, t, None, None].to(k.dtype) * new
        state = state + at * new
        found.append(q[:, :, :, t] @ state)
    return torch.stack(found, dim=3).flatten(1, 2), state


def parallel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    rule: Rule = "add",
    log_decay: torch.Tensor | None = None,
    strength: torch.Tensor | None = None,
) -> torch.Tensor:
    """The rule from one matrix of all pairs, from an empty state: as the first result of `recurrent`."""
    k, w, groups, tokens = wide(key), written(value, rule), key.shape[1], key.shape[2]
    q = query.to(k.dtype).unflatten(1, (groups, -1))
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=k.device).tril()
    decay = None if log_decay is None else _per_token(log_decay, k).cumsum(-1)
    between = causal.to(k.dtype) if decay is None else _decays_between(decay)
    if rule == "delta":
        w = delta_writes(k, w, decay, None if strength is None else strength.to(k.dtype))[0]
    scores = (q @ k[:, :, None].transpose(-1, -2)) * (between if decay is None else between[:, :, None])
    return (scores @ w[:, :, None]).flatten(1, 2)


def _per_token(log_decay: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Logarithms of decays as `[B, G, M]` in the dtype of keys `[B, G, M, F]`."""
    log_decay = log_decay.to(key.dtype)
    return log_decay[None, :, None].expand(key.shape[:3]) if log_decay.dim() == 1 else log_decay


def _chunks(
    key: torch.Tensor,
    value: torch.Tensor,
    rule: Rule,
    count: torch.Tensor | None,
    log_decay: torch.Tensor | None,
    strength: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Keys `[B, G, N, 64, F]`, what they write `[..., E]`, the decays' cumulated logarithms in each chunk, and b,
    `[B, G, N, 64]` both; of what is no token the key is 0 and the decay 1."""
    key, value = wide(key), wide(value)
    if log_decay is not None:
        log_decay = _per_token(log_decay, key)
    if count is not None:
        absent = torch.arange(key.shape[2], device=key.device) >= count[..., None]
        key, value = (x.masked_fill(absent[..., None], 0) for x in (key, value))
        log_decay = None if log_decay is None else log_decay.masked_fill(absent, 0)
        strength = None if strength is None else strength.masked_fill(absent, 0)
    k, w = (x.unflatten(2, (-1, PAGE)) for x in (key, written(value, rule)))
    decay = None if log_decay is None else log_decay.unflatten(2, (-1, PAGE)).cumsum(-1)
    return k, w, decay, None if strength is None else strength.to(k.dtype).unflatten(2, (-1, PAGE))


def _decays_between(decay: torch.Tensor) -> torch.Tensor:
    """From cumulated logarithms `[..., C]`, what is left at i of what came in at j <= i, `[..., C, C]`; else 0."""
    between = decay[..., :, None] - decay[..., None, :]
    return torch.exp(between.masked_fill(torch.ones_like(between, dtype=torch.bool).triu(1), float("-inf")))


def delta_writes(
    key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor | None, strength: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each token of a chunk writes by the delta rule, as writes - erases @ (the state before the chunk).

    The update u_i = b_i (v_i - e^{L_i} S^T k_i - sum_{j<i} e^{L_i - L_j} (k_i . k_j) u_j) is a triangular system.

    Args:
        key: `[..., C, F]`; value: `[..., C, V]`.
        decay: cumulated logarithms `[..., C]`; strength: `[..., C]`.

    Returns:
        `[..., C, V]` and `[..., C, F]`.
    """
    system = key @ key.transpose(-1, -2)
    erased = key
    if decay is not None:
        system = system * _decays_between(decay)
        erased = torch.exp(decay)[..., None] * key
    if strength is not None:
        system, erased, value = (strength[..., None] * x for x in (system, erased, value))
    # Of the matrix only what lies below the diagonal is read; its diagonal counts as 1.
    both = torch.linalg.solve_triangular(system, torch.cat([value, erased], -1), upper=False, unitriangular=True)
    return both[..., : value.shape[-1]], both[..., value.shape[-1] :]


def _by_page(query: torch.Tensor, groups: int) -> torch.Tensor:
    """`[B, H, 64 * P, F]` to `[B, G, P, R * 64, F]`: the heads of a group are rows of its pages."""
    return query.unflatten(1, (groups, -1)).unflatten(3, (-1, PAGE)).transpose(2, 3).flatten(3, 4)


def _by_head(pages: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """The inverse of `_by_page`, with the heads of `query`."""
    return pages.unflatten(3, (-1, PAGE)).transpose(2, 3).flatten(3, 4).reshape(*query.shape[:3], pages.shape[-1])


def _picked(states: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
    """`[B, G, P, F, E]`."""
    return states.gather(2, chunk[..., None, None].expand(-1, -1, -1, *states.shape[3:]))
