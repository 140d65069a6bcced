"""Targets that are trained before the search: layer by layer on dense activations, resumable, and found by plans."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from compress.cli.app import app
from compress.cli.recipe import opened
from compress.errors import UserError
from compress.models.planned import planned_model, set_plan
from compress.models.prepared import OPTION, TENSORS, attach, read_option, read_prepared
from compress.models.shape import shape_of
from compress.plan import make_plan, read_plan, uniform_plan
from compress.profile.heads.effect import Effect
from compress.profile.run import run_profile
from compress.profile.store import read_profile
from compress.runfolder import RunFolder
from compress.targets.full import FullGroup
from compress.targets.window import WindowGroup
from compress.train.lora import projections
from compress.train.prepare import prepare
from compress.train.settings import PrepareSettings
from tests.cli.recipes import make_recipe
from tests.profile.common import documents
from tests.tiny import random_ids, tiny_loaded, tiny_model
from tests.train import scaled
from tests.train.common import text, trained
from tests.train.scaled import ScaledGroup
from tests.train.scaled_mixer import ScaledMixer

SETTINGS: dict[str, Any] = {
    "targets": [{"target": "scaled", "window": 4}],
    "length": 32,
    "batch_size": 4,
    "steps": 8,
    "rate": 0.05,
    "warmup": 0.0,
}


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with scaled.registered():
        yield


def prepared(model: Any, folder: Path, progress: Any = None, **changes: Any) -> Any:
    settings = PrepareSettings.model_validate(SETTINGS | changes)
    return prepare(model, shape_of(model), settings, text(), folder, seed=1, progress=progress)


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3"])
def test_training_brings_a_target_nearer_to_dense_attention(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    (record,) = prepared(model, tmp_path, steps=20).values()
    (start,) = prepared(model, tmp_path / "start", steps=1, rate=1e-9).values()
    windows = shape_of(model).native_windows
    for native, first, last in zip(windows, start.errors, record.errors, strict=True):
        assert (first is None) == (last is None) == (native is not None)
        if first is not None and last is not None:
            assert sum(last) < 0.97 * sum(first)
    assert record.last_loss < record.first_loss
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert all(weight.requires_grad for weight in model.parameters()) and not model.training
    (option,) = read_prepared(tmp_path)
    free = {str(layer) for layer, native in enumerate(windows) if native is None}
    assert {name.partition(".")[0] for name in option.tensors} == free
    assert option.target == ScaledGroup(window=4) and option.errors.shape == (len(windows), 2)


def test_a_window_that_hides_nothing_has_nothing_to_learn(tmp_path: Path) -> None:
    model = tiny_model("llama-gqa")
    (record,) = prepared(model, tmp_path, steps=1, targets=[{"target": "scaled", "window": 999}]).values()
    assert record.first_loss < 1e-9


def test_an_interrupted_preparation_ends_with_the_same_tensors_and_parts_change_nothing(tmp_path: Path) -> None:
    model = tiny_model("llama-gqa")
    two = [{"target": "scaled", "window": window} for window in (4, 6)]
    whole = prepared(model, tmp_path / "whole", targets=two)

    def stop(done: int, total: int, what: str) -> None:
        if done == 13:  # in the second target
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(model, tmp_path / "parts", stop, targets=two, save_every=2)
    assert not (tmp_path / "parts" / "prepare.json").exists()
    seen: list[int] = []
    parts = prepared(model, tmp_path / "parts", lambda done, *_: seen.append(done), targets=two, save_every=2)
    assert seen == [13, 14, 15, 16]  # the first target is not trained again, the second goes on from its last state
    assert {name: option.sha256 for name, option in parts.items()} == {
        name: option.sha256 for name, option in whole.items()
    }
    assert not list((tmp_path / "parts").rglob("partial*"))
    (small,) = prepared(model, tmp_path / "small", micro_batch=1).values()
    first = next(iter(whole.values()))
    torch.testing.assert_close(torch.tensor(small.errors), torch.tensor(first.errors), rtol=1e-3, atol=1e-3)


def test_plans_find_what_was_prepared(tmp_path: Path) -> None:
    model = tiny_model("llama-gqa")
    shape, target = shape_of(model), ScaledGroup(window=4)
    with pytest.raises(UserError, match="tensors of a trained target of the plan are missing"):
        planned_model(model, uniform_plan(shape, target))
    prepared(model, tmp_path)
    options = read_prepared(tmp_path)
    attach(model, options)
    full, ids = FullGroup(), random_ids(2, 40)
    plan = make_plan(shape, [[full, target], [target, target], [full, full]], provenance={})
    planned = planned_model(model, plan)
    for layer, groups in ((0, [1]), (1, [0, 1])):
        mixer = planned.model.layers[layer].self_attn.mixers["scaled"]
        for name in ("sharpness", "shift"):
            assert torch.equal(mixer.get_parameter(name), options[0].tensors[f"{layer}.{name}"][groups])
    switched = planned_model(model, uniform_plan(shape, full))
    set_plan(switched, plan)
    with torch.no_grad():
        assert torch.equal(switched(ids).logits, planned(ids).logits)


def test_what_a_prepared_target_costs_the_loss_is_that_of_its_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An untrained `scaled` is a window; with a mixer that reads its layer's input, which is there then."""
    loaded, window = tiny_loaded("llama-gqa"), WindowGroup(sink=0, alpha=16, beta=0.0)
    target = ScaledGroup(window=16)
    statistic = Effect(targets=(window, target))
    with pytest.raises(UserError, match="name it under `prepare"):
        run_profile(loaded, documents(), [statistic], tmp_path / "profile", seed=0)
    prepared(loaded.model, tmp_path / "start", targets=[target.model_dump()], steps=1, rate=1e-9)
    prepared(loaded.model, tmp_path / "end", targets=[target.model_dump()], steps=8)
    seen: list[tuple[int, ...]] = []

    def prefill(self: ScaledMixer, *tensors: Any, **options: Any) -> torch.Tensor:
        step = tensors[4]
        seen.append((*step.hidden.shape, *step.rotary[0].shape))
        return run(self, *tensors, **options)

    run = ScaledMixer.prefill
    attach(loaded.model, read_prepared(tmp_path / "start"))
    start = run_profile(loaded, documents(), [statistic], tmp_path / "profile", seed=0)
    for length in start.lengths:
        torch.testing.assert_close(start.effect(target, length), start.effect(window, length), rtol=1e-3, atol=1e-6)
    monkeypatch.setattr(ScaledMixer, "needs_inputs", True)
    monkeypatch.setattr(ScaledMixer, "prefill", prefill)
    again = run_profile(loaded, documents(), [statistic], tmp_path / "again", seed=0)
    assert again.header.key == start.header.key and torch.equal(again.effect(target, 70), start.effect(target, 70))
    assert (1, 70, 48, 1, 70, 12) in seen
    # Other tensors are another measurement, and other numbers.
    attach(loaded.model, read_prepared(tmp_path / "end"))
    end = run_profile(loaded, documents(), [statistic], tmp_path / "profile", seed=0)
    assert end.header.key != start.header.key and torch.equal(end.effect(window, 70), start.effect(window, 70))
    assert not torch.allclose(end.effect(target, 70), start.effect(target, 70), rtol=1e-2)


