"""Linear heads in float32 against float64, with branches left out, and the formulas of their feature maps."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from torch.nn.functional import pad

from compress.runtime.maps import MAPS
from compress.runtime.mixer import Branches, Kinds, LayerFacts
from compress.runtime.mixer_linear import LinearMixer
from compress.runtime.paged_cache import PagedCache
from compress.runtime.rope import turned_back
from compress.runtime.span import PAGE
from compress.runtime.step import Step
from compress.targets.linear import LinearGroup, lightning_slopes

GROUPS, SHARE, DIM, HIDDEN, TOKENS = 2, 2, 6, 10, 333
FACTS = LayerFacts(index=0, head_dim=DIM, hidden_size=HIDDEN, group_size=SHARE, native_window=None)

# Two groups of one form each: windows and slopes may differ.
FORMS: dict[str, tuple[dict[str, Any], ...]] = {
    "hedgehog": ({"alpha": 1}, {"sink": 70, "alpha": 40, "beta": 0.25}),
    "hedgehog, 8 features, decay of tokens": tuple({"features": 8, "decay": "token", "alpha": a} for a in (1, 64)),
    "hedgehog, alone": ({"alone": True},) * 2,
    "elu, fixed decay": tuple({"map": "elu", "decay": "fixed", "slope": s, "alpha": 30} for s in (0.001, 0.5)),
    "elu, alone, fixed decay": tuple({"map": "elu", "decay": "fixed", "slope": s, "alone": True} for s in (0.01, 2)),
    "cosine": ({"map": "cosine", "reach": 500}, {"map": "cosine", "reach": 500, "alpha": 100}),
    "silu, added, alone": tuple(
        {"map": "silu", "out": "added", "decay": "fixed", "slope": s, "alone": True} for s in lightning_slopes(2, 0, 2)
    ),
    "delta": ({"rule": "delta"}, {"rule": "delta", "sink": 4, "alpha": 1}),
    "delta, decay of tokens, alone": ({"rule": "delta", "decay": "token", "alone": True},) * 2,
}


def mixer_of(entries: tuple[dict[str, Any], ...], dtype: torch.dtype = torch.float64) -> tuple[LinearMixer, Kinds]:
    """A mixer with random parameters."""
    groups = [LinearGroup.model_validate(entry).model_dump(mode="json") for entry in entries]
    kinds = Kinds(groups, FACTS)
    (mixer,) = kinds.mixers
    assert isinstance(mixer, LinearMixer)
    torch.manual_seed(1)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, parameter.detach().mean().item(), 0.4)
    return mixer.to(dtype), kinds


def inputs(batch: int, tokens: int = TOKENS, dtype: torch.dtype = torch.float64, seed: int = 2) -> list[torch.Tensor]:
    """Query, key, value and hidden states."""
    torch.manual_seed(seed)
    sizes = [(GROUPS * SHARE, tokens, DIM), (GROUPS, tokens, DIM), (GROUPS, tokens, DIM), (tokens, HIDDEN)]
    return [torch.randn(batch, *size, dtype=torch.float64).to(dtype) for size in sizes]


def whole(mixer: LinearMixer, tensors: list[torch.Tensor]) -> torch.Tensor:
    """The mixer's output in one pass without a cache, `[B, T, H, D]`."""
    query, key, value, hidden = tensors
    step = Step.begin(None, None, len(query), query.shape[2], query.device)
    step.hidden = hidden
    return mixer.prefill(query, key, value, None, step, scale=None, dropout=0.0)


