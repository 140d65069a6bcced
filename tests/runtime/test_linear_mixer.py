"""Heads with a linear state against one matrix of all pairs: ragged batches, chunks, turns, decoding and gradients."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.runtime.attention import plan_attention
from compress.runtime.mixer import Kinds, LayerFacts
from compress.runtime.mixer_linear import LinearMixer
from compress.runtime.paged_cache import PagedCache
from compress.runtime.step import Step
from compress.targets.linear import LinearGroup

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GROUPS, SHARE, DIM, HIDDEN, COLUMNS = 2, 2, 8, 6, 210
FACTS = LayerFacts(0, DIM, HIDDEN, SHARE, None)
SPANS: Any = ({"sink": 4, "alpha": 20, "beta": 0.25}, {"sink": 0, "alpha": 1})
CASES: dict[str, dict[str, Any]] = {
    "hedgehog": {},
    "exp": {"map": "hedgehog_exp", "decay": "token"},
    "lightning": {"map": "silu", "decay": "fixed", "slope": 1 / 64, "out": "added"},
    "cosine": {"map": "cosine", "reach": 512, "decay": "fixed", "slope": 1 / 128},
    "delta": {"rule": "delta", "decay": "token"},
    "alone": {"map": "elu", "decay": "fixed", "slope": 1 / 16, "alone": True},
    "delta-alone": {"rule": "delta", "decay": "token", "alone": True},
    "scores": {"map": "taylor", "features": 1 + 4 + 16},
}


def kinds_of(case: str) -> tuple[Kinds, LinearMixer]:
    """The mixer of a layer, in float64 and with parameters of which none is where it starts."""
    groups = []
    for number, span in enumerate(SPANS):
        given = {"target": "linear", **CASES[case], **({} if CASES[case].get("alone") else span)}
        if "slope" in given:
            given["slope"] *= 1 + number
        groups.append(LinearGroup.model_validate(given).model_dump(mode="json"))
    kinds = Kinds(groups, FACTS)
    assert isinstance(kinds.only, LinearMixer)
    generator = torch.Generator().manual_seed(1)
    kinds.only.to(DEVICE, torch.float64)
    for name, parameter in kinds.only.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(DEVICE)
        with torch.no_grad():
            if name == "decay_bias":
                parameter.fill_(-3.0)  # so that a decay can be told from none
            parameter.add_(0.3 * noise)
    return kinds, kinds.only


NO_SCORES: tuple[Any, Any] = (None, None)


def naive(mixer: Any, sequence: list[torch.Tensor], scores: tuple[Any, Any] = NO_SCORES) -> torch.Tensor:
    """One sequence `[H, T, D]`, `[G, T, D]`, `[T, hidden]` of tokens alone, from matrices of all pairs: `[H, T, D]`."""
    (query, key, value, hidden), (cap, extra) = sequence, scores
    tokens, scale = query.shape[1], DIM**-0.5
    at = torch.arange(tokens, device=DEVICE)
    phi_query = mixer.map.of_query(query[None], scale, at)[0]
    phi_key = mixer.map.of_key(key[None], scale, at)[0]
    outputs = []
    for head in range(query.shape[0]):
        group, own = divmod(head, SHARE)
        entry = mixer.groups[group]
        # The window of the page's first query, opened to whole pages; the rest is what the state stands for.
        first = []
        for t in range(tokens):
            asked = t // 64 * 64
            window = max(1, int(entry["alpha"] + entry["beta"] * (asked + 1)))
            first.append(max(0, asked + 1 - window) // 64 * 64)
        sink = -(-entry["sink"] // 64) * 64
        edge = torch.tensor(first, device=DEVICE)[:, None]
        causal = at[None, :] <= at[:, None]
        hidden_keys = causal if entry["alone"] else causal & (at[None, :] >= sink) & (at[None, :] < edge)
        # What comes before a query in the state: the keys up to `stop`.
        stop = [t + 1 if entry["alone"] else max(first[t], sink) for t in range(tokens)]
        decay = torch.zeros(tokens, dtype=torch.float64, device=DEVICE)
        if entry["decay"] == "fixed":
            decay = decay - entry["slope"]
        if entry["decay"] == "token":
            decay = torch.nn.functional.logsigmoid(-(hidden @ mixer.decay[group] + mixer.decay_bias[group]))
        passed = torch.cat([decay.new_zeros(1), decay.cumsum(0)])
        if entry["rule"] == "add":
            end = torch.tensor([min(each, tokens) for each in stop], device=DEVICE)
            left = torch.exp((passed[end][:, None] - passed[None, 1:]).masked_fill(~hidden_keys, 0))
            weights = (phi_query[head] @ phi_key[group].T * left).masked_fill(~hidden_keys, 0)
            num, den = weights @ value[group], weights.sum(-1)
        else:
            strength = torch.sigmoid(hidden @ mixer.strength[group] + mixer.strength_bias[group])
            state = torch.zeros(phi_key.shape[-1], DIM, dtype=torch.float64, device=DEVICE)
            start = 0 if entry["alone"] else sink
            states = {start: state}
            for t in range(start, tokens):
                state = torch.exp(decay[t]) * state
                k = phi_key[group, t]
                state = state + strength[t] * torch.outer(k, value[group, t] - state.T @ k)
                states[t + 1] = state
            num = torch.stack([phi_query[head, t] @ states[max(start, stop[t])] for t in range(tokens)])
            den = torch.zeros(tokens, dtype=torch.float64, device=DEVICE)
        logits = query[head] @ key[group].T * scale
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        seen = torch.zeros_like(causal) if entry["alone"] else causal & ~hidden_keys
        mass = logits.exp() * seen
        total = mass.sum(-1) + (0 if extra is None else extra[head].exp())
        if mixer.shared:
            gain = torch.exp(mixer.gain[group, own] + query[head] @ mixer.gain_query[group, own])
            outputs.append((mass @ value[group] + gain[:, None] * num) / (total + gain * den)[:, None])
        else:
            gate = torch.sigmoid(hidden @ mixer.gate[group, own] + mixer.gate_bias[group, own])
            normed = num / (num.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.norm[group, own]
            window = 0 if entry["alone"] else mass @ value[group] / total[:, None]
            outputs.append(window + gate[:, None] * normed)
    return torch.stack(outputs)


def inputs() -> tuple[list[torch.Tensor], torch.Tensor]:
    """Query, key, value and hidden states of three sequences, and which columns are tokens; the others hold NaN."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, GROUPS * SHARE, COLUMNS, DIM), (3, GROUPS, COLUMNS, DIM), (3, GROUPS, COLUMNS, DIM))
    made = [torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE) for shape in shapes]
    made.append(torch.randn(3, COLUMNS, HIDDEN, generator=generator, dtype=torch.float64).to(DEVICE))
    mask = torch.ones(3, COLUMNS, dtype=torch.bool, device=DEVICE)
    mask[1, :9] = mask[1, 120:131] = False  # padding before the first turn, and after it
    mask[2, 3:110:5] = mask[2, 190:] = False  # between tokens, and at the end
    absent = ~mask[..., None]
    return [
        *(x.masked_fill(absent[:, None], torch.nan) for x in made[:3]),
        made[3].masked_fill(absent, torch.nan),
    ], mask