def test_damage_is_noticed(tmp_path: Path) -> None:
    model = tiny_model("llama-gqa")
    (name,) = prepared(model, tmp_path, steps=1)
    path = tmp_path / name / TENSORS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="missing or were changed"):
        read_prepared(tmp_path)
    (tmp_path / name / OPTION).write_text("{")
    with pytest.raises(UserError, match="record of a prepared target is damaged"):
        read_prepared(tmp_path)
    again = prepared(model, tmp_path, steps=1)
    assert read_prepared(tmp_path)[0].record == again[name]


def test_targets_without_parameters_are_refused() -> None:
    with pytest.raises(ValidationError, match="`window` has nothing to train"):
        PrepareSettings.model_validate(
            SETTINGS | {"targets": [{"target": "window", "sink": 4, "alpha": 8, "beta": 0.0}]}
        )


@pytest.mark.parametrize("train", ["lora", "mixers"])
def test_recovery_trains_what_targets_have_of_their_own(tmp_path: Path, train: str) -> None:
    model = tiny_model("llama-gqa")
    prepared(model, tmp_path / "options", steps=1)
    attach(model, read_prepared(tmp_path / "options"))
    planned = planned_model(model, uniform_plan(shape_of(model), ScaledGroup(window=4)))
    before = {name: weight.clone() for name, weight in planned.state_dict().items()}
    trained(tmp_path / "recover", planned, train=train, loss="distill", teacher=model, rate=0.003)
    moved = {name for name, weight in planned.state_dict().items() if not torch.equal(weight, before[name])}
    own = {name for name in before if ".mixers." in name}
    assert moved == (own if train == "mixers" else own | {f"{name}.weight" for name in projections(planned)})
    with pytest.raises(UserError, match="no parameters of their own"):
        trained(tmp_path / "dense", model, train="mixers")