def run(
    kinds: Kinds, tensors: list[torch.Tensor], cuts: list[int], valid: torch.Tensor | None, reserve: int | None
) -> tuple[torch.Tensor, PagedCache]:
    """Outputs of passes over the columns between `cuts`, on one cache."""
    cache, mixer = PagedCache([kinds], reserve), kinds.mixers[0]
    outputs = []
    for first, last in pairwise(cuts):
        query, key, value = (x[:, :, first:last] for x in tensors[:3])
        here = None if valid is None else valid[:, first:last]
        with torch.no_grad():
            step = Step.begin(cache, here, len(query), last - first, query.device)
            step.hidden = tensors[3][:, first:last]
            cache.paged[0].update(key, value)
            if step.lengths is not None:
                outputs.append(mixer.decode(query, key, value, cache.paged[0].states[0], step, scale=None))
            else:
                state = cache.paged[0].states[0]
                outputs.append(mixer.prefill(query, key, value, state, step, scale=None, dropout=0.0))
            step.end()
    return torch.cat(outputs, dim=1), cache


@pytest.mark.parametrize("reserve", [None, TOKENS])
@pytest.mark.parametrize("form", FORMS)
def test_chunks_and_steps_of_a_padded_batch_are_one_pass_over_each_sequence(form: str, reserve: int | None) -> None:
    mixer, kinds = mixer_of(FORMS[form], torch.float32)
    tensors = inputs(4, dtype=torch.float32)
    valid = torch.ones(4, TOKENS, dtype=torch.bool)
    valid[1, :70], valid[2, 100:150], valid[3, 1:] = False, False, False  # before, between, and only one token
    for x in tensors[:3]:
        x.masked_fill_(~valid[:, None, :, None], torch.nan)
    tensors[3].masked_fill_(~valid[..., None], torch.nan)
    cuts = [0, 61, 129, *range(130, 134), 250, *range(254, 259), *range(318, 323), TOKENS]
    found, cache = run(kinds, tensors, cuts, valid, reserve)
    for row in range(4):
        alone = [x[row : row + 1, ..., valid[row], :] for x in tensors]
        exact = whole(mixer.double(), [x.double() for x in alone])
        mixer.float()
        torch.testing.assert_close(found[row : row + 1, valid[row]].double(), exact, rtol=1e-5, atol=1e-5)
    assert not found[~valid].any()
    if reserve is None:
        target = LinearGroup.model_validate(FORMS[form][0])
        state = cache.paged[0].states[0].tensors["state"]
        assert state.dtype == torch.float32
        assert state[0, 0].numel() * 4 == target.state_bytes(DIM)


@torch.no_grad()
def test_a_hundred_thousand_tokens_are_held_in_the_memory_of_the_first() -> None:
    """By chunks with single tokens between them, in one head; the state is the sum over all of them."""
    entry = LinearGroup(sink=4, alpha=64).model_dump(mode="json")
    kinds = Kinds([entry], LayerFacts(0, 4, HIDDEN, 1, None))
    mixer: Any = kinds.only
    cache, held, generator = PagedCache([kinds]), set[int](), torch.Generator().manual_seed(3)
    chunk, sums = 8192, torch.zeros(8, 5, dtype=torch.float64)
    for number in range(13):
        query, key, value = torch.randn(3, 1, 1, chunk, 4, generator=generator)
        for first, stop in ((0, 1), (1, chunk - 1), (chunk - 1, chunk)):
            new = [x[:, :, first:stop] for x in (query, key, value)]
            step = Step.begin(cache, None, 1, stop - first, query.device)
            cache.paged[0].update(*new[1:])
            if step.lengths is None:
                mixer.prefill(*new, cache.paged[0].states[0], step, scale=None, dropout=0.0)
            else:
                mixer.decode(*new, cache.paged[0].states[0], step, scale=None)
            step.end()
        hidden = slice(PAGE if number == 0 else 0, chunk - 2 * PAGE if number == 12 else chunk)  # of the sink, in sight
        features, written = mixer.map.of_key(key, 1.0)[0, 0].double(), pad(value[0, 0].double(), (0, 1), value=1.0)
        sums += features[hidden].T @ written[hidden]
        held |= {cache.allocated_bytes(), cache.held_bytes()}
    state: Any = cache.paged[0].states[0]
    found = state.matrix[0, 0]
    assert cache.get_seq_length() > 100_000 and len(held) == 1
    assert found.dtype == torch.float32 and float((found.double() - sums).norm() / sums.norm()) < 1e-5