def tokens_of(made: list[torch.Tensor], mask: torch.Tensor, row: int) -> list[torch.Tensor]:
    """What `naive` takes of one sequence."""
    return [*(x[row][:, mask[row]] for x in made[:3]), made[3][row][mask[row]]]


def run(kinds: Kinds, made: Any, mask: Any, cuts: list[int], reserve: Any, cached: bool, scores: Any) -> torch.Tensor:
    """`[B, H, T, D]` from the columns in chunks."""
    cache = PagedCache([kinds], reserve) if cached else None
    return feed(kinds, cache, made, mask, [0, *cuts, COLUMNS], scores)


def feed(
    kinds: Kinds,
    cache: Any,
    made: Any,
    mask: torch.Tensor,
    cuts: list[int],
    scores: tuple[Any, Any] = NO_SCORES,
    impl: str = "reference",
) -> torch.Tensor:
    """The columns from the first cut to the last, a pass from each to the next."""
    module: Any = SimpleNamespace(compress_kinds=kinds, layer_idx=0)
    outputs = []
    for start, stop in pairwise(cuts):
        query, key, value = (x[:, :, start:stop] for x in made[:3])
        valid = mask[:, start:stop]
        step = Step.begin(cache, None if valid.all() else valid, len(valid), stop - start, query.device)
        step.impl, step.hidden = impl, made[3][:, start:stop]
        if cache is not None:
            key, value = cache.update(key, value, 0)
        arguments: Any = {"compress_step": step, "softcap": scores[0], "s_aux": scores[1]}
        outputs.append(plan_attention(module, query, key, value, None, **arguments)[0].transpose(1, 2))
        step.end()
    return torch.cat(outputs, dim=2)


@pytest.mark.parametrize("case", CASES)
def test_every_way_to_the_end_is_the_matrix_of_all_pairs(case: str) -> None:
    kinds, mixer = kinds_of(case)
    made, mask = inputs()
    extra = torch.linspace(-1, 1, GROUPS * SHARE, dtype=torch.float64, device=DEVICE)
    scores: Any = (2.0, extra) if case == "scores" else (None, None)
    with torch.no_grad():
        expected = [naive(mixer, tokens_of(made, mask, row), scores) for row in range(3)]
        steps, turns = [*range(124, 136), *range(189, 195)], [1, 2, 5, 70, 128, 131]
        ways: Any = (([], None, False), (turns, None, True), (steps, None, True), (steps, COLUMNS, True))
        for cuts, reserve, cached in ways:
            found = run(kinds, made, mask, cuts, reserve, cached, scores)
            for row in range(3):
                torch.testing.assert_close(found[row][:, mask[row]], expected[row], rtol=1e-8, atol=1e-9)
                assert bool((found[row][:, ~mask[row]] == 0).all())


