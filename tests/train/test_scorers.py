"""Scorers: least squares against numpy, exact fits, training, and thresholds that keep the shares they promise."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from accelerate import Accelerator
from pydantic import ValidationError
from torch import nn

from compress.errors import UserError
from compress.models.planned import planned_model
from compress.models.prepared import attach, prepared_for, read_prepared
from compress.models.reconstruction import LEAST, SINKS, TokenScores
from compress.models.retention import Measured, Retention, spearman
from compress.models.shape import shape_of
from compress.plan import make_plan, uniform_plan
from compress.runtime.scorer_gate import Gate
from compress.runtime.scorer_mlp import Mlp
from compress.runtime.scorer_ridge import Ridge, scalars_of
from compress.runtime.scorers import Scorer
from compress.targets.retain import RetainGroup
from compress.train.compressed_states import forgetful, given_to_scorers
from compress.train.loop import Settings, train
from compress.train.normal_equations import NormalEquations
from compress.train.objectives.reconstruction import Reconstruction
from compress.train.prepare import prepare
from compress.train.schedule import Schedule
from compress.train.scorers import Pieces, Scorers
from compress.train.settings import PrepareSettings
from compress.train.state import Partial
from compress.train.windows import WindowBatches, Windows, half_and_half
from tests.tiny import VOCABULARY, tiny_model, tiny_tokenizer

GROUPS, HIDDEN, DIM = 2, 48, 12
# One text of each length, where no spread is asked for, is quicker.
OBJECTIVE = Reconstruction(lengths=(32, 64), chunk=40, penalty=1e-9).model_copy(update={"documents": 1})


@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_normal_equations_are_least_squares(penalty: float) -> None:
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(90, 5, generator=generator) * torch.tensor([1.0, 10.0, 0.1, 1.0, 1.0]) + 3
    shared[:, 3] = 2.5  # never changes
    own, target = torch.randn(2, 90, 2, generator=generator), torch.randn(2, 90, generator=generator)
    equations = NormalEquations(2, 5, 2)
    for part in (slice(0, 1), slice(1, 40), slice(40, 90)):
        equations.add(shared[part], own[:, part], target[:, part])
    weights, owns, intercepts = equations.solve(penalty)
    assert weights[:, 3].abs().max() == 0
    moving = [0, 1, 2, 4]
    for group in range(2):
        features = torch.cat([shared[:, moving], own[group]], 1).double().numpy()
        scale = features.std(0)
        rows = np.concatenate([features - features.mean(0), np.diag(scale * np.sqrt(90 * penalty))])
        centred = target[group].double().numpy() - target[group].double().numpy().mean()
        expected = np.linalg.lstsq(rows, np.concatenate([centred, np.zeros(6)]), rcond=None)[0]
        found = torch.cat([weights[group, moving], owns[group]]).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)
        constant = target[group].double().mean().item() - features.mean(0) @ expected
        assert abs(intercepts[group].item() - constant) < 1e-8


def test_rank_correlation_is_spearmans() -> None:
    left, right = torch.rand(2, 3, 50, generator=torch.Generator().manual_seed(2))
    expected = [scipy.stats.spearmanr(one, other).statistic for one, other in zip(left, left + right, strict=True)]
    torch.testing.assert_close(spearman(left, left + right), torch.tensor(expected))


def test_thresholds_keep_the_shares_that_they_promise() -> None:
    generator, measured = torch.Generator().manual_seed(3), Measured(3, GROUPS)
    documents = [torch.randn(GROUPS, length, generator=generator) + shift for length, shift in ((96, 0.0), (155, 1.0))]
    for document in documents:
        measured.begin(document.shape[1])
        measured.add(1, document, 2 * document)  # layer 0 and 2 slide by themselves
    retention = Retention.of(measured.retention().tensors())
    pooled = torch.cat(documents, 1)
    for share in (1 / 64, 0.125, 0.5, 0.9):
        threshold, spread = retention.at(share)
        assert bool(threshold[[0, 2]].isnan().all())
        kept = (pooled >= threshold[1][:, None]).float().mean(1)
        assert bool(((kept - share).abs() < 2 / 251).all())
    for share, threshold in zip(retention.shares, retention.thresholds[1].T, strict=True):  # the nearest whole number
        assert bool(((pooled >= threshold[:, None]).sum(1) - 251 * share).abs().max() <= 0.5)
    threshold, spread = retention.at(0.25)
    each = torch.stack([(document >= threshold[1][:, None]).float().mean(1) for document in documents])
    torch.testing.assert_close(spread[1], each.std(0, correction=0))
    torch.testing.assert_close(retention.kept[:, 1, :, 15], each)
    assert retention.lengths.tolist() == [96, 155] and bool((each[0] < each[1]).all())
    assert retention.wanted is not None and torch.equal(retention.wanted[1], 2 * retention.thresholds[1])
    for score, above in ((0.4, retention.above(0.2)[0]), (1.0, retention.above(0.5)[0])):
        torch.testing.assert_close(retention.wanted_above(score), above, equal_nan=True)
    earlier = Retention.of({name: value for name, value in retention.tensors().items() if name != "wanted"})
    assert earlier.wanted_above(1.0) is None and torch.equal(earlier.thresholds[1], retention.thresholds[1])
    for beyond, share in ((0.0, 1 / 64), (1.0, 63 / 64)):
        assert torch.equal(retention.at(beyond)[0][1], retention.at(share)[0][1])
    spread_out = sum(((2 * one - (2 * one).mean(1, keepdim=True)) ** 2).sum() for one in documents)
    of_token = 251 * GROUPS  # and of a head group
    wrong = float(pooled.square().sum()) / of_token
    assert measured.losses() == pytest.approx((float(spread_out) / of_token, wrong), rel=1e-5)
    assert measured.errors()[1].tolist() == pytest.approx([float(e) for e in _errors(documents)])


def _errors(documents: list[torch.Tensor]) -> torch.Tensor:
    wrong = torch.stack([document.double().square().sum(1) for document in documents])
    varies = torch.stack([4 * document.double().var(1, correction=0) * document.shape[1] for document in documents])
    return wrong.sum(0) / varies.sum(0)


@pytest.mark.parametrize("kind", [Ridge, Mlp, Gate])
def test_a_token_is_judged_alone(kind: type[Scorer]) -> None:
    scorer = kind(GROUPS, HIDDEN, DIM)
    assert sum(weight.numel() for weight in scorer.parameters()) == GROUPS * kind.parameter_count(HIDDEN, DIM)
    assert all(len(weight) == GROUPS for weight in scorer.parameters()) and kind.flops(HIDDEN, DIM) > 0
    generator = torch.Generator().manual_seed(4)
    for weight in scorer.parameters():
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    hidden = torch.randn(2, 9, HIDDEN, generator=generator)
    key, value = torch.randn(2, 2, GROUPS, 9, DIM, generator=generator)
    positions = torch.arange(9).expand(2, 9) + 5
    whole = scorer(hidden, key, value, positions)
    assert whole.shape == (2, GROUPS, 9) and whole.dtype == torch.float32
    for one in (0, 8):
        place = slice(one, one + 1)
        alone = scorer(hidden[:, place], key[:, :, place], value[:, :, place], positions[:, place])
        torch.testing.assert_close(alone, whole[:, :, place])
    some = kind(1, HIDDEN, DIM)  # the second head group alone
    for mine, all_groups in zip(some.parameters(), scorer.parameters(), strict=True):
        mine.data.copy_(all_groups[1:])
    torch.testing.assert_close(some(hidden, key[:, 1:], value[:, 1:], positions), whole[:, 1:])


class _Layer(nn.Module):
    def __init__(self, kind: type[Scorer]) -> None:
        super().__init__()
        self.scorer = kind(GROUPS, HIDDEN, DIM)


@pytest.fixture(scope="module")
def batches() -> Pieces:
    """Two windows of 64 tokens a step."""
    tokens = random.Random(0).choices(range(4, VOCABULARY), k=64 * 12)
    return Pieces(WindowBatches(Windows(tokens, 64, 0), 2, None), OBJECTIVE.lengths_within(64))


def scorers_of(kind: type[Scorer]) -> Scorers:
    layers = {layer: _Layer(kind) for layer in range(3)}
    return Scorers(tiny_model("qwen2"), tiny_tokenizer(), layers, OBJECTIVE)


@pytest.fixture(scope="module")
def fitted(batches: Pieces) -> Iterator[Scorers]:
    scorers = scorers_of(Ridge)
    with scorers.repeating():
        scorers.fit(batches, 4, Accelerator(cpu=True))
        yield scorers


def test_a_ridge_is_the_least_squares_of_all_tokens(fitted: Scorers, batches: Pieces) -> None:
    features: dict[int, list[Any]] = {}
    for step in range(4):
        (part,) = batches.passes(step, 1)[0]
        assert part["input_ids"].shape == ((4, 32), (2, 64))[step % 2]
        for text in part["input_ids"]:
            for scores in fitted.scored(text):
                features.setdefault(scores.layer, []).append(_rows(scores))
    for layer, rows in features.items():
        for group in range(GROUPS):
            x = np.concatenate([part[0][group] for part in rows])
            y = np.concatenate([part[1][group] for part in rows])
            expected = np.linalg.lstsq(x, y, rcond=None)[0]
            scorer = fitted.scorer(layer)
            found = torch.cat([scorer.weight[group], scorer.scalars[group], scorer.bias[group : group + 1]])  # type: ignore[index]
            np.testing.assert_allclose(x @ found.detach().double().numpy(), x @ expected, rtol=1e-3, atol=1e-3)


def test_thresholds_may_be_of_longer_texts_that_are_not_repeated(
    fitted: Scorers, batches: Pieces, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitted, "_objective", OBJECTIVE.model_copy(update={"documents": 2}))
    short = fitted.measure(batches, 0, GROUPS, 3).retention()
    longer = OBJECTIVE.model_copy(update={"thresholds": (200, 300), "documents": 2})
    monkeypatch.setattr(fitted, "_objective", longer)
    found = fitted.measure(batches, 0, GROUPS, 3)
    retention = found.retention()
    assert retention.lengths.tolist() == [200, 300] and torch.equal(retention.rank, short.rank)
    assert retention.wanted is not None and short.wanted is not None  # of the texts that are repeated
    assert torch.equal(retention.wanted, short.wanted)
    # Nothing stands behind these texts, so that their ends count as well, whatever is left out of the fit.
    monkeypatch.setattr(fitted, "_objective", longer.model_copy(update={"margin": 100}))
    ends = fitted.measure(batches, 0, GROUPS, 3).retention()
    assert torch.equal(ends.thresholds, retention.thresholds)
    assert ends.wanted is not None and not torch.equal(ends.wanted, short.wanted)
    # The scores of the texts as one pass of the model gives them.
    model, whole = fitted._model[0], batches.batches.windows.table.flatten()
    all_kept = uniform_plan(shape_of(model), RetainGroup(scorer="ridge"))
    texts = [whole[start : start + length] for length, last in ((200, 568), (300, 468)) for start in (0, last)]
    scored: list[list[torch.Tensor]] = []
    with given_to_scorers(planned_model(model, all_kept, untrained=True)) as states:
        for text in texts:
            given = states(tuple(text.tolist()))
            scored.append([])
            for layer in range(3):
                hidden, key, value, _ = given[layer]
                at = torch.arange(len(text))[None]
                scored[-1].append(fitted.scorer(layer)(hidden, key, value, at)[0, :, SINKS:])
    for layer in range(3):
        every = torch.cat([document[layer] for document in scored], 1)
        kept = (every[..., None] >= retention.thresholds[layer][:, None]).double().mean(1)
        torch.testing.assert_close(kept, retention.shares.double().expand_as(kept), atol=0.005, rtol=0)
    assert (
        Reconstruction().model_dump().keys()
        == OBJECTIVE.model_dump().keys()
        == longer.model_dump().keys() - {"thresholds"}
    )
    with pytest.raises(UserError, match="too short for thresholds"):
        batches.stretches(769, 1)


def test_a_scorer_may_stand_for_kvzip(batches: Pieces) -> None:
    objective = OBJECTIVE.model_copy(update={"score": "KVzip"})
    scorers = Scorers(tiny_model("qwen2"), tiny_tokenizer(), {layer: _Layer(Ridge) for layer in range(3)}, objective)
    (text, *_), wanted = batches.texts(64, 1, 0), []
    with scorers.repeating():
        scores = list(scorers.scored(text))
        scorers.run(None, {"input_ids": text[None]}, lambda student, teacher: wanted.append(teacher["scores"]))
    for found, one in zip(wanted, scores, strict=True):
        torch.testing.assert_close(found, one.weight.clamp(min=LEAST).log())
        assert not torch.allclose(found, one.wanted())
    assert objective.model_dump().keys() - OBJECTIVE.model_dump().keys() == {"score"}


def test_the_last_tokens_of_a_text_may_be_left_out(batches: Pieces) -> None:
    objective = OBJECTIVE.model_copy(update={"margin": 20})
    scorers = Scorers(tiny_model("qwen2"), tiny_tokenizer(), {layer: _Layer(Ridge) for layer in range(3)}, objective)
    (text, *_) = batches.texts(64, 1, 0)
    with scorers.repeating():
        part = list(scorers.scored(text))
        scorers._objective = OBJECTIVE
        whole = list(scorers.scored(text))
        scorers._objective = OBJECTIVE.model_copy(update={"margin": 1000})
        half = list(scorers.scored(text))
    for found, least, one in zip(part, half, whole, strict=True):
        count = len(one.hidden) - 20
        assert len(found.hidden) == count and len(least.hidden) == (len(one.hidden) + 1) // 2
        for name in ("key", "value", "weight", "moved"):
            assert torch.equal(getattr(found, name), getattr(one, name)[:, :count])
        assert torch.equal(found.hidden, one.hidden[:count]) and torch.equal(found.positions, one.positions[:count])
    assert objective.model_dump().keys() - OBJECTIVE.model_dump().keys() == {"margin"}


def _rows(scores: TokenScores) -> tuple[np.ndarray, np.ndarray]:
    """Features with a one, `[G, n, F]`, and what is fitted."""
    scalars = scalars_of(scores.key[None], scores.value[None], scores.positions[None])[0]
    hidden = scores.hidden.expand(GROUPS, *scores.hidden.shape)
    x = torch.cat([hidden, scalars, torch.ones(*scalars.shape[:2], 1)], -1)
    return x.double().numpy(), scores.wanted().double().numpy()


@pytest.mark.parametrize("kind", [Mlp, Gate])
def test_training_by_steps_lowers_the_error(
    kind: type[Scorer], batches: Pieces, fitted: Scorers, tmp_path: Path
) -> None:
    scorers = scorers_of(kind)
    if kind.fitted:
        for layer in range(3):
            exact = fitted.scorer(layer)
            scorers.scorer(layer).take_linear(*exact.parameters())
    with torch.no_grad():
        before = _error(scorers, batches)
    loop = Settings("0", Schedule.cosine(0.02, 8, 0.0), clip=1.0)
    with scorers.repeating():
        train(scorers, [OBJECTIVE], batches, loop, Partial(tmp_path, "key"), Accelerator(cpu=True))
    assert _error(scorers, batches) < 0.998 * before


def _error(scorers: Scorers, batches: Pieces) -> float:
    """On texts that are trained on."""
    with scorers.repeating():
        return scorers.measure(batches, 0, GROUPS, 3).losses()[1]


def test_a_share_becomes_a_threshold_of_every_head_group(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    shape = shape_of(model)
    entries = [{"target": "retain", "scorer": scorer, "threshold": 0, "share": 1} for scorer in ("ridge", "value_norm")]
    given: dict[str, Any] = {"length": 256, "batch_size": 2, "steps": 2, "targets": entries}
    given["objectives"] = [{"name": "reconstruction", "documents": 2, "lengths": [128, 256]}]
    tokens = random.Random(0).choices(range(4, VOCABULARY), k=256 * 6)
    prepare(model, shape, PrepareSettings.model_validate(given), tokens, tmp_path, tokenizer=tiny_tokenizer())
    attach(model, read_prepared(tmp_path))
    for option in prepared_for(model):
        assert option.retention is not None and option.retention.lengths.tolist() == [128, 256]
        thresholds, spreads = option.retention.at(0.25)
        known = option.target.model_dump() | {"alpha": 64, "sink": 0, "share": 0.25}
        pairs = torch.stack([thresholds, spreads], -1).tolist()
        groups = [[RetainGroup(**known | {"threshold": tau, "spread": spread}) for tau, spread in row] for row in pairs]
        planned = planned_model(model, make_plan(shape, groups, provenance={}))
        ids = torch.tensor([tokens[-256:]])
        with torch.no_grad():
            whole = planned(ids, use_cache=True)
            start = planned(ids[:, :101], use_cache=True)
            rest = planned(ids[:, 101:255], past_key_values=start.past_key_values).logits
            last = planned(ids[:, 255:], past_key_values=start.past_key_values).logits
        torch.testing.assert_close(torch.cat([rest, last], 1), whole.logits[:, 101:], rtol=1e-3, atol=1e-3)
        cache = whole.past_key_values
        counts = torch.cat([layer.states[0].tensors["count"].flatten() for layer in cache.paged])
        assert abs(float(counts.float().mean()) / 256 - 0.25) < 0.08
    (ridge, norm) = prepared_for(model)
    assert ridge.record.last_loss < ridge.record.first_loss and not norm.tensors and norm.record.steps == 0
    with pytest.raises(ValidationError, match="`transfer` trains nothing of `retain`"):
        PrepareSettings.model_validate(given | {"objectives": [{"name": "transfer"}]})


def test_two_texts_have_as_many_windows_each() -> None:
    assert half_and_half(range(11), range(100, 140), 4) == [*range(8), *range(100, 108)]


def test_no_text_is_longer_than_a_window() -> None:
    assert Reconstruction().lengths_within(512) == (128, 256, 512)
    assert Reconstruction(lengths=(1024, 64)).lengths_within(512) == (64,)
    assert Reconstruction().lengths_within(20) == (20,)


def test_a_second_round_is_on_the_states_of_a_model_that_forgets(tmp_path: Path) -> None:
    model, target = tiny_model("qwen2"), RetainGroup(sink=0, alpha=1, scorer="ridge")
    shape, length = shape_of(model), 192
    tokens = random.Random(0).choices(range(4, VOCABULARY), k=length * 6)
    objective = Reconstruction(documents=2, lengths=(length,), chunk=64)
    settings: dict[str, Any] = {"length": length, "batch_size": 1, "steps": 3, "targets": [target.model_dump()]}
    settings |= {"again": 0.125, "objectives": [{"name": "reconstruction", **objective.model_dump()}]}
    prepare(model, shape, PrepareSettings.model_validate(settings), tokens, tmp_path, tokenizer=tiny_tokenizer())
    (option,) = read_prepared(tmp_path)
    scorers = Scorers(model, tiny_tokenizer(), {layer: _Layer(Ridge) for layer in range(3)}, objective)
    pieces = Pieces(WindowBatches(Windows(tokens, length, 0), 1, None), (length,))
    with scorers.repeating(), torch.no_grad():
        scorers.fit(pieces, 3, Accelerator(cpu=True))
        retention = scorers.measure(pieces, 3, GROUPS, 3).retention()
        layers = {layer: scorers.scorer(layer) for layer in range(3)}
        first = scorers.measure(pieces, 0, GROUPS, 3).losses()[1]
        everything = planned_model(model, uniform_plan(shape, target), untrained=True)
        with scorers.reading(everything):  # what forgets nothing has the states of the dense model
            assert scorers.measure(pieces, 0, GROUPS, 3).losses()[1] == pytest.approx(first, rel=1e-3)
        with scorers.reading(forgetful(model, shape, target, 0.125, retention, layers)):
            before = scorers.measure(pieces, 0, GROUPS, 3).losses()[1]
            scorers.fit(pieces, 3, Accelerator(cpu=True))
            after = scorers.measure(pieces, 0, GROUPS, 3).losses()[1]
    assert first < after < 0.85 * before
    for layer in range(3):  # the option is what came of it
        refitted = scorers.scorer(layer).get_parameter("weight").detach()
        torch.testing.assert_close(option.tensors[f"{layer}.scorer.weight"], refitted)
    assert "again" not in PrepareSettings.model_validate(settings | {"again": None}).facts()
    with pytest.raises(ValidationError, match="`again` is a round for scorers, and `linear` has none"):
        PrepareSettings.model_validate({"steps": 1, "again": 0.5, "targets": [{"target": "linear"}]})
