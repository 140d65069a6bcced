"""Where linear heads lose: rank of the past, spread of the normaliser, loss on what can be looked up."""

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.data.repeats import MOST, repeats, spread
from compress.data.sample import TextSample
from compress.models.families import layers_of
from compress.models.pruning import output_projections
from compress.models.shape import shape_of
from compress.profile.heads.ar_loss import ArLoss
from compress.profile.heads.effect import Effect
from compress.profile.heads.lse_spread import LseSpread
from compress.profile.heads.state_rank import StateRank, energy_rank
from compress.profile.passes.capture import Capture
from compress.profile.passes.tiles import LayerTensors
from compress.profile.run import run_profile
from compress.runtime.span import Span
from compress.targets.window import WindowGroup
from tests.profile import naive
from tests.profile.common import document, documents, measure, take_layer
from tests.tiny import random_ids, tiny_loaded, tiny_model

DOC = document(150, seed=6)


def layers_taken(model: Any, doc: TextSample) -> list[LayerTensors]:
    """Queries, keys and values of every layer."""
    taken: list[LayerTensors] = []
    with Capture(model, taken.append, gradient=False) as capture:
        capture.run(doc)
    return sorted(taken, key=lambda layer: layer.layer)


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3", "mistral-sliding"])
def test_rank_and_spread_are_those_of_whole_matrices(family: str) -> None:
    model = tiny_model(family).double()
    with torch.no_grad():  # sharper heads, which differ
        for weight in model.parameters():
            weight.mul_(1.5)
    statistics = [StateRank(window=3, eps=0.02), LseSpread()]
    found = measure(model, statistics, DOC, length=160, strip_bytes=30_000)
    for layer, block in zip(layers_taken(model, DOC), layers_of(model), strict=True):
        query, key, value = (tensor.double() for tensor in (layer.query, layer.key, layer.value))
        attention = naive.naive_attention(query, key, layer.scaling, layer.window)
        output = output_projections(block, model.config)[0].weight.detach()
        expected = naive.state_rank(attention, value, output, 0.02, 3, (0.25, 0.5, 0.75))
        assert found["state_rank.160"][layer.layer].tolist() == expected.tolist()
        assert layer.window is not None or int(expected.min()) > 1
        spread = naive.lse_spread(query, key, layer.scaling, layer.window)
        torch.testing.assert_close(found["lse_spread.160"][layer.layer].double(), spread, rtol=1e-4, atol=1e-6)


def clustered(features: int, length: int = 200) -> LayerTensors:
    """A layer of the tiny Llama whose keys are a few directions, so that it is a linear head of as many features."""
    generator = torch.Generator().manual_seed(3)
    query, value = (torch.randn(heads, length, 12, generator=generator) for heads in (4, 2))
    directions = torch.randn(2, features, 12, generator=generator) * 2
    kinds = torch.randint(features, (2, length), generator=generator)
    key = torch.stack([directions[group, kinds[group]] for group in range(2)])
    return LayerTensors(0, query, key, value, 12**-0.5)


@pytest.mark.parametrize("features", [3, 16])
def test_a_head_of_so_many_features_measures_them(features: int) -> None:
    model, rank = tiny_model("llama-gqa"), StateRank(eps=1e-9, window=8)
    shape = shape_of(model)
    assert take_layer(rank, clustered(features), shape, model=model)["state_rank.200"][0].tolist() == [features] * 2
    # Fewer rows and columns than there are, and no more features for it.
    few = StateRank(eps=1e-9, window=8, block=100)
    assert take_layer(few, clustered(features), shape, model=model)["state_rank.200"][0].tolist() == [features] * 2


def test_a_linear_head_of_sixteen_features_measures_sixteen() -> None:
    """Row-normalised, with decay, whatever the maps."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.rand(90, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    decay = 0.95 ** (torch.arange(90)[:, None] - torch.arange(90)).clamp(min=0)
    weights = (query @ key.T * decay).tril()
    attention = weights / weights.sum(-1, keepdim=True)
    for split in (20, 45, 60):
        assert int(energy_rank(attention[split + 8 :, :split], 1e-12)) == 16
    assert int(energy_rank(torch.zeros(4, 5, dtype=torch.float64), 0.01)) == 0
    assert energy_rank(torch.eye(8, dtype=torch.float64).expand(2, 8, 8), 0.26).tolist() == [6, 6]


@pytest.mark.parametrize("most", [1, 2, 8])
def test_what_can_be_looked_up(most: int) -> None:
    tokens = (random_ids(1, 300, 2)[0] % 9).tolist()
    others = [(random_ids(1, 200, seed)[0] % 13).tolist() for seed in (3, 4)]
    samples = [TextSample(tuple(text), (len(text) - 3, len(text))) for text in (tokens, *others)]
    statistic = ArLoss(rare=most)
    statistic.know(samples)
    looked = statistic.looked_up(samples[0])
    expected = naive.repeated(tokens, others, most)
    assert getattr(looked, "places", ()) == tuple(expected)
    assert spread(range(MOST)) == tuple(range(MOST))
    assert spread(range(2 * MOST + 1)) == tuple(number * (2 * MOST + 1) // MOST for number in range(MOST))
    # Later tokens of the document change nothing, nor do they where it is cut.
    assert repeats(tokens[:150], {}, most) == [place for place in repeats(tokens, {}, most) if place < 150]
    if looked is not None:
        assert looked.targets(torch.device("cpu")).tolist() == [tokens[place] for place in expected]


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3"])
def test_the_loss_of_a_window_on_these_tokens(family: str, tmp_path: Path) -> None:
    loaded = tiny_loaded(family)
    tokens = (random_ids(1, 80, 5)[0] % 12 + 4).tolist()
    doc, plain = TextSample(tuple(tokens), (70, 80)), TextSample(tuple(range(4, 84)), (70, 80))
    statistic, window = ArLoss(sink=2, window=9, rare=2), WindowGroup(sink=2, alpha=9, beta=0.0)
    profile = run_profile(loaded, {80: [doc, plain]}, [statistic, Effect(targets=(window,))], tmp_path, seed=0)
    places = naive.repeated(tokens, [list(plain.tokens)], 2)
    assert len(places) > 10 and min(places) < 70
    exact = tiny_model(family).double()
    shape = shape_of(exact)
    layers, _ = naive.model_layers(exact, shape, doc, places)
    effects = torch.stack([naive.window_effects(layer, shape.kv_heads, Span(2, 9, 0.0)) for layer in layers])
    for key, expected in (("", effects.abs().sum((2, 3))), ("signed", effects.sum((2, 3)))):
        found = profile.tensors[next(k for k in profile.tensors if (k.statistic, k.part) == ("ar_loss", key))]
        torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=1e-6)
    # The answers' loss is another one, and the profile's; a document without such tokens does not count.
    answers, _ = naive.model_layers(exact, shape, doc)
    assert not torch.allclose(answers[0].gradient, layers[0].gradient, rtol=0.1)
    assert set(profile.header.loss) == {80}


def test_a_profile_without_such_tokens_has_no_number(tmp_path: Path) -> None:
    plain = TextSample(tuple(range(4, 74)), (60, 70))
    profile = run_profile(tiny_loaded("llama-gqa"), {70: [plain]}, [ArLoss()], tmp_path, seed=0)
    assert not profile.tensors and not profile.header.loss
    assert run_profile(tiny_loaded("llama-gqa"), documents(), [ArLoss()], tmp_path / "some", seed=0).tensors
