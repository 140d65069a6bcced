"""Linear heads are trained layer by layer: every objective brings them nearer to the dense model's attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.models.planned import planned_model
from compress.models.prepared import attach, read_prepared
from compress.models.shape import shape_of
from compress.plan import uniform_plan
from compress.plan.build import plan_of_layers
from compress.targets.linear import LinearGroup
from compress.train.objectives.parts import Parts
from compress.train.prepare import prepare
from compress.train.settings import PrepareSettings
from compress.train.window_dropout import two_branched, windows_only
from tests.tiny import random_ids
from tests.train.common import model_of, trained

HEDGEHOG: dict[str, Any] = {"target": "linear", "alpha": 1}
LENGTH = 192


@pytest.fixture(scope="module")
def dense() -> Any:
    return model_of(initializer_range=0.15)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prepared")


def prepared(dense: Any, folder: Path, **changes: Any) -> Any:
    given = {"targets": [HEDGEHOG], "length": LENGTH, "batch_size": 1, "rate": 0.04, "warmup": 0.0, "steps": 6}
    settings = PrepareSettings.model_validate(given | changes)
    ids = random_ids(4, LENGTH).flatten().tolist()
    return next(iter(prepare(dense, shape_of(dense), settings, ids, folder).values()))


@pytest.mark.parametrize(
    ("objectives", "changes"),
    [
        ([], {}),
        ([], {"alone": True, "alpha": 1}),
        ([{"name": "parts"}], {}),
        ([{"name": "parts", "form": "log"}], {}),
        ([{"name": "weights", "queries": 32}], {}),
        ([{"name": "weights"}], {"decay": "fixed", "slope": 0.01}),
        ([{"name": "transfer", "part": "state"}], {}),
        ([], {"rule": "delta", "decay": "token"}),
    ],
    ids=str,
)
def test_every_objective_brings_linear_heads_nearer(
    dense: Any, folder: Path, objectives: list[dict[str, Any]], changes: dict[str, Any]
) -> None:
    targets = [HEDGEHOG | changes]
    record = prepared(dense, folder, objectives=objectives, targets=targets)
    start = prepared(dense, folder, targets=targets, steps=1, rate=1e-9)  # the same for all objectives
    assert record.last_loss < record.first_loss
    first, last = torch.tensor(start.errors), torch.tensor(record.errors)
    assert float(last.mean()) < float(first.mean()), (first, last)


def test_what_parts_are_held_to_is_the_layers_own_attention(
    dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, torch.Tensor]] = []
    values: list[torch.Tensor] = []

    def noted(self: Parts, student: Any, teacher: Any, inputs: Any) -> torch.Tensor:
        if student["layer"] == 1:
            seen.append((teacher, values[-1].unflatten(-1, (shape.kv_heads, -1)).transpose(1, 2).double()))
        return loss(self, student, teacher, inputs)

    loss, shape = Parts.loss, shape_of(dense)
    monkeypatch.setattr(Parts, "loss", noted)
    hook = dense.model.layers[1].self_attn.v_proj.register_forward_hook(lambda _, __, out: values.append(out.detach()))
    prepared(dense, tmp_path, objectives=[{"name": "parts"}], steps=1)
    hook.remove()
    assert seen
    for teacher, value in seen:
        key, value = (x.double().repeat_interleave(shape.group_size, 1) for x in (teacher["key"], value))
        scores = teacher["query"].double() @ key.mT * teacher["scaling"]
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        torch.testing.assert_close(teacher["lse"].double(), scores.logsumexp(-1), rtol=1e-4, atol=1e-4)
        outputs = (scores.softmax(-1) @ value).transpose(1, 2)
        torch.testing.assert_close(teacher["outputs"].double(), outputs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(teacher["size"].double(), value.square().mean((2, 3)), rtol=1e-4, atol=1e-6)


def test_linear_heads_are_recovered_jointly_beside_their_windows(dense: Any, folder: Path, tmp_path: Path) -> None:
    prepared(dense, folder)
    attach(dense, read_prepared(folder))
    plan = uniform_plan(shape_of(dense), LinearGroup.model_validate(HEDGEHOG))
    model = planned_model(dense, plan)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    changes = {"loss": "distill", "train": "full", "length": LENGTH, "batch_size": 2, "teacher": dense, "steps": 4}
    _, record = trained(tmp_path, model, **changes, rate=1e-3, mixer_rate=1e-2, window_dropout=[0.5, 0])
    assert record.last_loss < record.first_loss
    moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert {name.rpartition("mixers.")[2].partition(".")[2] for name in moved if ".mixers." in name} == {
        "map.query",
        "map.key",
        "gain",
        "gain_query",
    }
    assert {mixer.branches for mixer in two_branched(model)} == {"both"}
    alone = windows_only(planned_model(dense, plan))
    _, other = trained(tmp_path / "windows", alone, **changes, rate=1e-3)
    assert other.batches == record.batches and {mixer.branches for mixer in two_branched(alone)} == {"window"}
    states = {name for name in before if ".mixers." in name}
    assert all(torch.equal(alone.state_dict()[name], before[name]) for name in states)


def test_prepared_heads_that_lose_query_heads_keep_what_the_others_learned(dense: Any, folder: Path) -> None:
    prepared(dense, folder)
    attach(dense, read_prepared(folder))
    target = LinearGroup.model_validate(HEDGEHOG)
    layers = list(uniform_plan(shape_of(dense), target).layers)
    layers = [layers[0].model_copy(update={"queries": (1, 2)}), *layers[1:]]
    plan = plan_of_layers(shape_of(dense), layers)
    (option,) = read_prepared(folder)
    mixer = planned_model(dense, plan).model.layers[0].self_attn.mixers
    (mixer,) = mixer.values()
    assert torch.equal(mixer.gain_query[:, 0], option.tensors["0.gain_query"][[0, 1], [1, 0]])
    assert torch.equal(mixer.map.key, option.tensors["0.map.key"])


def test_a_model_in_bfloat16_prepares_in_its_own_precision(dense: Any, folder: Path) -> None:
    low = prepared(dense, folder, precision="bfloat16", steps=3)
    exact = prepared(dense, folder, steps=3)
    assert low.last_loss != exact.last_loss and low.last_loss == pytest.approx(exact.last_loss, rel=0.05)