def test_a_state_starts_in_the_way_of_a_pass_and_ends_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, kinds = mixer_of(FORMS["hedgehog"])
    tensors = inputs(2)
    expected = whole(mixer, tensors)
    monkeypatch.setattr("compress.runtime.mixer_linear.SEGMENT", 2 * PAGE)
    torch.testing.assert_close(whole(mixer, tensors), expected, rtol=1e-12, atol=1e-12)
    found, _ = run(kinds, tensors, [0, 100, TOKENS], None, None)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["hedgehog", "delta"])
def test_branches_can_be_left_out(form: str) -> None:
    mixer, _ = mixer_of(FORMS[form])
    tensors = inputs(1)
    outputs = {}
    for branches in get_args(Branches):
        mixer.branches = branches
        outputs[branches] = whole(mixer, tensors)
    mixer.branches = ("window", "linear")  # of each group
    heads = [outputs["window"][:, :, :SHARE], outputs["linear"][:, :, SHARE:]]
    assert torch.equal(whole(mixer, tensors), torch.cat(heads, dim=2))
    assert not outputs["none"].any()
    early, late = slice(0, PAGE), slice(3 * PAGE, None)  # before and behind the first hidden key
    assert torch.equal(outputs["both"][:, early], outputs["window"][:, early])
    assert not outputs["linear"][:, early].any()
    for branches in ("window", "linear"):
        assert (outputs["both"] - outputs[branches])[:, late].abs().max() > 1e-3
    if form == "delta":
        torch.testing.assert_close(outputs["window"] + outputs["linear"], outputs["both"])


@pytest.mark.parametrize("form", ["hedgehog", "delta"])
def test_a_prompt_without_hidden_keys_computes_no_state(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, kinds = mixer_of(FORMS[form])
    tensors = [x[..., : PAGE + 40, :] for x in inputs(2)]
    expected = whole(mixer, tensors)  # with gradients, and the states
    with monkeypatch.context() as patch:
        patch.setattr("compress.runtime.mixer_linear.chunk_states", None)
        found, cache = run(kinds, [x[..., :50, :] for x in tensors], [0, 50], None, None)
    torch.testing.assert_close(found, expected[:, :50], rtol=1e-12, atol=1e-12)
    assert not cache.paged[0].states[0].tensors["state"].any()
    found, _ = run(kinds, tensors, [0, 50, PAGE + 40], None, None)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_delta_group_starts_as_its_window() -> None:
    groups = [LinearGroup(rule="delta", alpha=1).model_dump(mode="json")] * 2
    (mixer,) = Kinds(groups, FACTS).mixers
    assert isinstance(mixer, LinearMixer)
    tensors = inputs(1, dtype=torch.float32)
    start = whole(mixer, tensors)
    mixer.branches = "window"
    assert torch.equal(start, whole(mixer, tensors))


def test_maps_may_have_queries_and_keys_as_they_were_before_rope() -> None:
    facts = replace(FACTS, frequencies=lambda: (0.7, 0.01))
    entries = [LinearGroup(alone=True, map="elu", rope=rope).model_dump(mode="json") for rope in ("undo", "keep")]
    undoing, keeping = (Kinds([entry] * GROUPS, facts) for entry in entries)
    query, key, *rest = inputs(2)
    t = torch.arange(TOKENS)
    angles = -torch.tensor(facts.frequencies() if facts.frequencies is not None else (), dtype=torch.float64)
    turned = [turned_back(x, t, angles) for x in (query, key)]  # by minus the angles: forward
    for kinds in (undoing, keeping):
        kinds.mixers[0].double()
    expected, _ = run(keeping, [query, key, *rest], [0, TOKENS], None, None)
    for cuts, reserve in (([0, TOKENS], None), ([0, 100, *range(126, 131), TOKENS], TOKENS)):
        found, _ = run(undoing, [*turned, *rest], cuts, None, reserve)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(MAPS))
