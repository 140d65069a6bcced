"""Published forms of linear attention as plan entries, each against its own formula, in any chunks.

The formulas are written here from the papers, in float64, on full matrices or token by token, and share no code with
the states and maps that they are compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.runtime.attention import plan_attention
from compress.runtime.mixer import Kinds, LayerFacts
from compress.runtime.paged_cache import PagedCache
from compress.runtime.step import Step
from compress.targets.linear import LinearGroup, lightning_slopes

SHARE, DIM, HIDDEN, LENGTH = 2, 16, 24, 200
SLOPES = lightning_slopes(8, layer=1, layers=4)
Weigh = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]


def causal(distance: torch.Tensor) -> torch.Tensor:
    return distance >= 0


def distances() -> torch.Tensor:
    """t - j, `[T, T]`."""
    t = torch.arange(LENGTH)
    return t[:, None] - t


def projected(mixer: Any, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x W of the one query head and its group, which a map starts from."""
    return query @ mixer.map.query[0, 0].double(), key @ mixer.map.key[0].double()


def lightning(mixer: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """exp(-s (t - j)) SiLU(q) . SiLU(k)."""
    q, k = (x / (1 + torch.exp(-x)) for x in projected(mixer, query, key))
    return q @ k.T * torch.exp(-SLOPES[2] * distances().clamp(min=0).double())


def retention(mixer: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """gamma^(t - j) q . k, with RetNet's gamma = 1 - 2^-5 of the first head."""
    q, k = projected(mixer, query, key)
    return q @ k.T * (1 - 2.0**-5) ** distances().clamp(min=0).double()


def taylor(mixer: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The exponential's series to second order, of scores between projections."""
    q, k = projected(mixer, query, key)
    score = q @ k.T / math.sqrt(DIM)
    return 1 + score + score**2 / 2


def elu(mixer: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    q, k = (torch.where(x > 0, x + 1, torch.exp(x)) for x in projected(mixer, query, key))
    return q @ k.T


def relu(mixer: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    q, k = projected(mixer, query, key)
    q, k = q + mixer.map.query_bias[0, 0].double(), k + mixer.map.key_bias[0].double()
    return (q * (q > 0)) @ (k * (k > 0)).T


def cosine(mixer: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    q, k = projected(mixer, query, key)
    return (q * (q > 0)) @ (k * (k > 0)).T * torch.cos(math.pi / 2 * distances() / 256)


def hedgehog(mixer: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    features = []
    for x in projected(mixer, query, key):
        up, down = torch.exp(x), torch.exp(-x)
        features.append(torch.cat([up / up.sum(-1, keepdim=True), down / down.sum(-1, keepdim=True)], dim=-1))
    return features[0] @ features[1].T


def random_features(mixer: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The mean of exp(w . q - |q|^2 / 2) exp(w . k - |k|^2 / 2) over features w, q and k over the fourth root of D."""
    features = []
    for x, weight in ((query, mixer.map.query[0, 0]), (key, mixer.map.key[0])):
        x = x / DIM**0.25
        features.append(torch.exp(x @ weight.double() - (x * x).sum(-1, keepdim=True) / 2))
    return features[0] @ features[1].T / mixer.map.features


def delta(mixer: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Weights of the values by the recurrence S <- a S (I - b k k^T) + b v k^T, with one column for each value."""
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in projected(mixer, query, key))
    hidden = mixer.hidden[0].double()
    strength = torch.sigmoid(hidden @ mixer.strength[0].double() + mixer.strength_bias[0].double())
    keep = torch.ones(LENGTH, dtype=torch.double)
    if mixer.token_decay:
        keep = 1 / (1 + torch.exp(hidden @ mixer.decay[0].double() + mixer.decay_bias[0].double()))
    state, rows = torch.zeros(LENGTH, DIM, dtype=torch.double), []
    for t in range(LENGTH):
        state = keep[t] * state
        new = torch.zeros(LENGTH, dtype=torch.double)
        new[t] = 1
        state = state + strength[t] * torch.outer(new - state @ k[t], k[t])
        rows.append(state @ q[t])
    return torch.stack(rows)


# The plan's entry, the weights of its linear part, and whether these are divided by their sum.
FORMS: dict[str, tuple[LinearGroup, Weigh, bool]] = {
    "based": (LinearGroup(map="taylor", alone=True), taylor, True),
    "based, hybrid": (LinearGroup(map="taylor", alpha=64), taylor, True),
    "cosformer": (LinearGroup(map="cosine", reach=256, alone=True), cosine, True),
    "delta": (LinearGroup(rule="delta", alone=True), delta, False),
    "gated delta": (LinearGroup(rule="delta", decay="token", alone=True), delta, False),
    "hedgehog": (LinearGroup(map="hedgehog", alone=True), hedgehog, True),
    "hedgehog, hybrid": (LinearGroup(map="hedgehog", sink=4, alpha=64), hedgehog, True),
    "lightning": (
        LinearGroup(map="silu", decay="fixed", slope=SLOPES[2], out="added", alone=True), lightning, False
    ),
    "linear transformer": (LinearGroup(map="elu", alone=True), elu, True),
    "performer": (LinearGroup(map="random", features=40, alone=True), random_features, True),
    "retention": (
        LinearGroup(map="none", decay="fixed", slope=-math.log(1 - 2.0**-5), out="added", alone=True), retention, False
    ),
    "t2r": (LinearGroup(map="relu", alone=True), relu, True),
}  # fmt: skip


def layer(group: LinearGroup) -> Kinds:
    """One group of two query heads; what it has of its own is not what it starts with."""
    kinds = Kinds([group.model_dump()], LayerFacts(0, DIM, HIDDEN, SHARE, None))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in kinds.mixers[0].parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)
    return kinds


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys, values, and the layer's input."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, heads, LENGTH, DIM, generator=generator) for heads in (SHARE, 1, 1))
    return query, key, value, torch.randn(1, LENGTH, HIDDEN, generator=generator)


def naive(kinds: Kinds, group: LinearGroup, weigh: Weigh, divided: bool) -> torch.Tensor:
    """`[1, 1, T, D]` of the first query head."""
    query, key, value, hidden = inputs()
    mixer: Any = kinds.mixers[0]
    mixer.hidden = hidden
    q, k, v = query[0, 0].double(), key[0, 0].double(), value[0, 0].double()
    weights = weigh(mixer, q, k) * causal(distances())
    if divided:
        if not group.alone:
            # Pages of 64 tokens: the query's own, that before it, and the sink's are seen by softmax.
            page = torch.arange(LENGTH) // 64
            seen = (page[:, None] - page <= 1) | (page == 0 if group.sink else torch.zeros(LENGTH, dtype=torch.bool))
            gain = torch.exp(mixer.gain[0, 0].double() + q @ mixer.gain_query[0, 0].double())
            softmax = torch.exp(q @ k.T / math.sqrt(DIM)) * causal(distances())
            weights = torch.where(seen, softmax, gain[:, None] * weights)
        return ((weights @ v) / weights.sum(-1, keepdim=True))[None, None]
    out = weights @ v
    out = out / torch.sqrt(out.square().mean(-1, keepdim=True) + 1e-6) * mixer.norm[0, 0].double()
    gate = torch.sigmoid(hidden[0].double() @ mixer.gate[0, 0].double() + mixer.gate_bias[0, 0].double())
    return (gate[:, None] * out)[None, None]


def run(kinds: Kinds, cuts: tuple[int, ...]) -> torch.Tensor:
    """`[1, H, T, D]`, in chunks through the cache."""
    *qkv, hidden = inputs()
    cache, outs = PagedCache([kinds]), []
    module: Any = SimpleNamespace(compress_kinds=kinds, layer_idx=0)
    with torch.no_grad():
        for start, stop in pairwise((0, *cuts, LENGTH)):
            query, key, value = (tensor[:, :, start:stop] for tensor in qkv)
            step = Step.begin(cache, None, 1, stop - start, query.device)
            step.hidden = hidden[:, start:stop]
            key, value = cache.update(key, value, 0)
            outs.append(plan_attention(module, query, key, value, None, compress_step=step)[0].transpose(1, 2))
            step.end()
    return torch.cat(outs, dim=2)


@pytest.mark.parametrize("name", FORMS)
def test_a_published_form_is_its_formula_in_any_chunks(name: str) -> None:
    group, weigh, divided = FORMS[name]
    kinds = layer(group)
    with torch.no_grad():
        expected = naive(kinds, group, weigh, divided).float()
    for cuts in ((), (1, 64, 129), (130, *range(190, LENGTH))):
        torch.testing.assert_close(run(kinds, cuts)[:, :1], expected, rtol=1e-4, atol=1e-5)


def test_the_slopes_are_those_of_the_paper() -> None:
    assert lightning_slopes(8, 0, 4) == pytest.approx([2.0**-head * (1 + 1e-5) for head in range(1, 9)])
    last = lightning_slopes(16, 3, 4)
    assert last == pytest.approx([2 ** (-head / 2) * 1e-5 for head in range(1, 17)])
