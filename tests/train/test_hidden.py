"""The objectives of linear heads against sums over all weights, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.registry import objectives
from compress.train.objectives.hidden import Hidden, Mass
from compress.train.objectives.weights import decayed, hidden_keys
from tests.train.hybrid import BATCH, HEADS, LENGTH, SPANS, Hybrid

INPUTS = {"input_ids": torch.zeros(BATCH, LENGTH, dtype=torch.long)}


def test_the_hidden_part_of_softmax_needs_no_single_weight() -> None:
    layer = Hybrid(dtype=torch.float64)
    hidden = Hidden.of(layer.parts, layer.teacher)
    weights = layer.scores.softmax(-1).masked_fill(~layer.hidden, 0)
    share = weights.sum(-1)
    torch.testing.assert_close(hidden.share, share)
    torch.testing.assert_close(hidden.sums, weights @ layer.values, rtol=1e-4, atol=1e-6)
    some = layer.hidden.any(-1).expand_as(share)
    assert torch.equal(hidden.some, some) and not some[:, :, 0].any() and some[:, :, -1].all()
    mass = layer.scores.masked_fill(~layer.hidden, float("-inf")).logsumexp(-1)
    torch.testing.assert_close(hidden.log_mass[some], mass[some], rtol=1e-4, atol=1e-5)
    mean = (layer.own @ layer.values)[some] / layer.own.sum(-1)[some][:, None]
    torch.testing.assert_close(hidden.state_mean[some], mean)
    error = (mean - (weights @ layer.values)[some] / share[some][:, None]).square().mean(-1)
    torch.testing.assert_close(hidden.mean_error(1e-9)[some], share[some] * error, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("decays", [False, True])
def test_weights_are_the_divergence_of_all_weights_by_the_chain_rule(decays: bool) -> None:
    layer = Hybrid(dtype=torch.float64, decays=decays)
    loss = objectives["weights"](queries=None).loss(layer.student, layer.teacher, INPUTS)
    expected = layer.divergence().mean(1).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(loss, [layer.query_features, layer.key_features, layer.gain], retain_graph=True)
    other = torch.autograd.grad(expected, [layer.query_features, layer.key_features, layer.gain])
    for gradient, right in zip(ours, other, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-6)


def test_queries_may_weigh_alike_whatever_attention_their_hidden_keys_have() -> None:
    """KL of the two distributions over the hidden keys, without the factor p."""
    layer = Hybrid(dtype=torch.float64)
    right, own = (x.masked_fill(~layer.hidden, 0) for x in (layer.scores.exp(), layer.own))
    some = layer.hidden.any(-1).expand_as(right[..., 0])
    right, own = (x[some] / x[some].sum(-1, keepdim=True) for x in (right, own))
    divergence = (torch.xlogy(right, right) - torch.xlogy(right, own)).sum(-1)
    found = objectives["weights"](queries=None, mass=0, by_mass=False).loss(layer.student, layer.teacher, INPUTS)
    torch.testing.assert_close(found, divergence.sum() / HEADS, rtol=1e-4, atol=1e-6)
    weighed = objectives["weights"](queries=None, mass=0).loss(layer.student, layer.teacher, INPUTS)
    assert abs(float(weighed.detach() - found.detach())) > 0.01


@pytest.mark.parametrize("name", ["parts", "weights", "transfer"])
@pytest.mark.parametrize("form", ["divergence", "log"])
def test_the_exact_state_has_nothing_to_learn_and_any_other_has(name: str, form: Mass) -> None:
    fields: dict[str, Any] = {"part": "state"} if name == "transfer" else {"form": form}
    fields |= {"queries": None} if name == "weights" else {}
    objective = objectives[name](**fields)
    for exact, low, high in ((True, -1e-9, 1e-5), (False, 0.01, 1e3)):
        layer = Hybrid(dtype=torch.float64, exact=exact)
        if exact and name == "weights":  # its mass alone: the features are not those of the exact weights
            assert float(Hidden.of(layer.parts, layer.teacher).mass_error(form).max()) < high
            continue
        loss = objective.loss(layer.student, layer.teacher, INPUTS)
        assert low < float(loss.detach()) < high
        if not exact:
            loss.backward()
            assert layer.query_features.grad is not None and bool(layer.query_features.grad.isfinite().all())


def test_the_window_cannot_buy_a_smaller_loss() -> None:
    layer = Hybrid(dtype=torch.float64)
    parts, teacher = layer.parts, layer.teacher
    for name in ("parts", "weights"):
        assert parts.out is not None
        window = parts.out.detach().requires_grad_()
        moved = type(parts)(window, *list(vars(parts).values())[1:])
        loss = objectives[name]().loss(layer.student | {"parts": moved}, teacher, INPUTS)
        assert torch.autograd.grad(loss, window, allow_unused=True)[0] is None


def test_heads_that_see_nothing_of_their_own_have_the_whole_mass_to_learn() -> None:
    layer = Hybrid(dtype=torch.float64)
    layer.hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(HEADS, -1, -1)
    layer.own = (layer.query_features @ layer.key_features.repeat_interleave(2, 1).mT).masked_fill(~layer.hidden, 0)
    parts = layer.parts
    assert parts.lse is not None and bool(torch.isneginf(parts.lse).all())
    alone = type(parts)(None, None, *list(vars(parts).values())[2:])
    hidden = Hidden.of(alone, layer.teacher)
    torch.testing.assert_close(hidden.share, torch.ones_like(hidden.share))
    torch.testing.assert_close(hidden.log_mass, layer.scores.logsumexp(-1))
    assert not hidden.mass_error("divergence").any() and bool((hidden.mass_error("log") > 0).all())
    loss = objectives["parts"](form="log").loss({"parts": alone}, layer.teacher, INPUTS)
    (gradient,) = torch.autograd.grad(loss, layer.key_features)
    assert bool(gradient.isfinite().all()) and bool(gradient.any())


def test_drawn_queries_stand_for_all() -> None:
    layer = Hybrid(dtype=torch.float64)
    whole = objectives["weights"](queries=None, mass=0).loss(layer.student, layer.teacher, INPUTS)
    torch.manual_seed(0)
    some = objectives["weights"](queries=2, mass=0)
    student, teacher = layer.student, layer.teacher
    with torch.no_grad():
        draws = torch.stack([some.loss(student, teacher, INPUTS) for _ in range(100)])
    assert float(draws.mean()) == pytest.approx(float(whole.detach()), rel=0.1) and float(draws.std()) > 0


def test_hidden_keys_are_those_before_the_window_and_behind_the_sink() -> None:
    found = hidden_keys(SPANS, torch.tensor([3, 4]), LENGTH).long()
    assert found.tolist() == [
        [[0, 1, 0, 0, 0], [0, 1, 1, 0, 0]],  # sink 1, window 2
        [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]],  # window 1
    ]
    assert hidden_keys(None, torch.tensor([1]), 3).long().tolist() == [[[1, 1, 0]]]


def test_a_state_decays_up_to_the_last_key_that_it_has() -> None:
    decay = torch.rand(1, 2, LENGTH, dtype=torch.float64).log()
    found = decayed(SPANS, decay, torch.tensor([4])).exp()[0, :, 0]
    for group, last in enumerate((2, 3)):  # the last hidden key
        expected = [decay[0, group, j + 1 : last + 1].sum().exp() for j in range(last + 1)]
        torch.testing.assert_close(found[group, : last + 1], torch.stack(expected))