def test_maps(name: str) -> None:
    made = MAPS[name](GROUPS, SHARE, DIM, None, reach=100)
    query, key = inputs(1, 5, torch.float32)[:2]
    t, scale = torch.arange(5)[None, None], DIM**-0.5
    phi_q, phi_k = made.of_query(query, scale, t), made.of_key(key, scale, t)
    assert phi_q.shape == (1, GROUPS * SHARE, 5, made.features) and phi_k.shape == (1, GROUPS, 5, made.features)
    assert phi_q.dtype == made.of_query(query.bfloat16(), scale, t).dtype == torch.float32
    found = phi_q[:, 0] @ phi_k[:, 0].transpose(-1, -2)
    q, k = query[:, 0], key[:, 0]
    scores = q @ k.transpose(-1, -2) * scale
    distance = torch.arange(5)[:, None] - torch.arange(5)
    cut = (q[..., None, :].relu() * k[:, None].relu()).sum(-1)
    expected = {
        "elu": (1 + torch.nn.functional.elu(q)) @ (1 + torch.nn.functional.elu(k)).transpose(-1, -2),
        "relu": cut,
        "cosine": cut * torch.cos(distance * (torch.pi / 200)),
        "hedgehog": q.softmax(-1) @ k.softmax(-1).mT + (-q).softmax(-1) @ (-k).softmax(-1).mT,
        "hedgehog_exp": 2 * torch.cosh((q[..., None, :] + k[:, None]) * scale**0.5).sum(-1),
        "taylor": 1 + scores + scores.square() / 2,  # of head sizes up to 16 nothing is projected away
        "unit": torch.nn.functional.normalize(q, dim=-1) @ torch.nn.functional.normalize(k, dim=-1).mT,
        "silu": torch.nn.functional.silu(q) @ torch.nn.functional.silu(k).mT,
        "none": q @ k.mT,
    }
    if name == "random":
        query, key, scores = query / 3, key / 3, scores / 9
        many = MAPS[name](GROUPS, SHARE, DIM, 4096)
        estimate = many.of_query(query, scale)[:, 0] @ many.of_key(key, scale)[:, 0].mT
        torch.testing.assert_close(estimate, scores.exp(), rtol=0.1, atol=0.0)
    else:
        torch.testing.assert_close(found, expected[name])
    if made.positive:
        assert (found >= 0).all()


@pytest.mark.parametrize("name", sorted(MAPS))
def test_more_features_than_a_head_has_numbers_are_features_of_their_own(name: str) -> None:
    """Projected numbers that begin alike, or as zeros, get one gradient, or none, and would count once for ever."""
    width = 3 * DIM - 1
    features = next(n for n in range(1, 1 << 10) if _width(name, n) == width)
    made = MAPS[name](GROUPS, SHARE, DIM, features, reach=100)
    query, key = (x.double() for x in inputs(1, 9, torch.float32)[:2])
    t = torch.arange(9)[None, None]
    product = made.of_query(query, 1.0, t)[:, ::SHARE] @ made.of_key(key, 1.0, t).mT
    product.square().sum().backward()
    assert made.key.grad is not None and (made.key.grad.norm(dim=-2) > 0).all()
    for start in (made.key.detach(), made.key.detach() - 0.1 * made.key.grad):
        apart = torch.cdist(start.mT, start.mT) + torch.eye(width)
        assert float(apart.min()) > 1e-2


@pytest.mark.parametrize("name", sorted(MAPS))
def test_maps_are_made_where_numbers_are_usually_short(name: str) -> None:
    """`from_pretrained` makes the modules of a model in its dtype."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = MAPS[name](GROUPS, SHARE, DIM, None)
    finally:
        torch.set_default_dtype(usual)
    torch.testing.assert_close(made.key.float(), MAPS[name](GROUPS, SHARE, DIM, None).key, rtol=1e-2, atol=0.0)


def _width(name: str, features: int) -> int | None:
    try:
        return MAPS[name].width(features)
    except ValueError:
        return None
