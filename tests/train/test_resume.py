"""An interrupted training goes on to the very weights of one that was not; several processes train as one."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress.partial import read_partial
from compress.train.recovery import recover
from compress.train.settings import RecoverSettings
from compress.train.state import POINTER, Partial
from compress.train.stop import noted_signals
from tests import processes
from tests.processes import Process
from tests.train.common import pruned_model, settings, text, trained

Alone = Callable[[str], tuple[RecoverSettings, Path]]


def start(folder: Path, options: RecoverSettings, *more: str) -> Process:
    """A training as a process."""
    words = folder, options.model_dump_json(), *more
    return processes.start("module", "tests.train.common", *words, parent=processes.toolkit)


def start_two(folder: Path, options: RecoverSettings, *more: str, script: str = "common") -> list[tuple[int, str]]:
    """Exit status and messages of two processes that train together."""
    two = processes.launch(f"tests.train.{script}", folder, options.model_dump_json(), *more, count=2)
    return [(process.returncode, process.stderr) for process in two]


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "loss.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("train", ["lora", "full"])
def test_a_terminated_training_goes_on_to_the_same_weights(tmp_path: Path, train: str) -> None:
    options: dict[str, Any] = {"train": train, "dropout": 0.2, "steps": 12, "save_every": 1000, "rate": 0.001}
    going = tmp_path / "going"
    process = start(tmp_path / "cut", settings(**options), "3", str(going))
    for _ in range(3):
        assert process.stdout.readline()
    os.kill(process.pid, signal.SIGTERM)
    going.touch()
    ended = process.done(timeout=120)
    assert ended.returncode == 1 and "stopped after step 4 of 12, which is saved" in ended.stderr, ended.stderr
    pointer = json.loads((tmp_path / "cut" / POINTER).read_text())
    assert pointer["step"] == 4 and not (tmp_path / "cut" / "recover.json").exists()

    steps: list[int] = []

    def note(done: int, *_: Any) -> None:
        steps.append(done)

    resumed = recover(
        pruned_model(),
        settings(**options),
        text(),
        tmp_path / "cut",
        seed=3,
        progress=note,
    )
    assert steps[0] == 5
    whole = trained(tmp_path / "whole", **options)[1]
    assert resumed.sha256 == whole.sha256
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert not list((tmp_path / "cut").glob("partial*"))


def test_a_state_of_another_training_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained(tmp_path / "fresh")[1]
    monkeypatch.setattr("compress.train.loop.noted_signals", _stop_at_once)
    others: list[dict[str, Any]] = [{"rate": 0.02}, {"length": 20}, {}]
    for number, changes in enumerate(others):
        folder = tmp_path / str(number)
        with pytest.raises(KeyboardInterrupt, match="stopped after step 1 of 6"):
            trained(folder, **changes)
        assert (folder / POINTER).is_file()
        if not changes:
            (folder / "partial-1-0").write_bytes(b"damaged")
    monkeypatch.undo()
    for number in range(3):
        found = trained(tmp_path / str(number))[1]
        assert found.sha256 == expected.sha256 and len(losses(tmp_path / str(number))) == 6


def test_a_wish_to_stop_in_the_last_step_is_heeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained(tmp_path / "fresh", steps=2)[1]
    asked = iter((False, True))
    monkeypatch.setattr("compress.train.loop.noted_signals", lambda: contextlib.nullcontext(lambda: next(asked, False)))
    with pytest.raises(KeyboardInterrupt, match="stopped after step 2 of 2"):
        trained(tmp_path / "cut", steps=2)
    monkeypatch.undo()
    assert trained(tmp_path / "cut", steps=2)[1].sha256 == expected.sha256
    assert losses(tmp_path / "cut") == losses(tmp_path / "fresh")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_came_too_late_is_not_lost(number: signal.Signals) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt), noted_signals() as came:
            signal.raise_signal(number)
            assert came()
    finally:
        signal.signal(number, before)


def _stop_at_once() -> Any:
    return contextlib.nullcontext(lambda: True)


def test_a_state_has_the_form_of_earlier_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and moments by name: a training that an earlier version left goes on. One of another plan begins anew."""
    monkeypatch.setattr("compress.train.loop.noted_signals", _stop_at_once)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, train="full")
    content = read_partial(tmp_path / "partial-1-0", json.loads((tmp_path / POINTER).read_text())["key"])
    names = [name for name, _ in pruned_model().named_parameters()]
    parts = ("weight", "step", "exp_avg", "exp_avg_sq")
    assert content is not None and set(content[1]) == {f"{part}/{name}" for part in parts for name in names}
    monkeypatch.undo()
    lines: list[str] = []
    recover(pruned_model(), settings(), text(), tmp_path, seed=4, progress=lambda done, total, what: lines.append(what))
    assert "the saved state belongs to another training" in lines[0] and len(lines) == 7


def test_a_state_is_replaced_by_the_next_one(tmp_path: Path) -> None:
    partial = Partial(tmp_path, "key")
    assert partial.read() is None
    partial.write(5, {"weight/a": torch.ones(3)})
    partial.write(10, {"weight/a": torch.zeros(3)})
    found = partial.read()
    assert found is not None and found[0] == 10 and not found[1]["weight/a"].any()
    assert len(list(tmp_path.glob("partial-*"))) == 1
    assert Partial(tmp_path, "other").read() is None


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """Settings of a training, and the folder of what one process makes of them, by what is trained."""
    root = tmp_path_factory.mktemp("alone")

    @functools.cache
    def of(train: str) -> tuple[RecoverSettings, Path]:
        options = settings(train=train, loss="both", rate=0.002)
        one = start(root / train, options).done(timeout=240)
        assert one.returncode == 0, one.stderr
        return options, root / train

    return of


@pytest.mark.parametrize("train", ["lora", "full"])
def test_two_processes_train_as_one(tmp_path: Path, train: str, alone: Alone) -> None:
    """Sums are in another order, and Adam divides by small numbers: 1e-3 of the loss after six steps."""
    options, one = alone(train)
    for status, told in start_two(tmp_path / "two", options):
        assert status == 0, told
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-3)
    records = [json.loads((folder / "recover.json").read_text()) for folder in (one, tmp_path / "two")]
    assert [record["processes"] for record in records] == [1, 2]
    assert records[0]["batches"] == records[1]["batches"]


@pytest.mark.parametrize("train", ["lora", "full"])
def test_spread_weights_train_as_whole_ones_and_go_on_after_a_stop(tmp_path: Path, train: str, alone: Alone) -> None:
    options, one = alone(train)
    spread = options.model_copy(update={"shard": True, "save_every": 1000})
    for status, told in start_two(tmp_path / "whole", spread, script="spread"):
        assert status == 0, told
    assert losses(tmp_path / "whole") == pytest.approx(losses(one), rel=1e-3)
    first, second = (load_file(folder / "model.safetensors") for folder in (one, tmp_path / "whole"))
    assert first.keys() == second.keys()
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-2, atol=2e-3)
    for status, told in start_two(tmp_path / "parts", spread, "4", script="spread"):
        assert status == 1 and "stopped after step 4 of 6" in told, told
    assert json.loads((tmp_path / "parts" / POINTER).read_text())["step"] == 4
    for status, told in start_two(tmp_path / "parts", spread, script="spread"):
        assert status == 0, told
    records = [json.loads((tmp_path / name / "recover.json").read_text()) for name in ("whole", "parts")]
    assert records[0]["sha256"] == records[1]["sha256"]
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