CACHED = ("exp", "delta")


@pytest.mark.parametrize("case", ["hedgehog", "alone", *CACHED])
def test_gradients_are_those_of_the_matrix(case: str) -> None:
    kinds, mixer = kinds_of(case)
    made, mask = inputs()
    leaves = [x.requires_grad_() for x in made]
    weight = torch.randn(3, GROUPS * SHARE, COLUMNS, DIM, dtype=torch.float64, device=DEVICE)
    found = run(kinds, leaves, mask, [], None, case in CACHED, NO_SCORES)
    expected = torch.zeros((), dtype=torch.float64, device=DEVICE)
    loss = expected
    for row in range(3):
        one = mask[row]
        part = naive(mixer, tokens_of(leaves, mask, row))
        expected = expected + (part * weight[row][:, one]).sum()
        loss = loss + (found[row][:, one] * weight[row][:, one]).sum()
    wanted = torch.autograd.grad(expected, [*leaves, *mixer.parameters()], allow_unused=True)
    got = torch.autograd.grad(loss, [*leaves, *mixer.parameters()], allow_unused=True)
    for name, a, b in zip(["q", "k", "v", "hidden", *dict(mixer.named_parameters())], got, wanted, strict=True):
        a, b = (torch.zeros(()) if x is None else x for x in (a, b))
        assert bool(a.isfinite().all()), name
        torch.testing.assert_close(a, b.expand_as(a), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("case", ["exp", "delta-alone"])
@pytest.mark.parametrize("cuts", [[3, 5], [1, 5]])  # the first pass has three columns, or is a step
def test_passes_of_padding_alone_change_nothing(case: str, cuts: list[int]) -> None:
    kinds, mixer = kinds_of(case)
    made, mask = inputs()
    mask[:, :5] = mask[:, 64:70] = False
    made = [x.masked_fill(~(mask[:, None, :, None] if x.dim() == 4 else mask[..., None]), torch.nan) for x in made]
    with torch.no_grad():
        found = feed(kinds, PagedCache([kinds]), made, mask, [0, *cuts, 64, 70, COLUMNS])
        for row in range(3):
            torch.testing.assert_close(
                found[row][:, mask[row]], naive(mixer, tokens_of(made, mask, row)), rtol=1e-8, atol=1e-9
            )


@pytest.mark.parametrize("case", ["exp", "delta"])
def test_a_later_turn_is_differentiable_in_its_own_tokens(case: str) -> None:
    kinds, mixer = kinds_of(case)
    made, mask = inputs()
    cache, turn = PagedCache([kinds]), 100
    with torch.no_grad():
        feed(kinds, cache, made, mask, [0, turn])
    leaves = [x.requires_grad_() for x in made]
    found = feed(kinds, cache, leaves, mask, [turn, COLUMNS])
    expected = loss = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for row in range(3):
        late = mask[row, turn:]
        part = naive(mixer, tokens_of(leaves, mask, row))[:, -int(late.sum()) :]
        weight = torch.randn_like(part)
        expected, loss = expected + (part * weight).sum(), loss + (found[row][:, late] * weight).sum()
    wanted, got = (torch.autograd.grad(one, leaves) for one in (expected, loss))
    for a, b in zip(got, wanted, strict=True):
        at = 2 if a.dim() == 4 else 1
        a, b = (x.narrow(at, turn, COLUMNS - turn) for x in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(("case", "reserve"), [("exp", None), ("exp", 256), ("delta-alone", None)])
def test_sequences_are_reordered_with_their_states(
    case: str, reserve: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.runtime.mixer_linear.SEGMENT", 64)
    kinds, mixer = kinds_of(case)
    made, mask = inputs()
    cache, order = PagedCache([kinds], reserve), torch.tensor([2, 0, 0], device=DEVICE)
    with torch.no_grad():
        feed(kinds, cache, made, mask, [0, 130, 133])
        cache.reorder_cache(order)
        found = feed(kinds, cache, [x[order] for x in made], mask[order], [133, *range(189, 195)])
        for row, one in enumerate(order.tolist()):
            tokens = mask[one, :194]
            part = tokens_of([*(x[:, :, :194] for x in made[:3]), made[3][:, :194]], mask[:, :194], one)
            late = tokens[133:]
            expected = naive(mixer, part)[:, -int(late.sum()) :]
            torch.testing.assert_close(found[row][:, late], expected, rtol=1e-8, atol=1e-9)
