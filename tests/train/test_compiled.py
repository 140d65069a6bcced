"""Layers that are compiled for a training: the same weights come out, and a compiler that fails stops nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.models.backward import kept_bytes
from compress.models.families import layers_of
from compress.models.planned import planned_model
from compress.models.shape import shape_of
from compress.plan.build import uniform_plan
from compress.targets.linear import LinearGroup
from compress.train import compiled
from compress.train.recovery import recover
from compress.train.student import LOSS_BYTES, Student
from tests.train.common import model_of, settings, text

LINES = list[str]


def distilled(folder: Path, said: LINES, **changes: Any) -> torch.Tensor:
    """Trained weights of hybrid heads that follow the dense model, all in a row; lines of the progress."""
    dense = model_of()
    model = planned_model(
        dense, uniform_plan(shape_of(dense), LinearGroup(map="hedgehog", sink=1, alpha=4)), untrained=True
    )
    # Pages of 64 tokens, four of them, so that states have taken something in: else heads are the dense model's.
    given = {"train": "full", "loss": "distill", "steps": 2, "length": 256, "batch_size": 1, **changes}
    recover(model, settings(**given), text(), folder, teacher=dense, progress=lambda *line: said.append(line[2]))
    for each in (dense, model):
        assert not any("forward" in vars(module) for module in each.modules())
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    torch.manual_seed(0)
    return distilled(tmp_path_factory.mktemp("plain"), [], compile=False)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_train_to_the_same_weights(
    checkpointing: bool, plain: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    said: LINES = []
    weights = distilled(tmp_path, said, compile=True, checkpointing=checkpointing)
    assert any(line.startswith("compiled decoder layers in") for line in said)
    torch.testing.assert_close(weights, plain, rtol=1e-3, atol=1e-4)


def test_a_compiler_that_fails_stops_nothing(
    plain: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        raise OSError("no C compiler here")

    def backward_alone(graph: Any, inputs: Any) -> Any:
        return aot_autograd(fw_compiler=lambda module, _: module, bw_compiler=broken)(graph, inputs)

    from torch._dynamo.backends.common import aot_autograd

    told: LINES = []
    monkeypatch.setattr(compiled.logger, "warning", told.append)
    for backend in (broken, backward_alone):
        monkeypatch.setattr(compiled, "BACKEND", backend)
        weights = distilled(tmp_path / backend.__name__, [], compile=True)
        torch.testing.assert_close(weights, plain, rtol=1e-3, atol=1e-4)
    assert len(told) == 2 and all("no C compiler here" in line for line in told)


def test_long_trainings_alone_pay_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    assert not compiled.pays(model, 10**15)
    monkeypatch.setattr(compiled, "placement_of", lambda _: type("There", (), {"inputs": torch.device("cuda")}))
    size = len(layers_of(model)) * model.config.hidden_size
    assert compiled.pays(model, int(compiled.WORTH) // size + 1) and not compiled.pays(model, 10**6)


def test_kept_bytes_are_those_that_autograd_keeps() -> None:
    weight = torch.nn.Linear(4, 8, bias=False)
    x = torch.randn(10, 4)

    def run() -> None:
        y = weight(x)  # keeps x, and the weight, which is there anyway
        y.sigmoid().exp()  # each keeps what it gives
        y.sigmoid()

    assert kept_bytes(run, weight) == 4 * (10 * 4 + 3 * 10 * 8)


def test_a_pass_is_measured_with_its_losses_and_leaves_nothing_behind() -> None:
    model, device = model_of(num_hidden_layers=1).requires_grad_(True), torch.device("cpu")
    student, ids = Student(model, model_of(), None, whole=False), torch.zeros(2, 12, dtype=torch.long)
    state = torch.random.get_rng_state()
    found = [student.kept_bytes({"input_ids": ids[:, :length]}, device) for length in (6, 12)]
    losses = LOSS_BYTES[False] * 2 * 6 * len(model.get_input_embeddings().weight)
    assert found[1] - found[0] > losses and found[0] > losses
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(weight.grad is None for weight in model.parameters())
