"""Joint training of a plan whose targets have parameters: rates of their own, large vocabularies, windows left out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from compress.errors import UserError
from compress.models.planned import planned_model
from compress.models.shape import shape_of
from compress.plan import uniform_plan
from compress.train import recovery, student
from compress.train.prepare import prepare
from compress.train.settings import PrepareSettings
from compress.train.window_dropout import DroppedWindows, two_branched, window_dropped
from compress.train.windows import WindowBatches, Windows
from tests.tiny import tiny_model
from tests.train import scaled
from tests.train.common import SOFT, model_of, settings, text, trained
from tests.train.scaled import ScaledGroup


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with scaled.registered():
        yield


def planned(dense: Any = None) -> Any:
    dense = model_of() if dense is None else dense
    return planned_model(dense, uniform_plan(shape_of(dense), ScaledGroup(window=4)), untrained=True)


def own(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if ".mixers." in name}


def test_mixers_learn_at_a_rate_of_their_own_and_resume_with_it(tmp_path: Path) -> None:
    start, made = own(planned()), {}
    for name, changes in {"same": {}, "slow": {"mixer_rate": 1e-6}, "fast": {"mixer_rate": 0.03}}.items():
        made[name] = own(trained(tmp_path / name, planned(), train="full", rate=0.003, **changes)[0])
    moved = {
        name: max(float((weight - start[key]).abs().max()) for key, weight in weights.items())
        for name, weights in made.items()
    }
    assert 0 < moved["slow"] < 1e-5 < moved["same"] < moved["fast"] / 3

    class Stop(Exception):
        pass

    def stop(done: int, *_: Any) -> None:
        if done == 3:
            raise Stop

    options = settings(train="full", rate=0.003, mixer_rate=0.03, save_every=2)
    with pytest.raises(Stop):
        recovery.recover(planned(), options, text(), tmp_path / "cut", seed=3, progress=stop)
    again = planned()
    recovery.recover(again, options, text(), tmp_path / "cut", seed=3)
    assert all(torch.equal(weight, made["fast"][name]) for name, weight in own(again).items())


@pytest.mark.parametrize("loss", ["both", "text"])
def test_logits_in_parts_train_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    def curve(name: str) -> list[dict[str, float]]:
        changes = {"loss": loss, "train": "full", "rate": 0.003, "steps": 3, "teacher": model_of()}
        trained(tmp_path / name, planned(), **changes)
        return [json.loads(line) for line in (tmp_path / name / "loss.jsonl").read_text().splitlines()]

    whole = curve("whole")
    calls: list[int] = []
    split = student.Student._run_in_parts

    def noted(self: Any, *args: Any) -> None:
        calls.append(len(args[-1]))
        split(self, *args)

    monkeypatch.setattr(student, "LOGITS_BYTES", 4 * 16 * 97 * 3)  # three of four sequences
    monkeypatch.setattr(student.Student, "_run_in_parts", noted)
    parts = curve("parts")
    assert calls == [2, 2, 2]
    for one, other in zip(whole, parts, strict=True):
        for name in one.keys() - {"seconds"}:
            assert one[name] == pytest.approx(other[name], rel=1e-5)


def test_a_head_that_caps_its_logits_is_not_taken_apart() -> None:
    assert student.has_plain_head(model_of()) and student.has_plain_head(planned())
    torch.manual_seed(0)
    config = transformers.GraniteConfig(**SOFT, logits_scaling=2.0)
    assert not student.has_plain_head(transformers.AutoModelForCausalLM.from_config(config).eval())


@dataclass(eq=False)
class _Layer:
    branches: str | None


def test_windows_are_dropped_less_and_less_and_come_back() -> None:
    layers = [_Layer("both") for _ in range(40)]
    kinds = [SimpleNamespace(mixers=(layer, _Layer(None)), members=((0,), (1,))) for layer in layers]
    model = SimpleNamespace(base_model=SimpleNamespace(compress_kinds=kinds))
    assert two_branched(model) == layers
    batches = WindowBatches(Windows(text(), 16, 0), 4, 2)
    assert DroppedWindows.of(batches, model, settings(), "a") is batches
    dropped = DroppedWindows.of(batches, model, settings(window_dropout=[0.8, 0.2, 0.0]), "a")
    counts = []
    for step in range(6):
        (parts,) = dropped.passes(step, 1)
        assert [part["input_ids"].tolist() for part in parts] == [
            part["input_ids"].tolist() for part in batches.passes(step, 1)[0]
        ]
        counts.append(sum(len(part["dropped"]) for part in parts))
        assert [part["dropped"] for part in parts] == [part["dropped"] for part in dropped.passes(step, 1)[0]]
    assert min(counts[:2]) > 48 > 32 > max(counts[2:4]) > 0 and counts[4:] == [0, 0]
    with window_dropped(model, (0, 39)):
        assert [layer.branches for layer in layers] == ["linear", *["both"] * 38, "linear"]
    assert {layer.branches for layer in layers} == {"both"}


def test_losses_of_layers_and_of_models_are_told_apart() -> None:
    given = {"targets": [{"target": "scaled", "window": 4}], "steps": 1}
    with pytest.raises(ValueError, match="`text` is no loss of a layer; expected one of `balance`, `parts`, "):
        PrepareSettings.model_validate(given | {"objectives": [{"name": "text"}]})
    with pytest.raises(ValueError, match="`parts` is a loss of single layers"):
        settings(objectives=[{"name": "parts"}])
    named = PrepareSettings.model_validate(given | {"objectives": [{"name": "transfer"}]})
    assert named.facts().keys() - PrepareSettings.model_validate(given).facts().keys() == {"objectives"}
    assert "mixer_rate" not in settings().facts() and "mixer_rate" in settings(mixer_rate=0.1).facts()


def test_parts_are_asked_of_targets_that_have_some(tmp_path: Path) -> None:
    given = {"targets": [{"target": "scaled", "window": 4}], "steps": 1, "length": 16, "batch_size": 2}
    options = PrepareSettings.model_validate(given | {"objectives": [{"name": "parts"}]})
    model = tiny_model("llama-gqa")
    with pytest.raises(UserError, match="asks for the parts of hybrid heads, which `scaled` does not have"):
        prepare(model, shape_of(model), options, text(), tmp_path)