def test_the_stage_trains_once_and_follows_its_keys(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_model("llama-gqa"))
    section = "prepare: {targets: [{target: scaled, window: 8}], length: 32, batch_size: 2, steps: 4, rate: 0.05}\n"
    recipe.write_text(recipe.read_text() + section)
    for command in ("validate", "profile"):
        result = CliRunner().invoke(app, [command, str(recipe)])
        assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["search", str(recipe)])
    assert result.exit_code == 2 and f"compress prepare {recipe}" in result.stderr
    result = CliRunner().invoke(app, ["prepare", str(recipe)])
    folder = tmp_path / "run" / "options"
    assert result.exit_code == 0 and result.stdout.strip() == str(folder)
    assert "prepare: scaled window 8, 4 steps, 256 tokens" in result.stderr
    again = CliRunner().invoke(app, ["prepare", str(recipe)])
    assert "prepare: done before" in again.stderr
    with opened(str(recipe)) as session:
        keys = session.prepare_key(), session.profile_key(), session.search_key()
    recipe.write_text(recipe.read_text().replace("rate: 0.05", "rate: 0.04"))
    with opened(str(recipe)) as session:
        assert session.prepare_key() != keys[0] and session.profile_key() == keys[1]
    recipe.write_text(recipe.read_text().replace("window: 8", "windw: 8"))
    assert "did you mean `window`?" in CliRunner().invoke(app, ["validate", str(recipe)]).stderr


def test_prepare_search_export_reload(tmp_path: Path) -> None:
    """The whole run with a target that is trained first, through the command line, and its checkpoint by itself."""
    recipe = make_recipe(tmp_path, tiny_model("llama-gqa"))
    text = recipe.read_text().replace("solver: {name: moa, points: 1}", "solver: {name: priced, points: 1}")
    section = "prepare: {targets: [{target: scaled, window: 64}], length: 128, batch_size: 2, steps: 6, rate: 0.05}\n"
    recipe.write_text(text + section)
    refused = CliRunner().invoke(app, ["validate", str(recipe)])
    assert refused.exit_code == 2 and "or `effect: true` to `prepare`" in " ".join(refused.stderr.split())
    recipe.write_text(text + section.replace("steps: 6", "steps: 6, effect: true"))
    result = CliRunner().invoke(app, ["run", str(recipe)])
    assert result.exit_code == 0, result.output
    run = tmp_path / "run"
    assert list(RunFolder(run).stages()) == ["profile", "prepare", "effect", "search", "export", "evaluate"]
    plan = read_plan(run / "plan.json")
    chosen = [(n, g) for n, layer in enumerate(plan.layers) for g, group in enumerate(layer.groups) if group.objective]
    assert 0 < len(chosen) < 6
    effects = read_profile(run / "options" / "effect")
    assert "effect: scaled window 64, nats to first order" in result.stderr
    report = json.loads((run / "search" / "pareto.json").read_text())
    predicted = next(row["predicted_losses"] for row in report["plans"] if row["name"] == report["chosen"])
    for length in (192, 320):
        lost = effects.effect(ScaledGroup(window=64), length)
        assert predicted[f"effect.absolute.{length}"] == pytest.approx(sum(float(lost[place]) for place in chosen))
    assert {row["name"] for row in report["baselines"]} >= {"uniform", "random", "interleaved"}
    shown = CliRunner().invoke(app, ["inspect", str(run / "options")]).stdout
    assert "scaled window 64" in shown and "transfer" in shown and "effect at 320" in shown
    assert (
        f"{max(e for row in read_option(next((run / 'options').glob('scaled-*'))).errors for e in row or ()):.3g}"
        in shown
    )
    shown = CliRunner().invoke(app, ["inspect", str(run)]).stdout
    assert f"scaled window 64: {len(chosen)} head group" in shown
    (option,) = read_prepared(run / "options")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    attach(dense, (option,))
    ids = random_ids(1, 300)
    model = AutoModelForCausalLM.from_pretrained(run / "checkpoint", trust_remote_code=True).eval()
    layer, group = chosen[0]
    mixer = model.model.layers[layer].self_attn.mixers["scaled"]
    place = [g for n, g in chosen if n == layer].index(group)
    assert torch.equal(mixer.shift[place], option.tensors[f"{layer}.shift"][group])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, planned_model(dense, plan)(ids).logits, rtol=1e-4, atol=1e-4)
        cache = model(ids, use_cache=True).past_key_values
    assert cache.held_bytes() == plan.cost(300, 4).held_bytes
    # What was trained is part of what the later stages depend on.
    again = CliRunner().invoke(app, ["run", str(recipe)])
    assert again.exit_code == 0 and again.output.count("done before") == 6
    (run / "options" / "prepare.json").write_text((run / "options" / "prepare.json").read_text() + " ")
    with opened(str(recipe)) as session:
        assert not session.run.stage_done("search", session.search_key())
        assert not session.run.stage_done("export", session.export_key())
