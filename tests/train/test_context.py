"""Sequences that two processes share: gradients, losses and weights are those of one process."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from compress.errors import UserError
from compress.models.context.dense import SharedSample
from compress.models.context.exchange import Part
from compress.models.context.layout import Layout
from compress.models.context.processes import check_processes, check_shareable
from compress.models.planned import planned_model
from compress.plan import uniform_plan
from compress.profile.heads.attention import Attention
from compress.profile.heads.query_constancy import QueryConstancy
from compress.profile.heads.removal import RemovalEffect
from compress.profile.run import check_context, run_profile
from compress.profile.store import read_profile
from compress.stages.processes import check_launch
from compress.targets.retain import RetainGroup
from compress.train.objectives.text import Text
from compress.train.recovery import recover
from compress.train.windows import WindowBatches, Windows
from tests import processes
from tests.profile.common import document
from tests.tiny import VOCABULARY, shape_of, tiny_loaded
from tests.train import context
from tests.train.common import model_of, settings, text, trained


def test_two_processes_share_sequences(tmp_path: Path) -> None:
    for process in processes.launch("tests.train.context", tmp_path, count=2):
        assert process.returncode == 0, process.stderr
    found, expected = torch.load(tmp_path / "gradients.pt", weights_only=True), context.gradients(None)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0 or "alone.gain" in name, name
        # A parameter that is one number has one sum over all tokens, of which most cancels.
        bound = (1e-5 if gradient.numel() > 1 else 1e-4) * float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=bound)
    for name in context.TRAININGS:
        context.training(tmp_path, name, 1)
        one, two = (tmp_path / f"{name}-{count}" for count in (1, 2))
        losses = [[json.loads(line)["loss"] for line in (path / "loss.jsonl").open()] for path in (one, two)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 2
        weights, others = (load_file(path / "model.safetensors") for path in (one, two))
        assert weights.keys() == others.keys()
        for key, weight in weights.items():
            torch.testing.assert_close(others[key], weight, rtol=1e-4, atol=1e-4)
        records = [json.loads((path / "recover.json").read_text()) for path in (one, two)]
        assert [record["processes"] for record in records] == [1, 2]
        assert records[0]["tokens"] == records[1]["tokens"]
    context.profile(tmp_path, 1)
    alone, shared = (read_profile(tmp_path / f"profile-{count}") for count in (1, 2))
    assert alone.tensors.keys() == shared.tensors.keys() and alone.header.key == shared.header.key
    for statistic, values in alone.tensors.items():
        bound = 1e-5 * float(values.abs().max())
        torch.testing.assert_close(shared.tensors[statistic], values, rtol=1e-4, atol=bound, msg=str(statistic))
    assert alone.header.loss == pytest.approx(shared.header.loss, rel=1e-6)


def test_statistics_that_need_whole_documents_are_refused(tmp_path: Path) -> None:
    loaded = tiny_loaded("llama-gqa")
    samples = {64: [document(64)]}
    with pytest.raises(UserError, match="`query_constancy`, `removal`") as error:
        run_profile(loaded, samples, [QueryConstancy(), Attention(), RemovalEffect()], tmp_path, seed=0, context=2)
    assert "profile.context" in str(error.value)
    with pytest.raises(UserError, match="2 processes, or a multiple of 2"):
        run_profile(loaded, samples, [Attention()], tmp_path, seed=0, context=2)
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    stretched: Any = SimpleNamespace(config=SimpleNamespace(rope_parameters=rope, max_position_embeddings=600))
    check_context(stretched, [Attention()], 2, 512)
    with pytest.raises(UserError, match="samples of at most 512 tokens"):
        check_context(stretched, [Attention()], 2, 513)
    with pytest.raises(UserError, match="sequences of at most 600 tokens"):
        check_shareable(stretched, 768, "recover.context")
    with pytest.raises(UserError, match="samples that are no text"):
        SharedSample(SimpleNamespace(unit="patches", length=4), Part(Layout(256, 2), 0))


def test_a_sequence_is_dealt_out_from_both_ends() -> None:
    layout = Layout(768, 3)
    assert [layout.numbers(rank) for rank in range(3)] == [(0, 5), (1, 4), (2, 3)]
    assert sorted(torch.cat([layout.positions(rank) for rank in range(3)]).tolist()) == list(range(768))
    batches = WindowBatches(Windows(list(range(2048)), 256, 0), 4, 1, context=2)
    parts = batches.passes(0, 4)  # two sequences for each two processes, one by one
    assert [len(process) for process in parts] == [2] * 4 and batches.per_process(4) == 2
    whole = batches.windows.batch(0, 4)
    for process, own in enumerate(parts):
        here = Layout(256, 2).positions(process % 2)
        for number, part in enumerate(own):
            row = whole[process // 2 * 2 + number]
            assert torch.equal(part["input_ids"][0], row[here])
            following = part["next_ids"][0]
            assert torch.equal(following[here < 255], row[here[here < 255] + 1])
            assert bool((following[here == 255] == -1).all())


def test_what_does_not_fit_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="expected `length` to be a multiple of 256 where 2 processes share"):
        settings(length=128, context=2)
    with pytest.raises(ValidationError, match="`side` is a loss over all tokens of a sequence at once"):
        settings(length=256, context=2, objectives=[{"name": "text"}, {"name": "side", "loss_name": "a"}])
    with pytest.raises(UserError, match="2 processes, or a multiple of 2") as error:
        trained(tmp_path, length=256, context=2, batch_size=1, steps=1)
    assert "recover.context" in str(error.value) and not list(tmp_path.iterdir())
    check_processes(2, 4, "recover.context")
    recipe = SimpleNamespace(recover=settings(length=256, context=2), profile=SimpleNamespace(context=1))
    with pytest.raises(UserError, match="torchrun --nproc-per-node 2"):
        check_launch(recipe, tmp_path, "profile", "recover")
    (tmp_path / "recover").mkdir()
    (tmp_path / "recover" / "recover.json").touch()  # which has been done, in whatever processes
    check_launch(recipe, tmp_path, "profile", "recover")


def test_targets_that_need_all_tokens_are_refused(tmp_path: Path) -> None:
    dense = model_of(max_position_embeddings=1024)
    group = RetainGroup(sink=4, alpha=64, threshold=0.0, share=0.5, scorer="key_norm")
    model = planned_model(dense, uniform_plan(shape_of(dense), group), untrained=True)
    with pytest.raises(UserError, match="'retain', whose sequences cannot be spread over processes: which tokens it"):
        recover(model, settings(length=256, context=2, batch_size=1, steps=1), text(), tmp_path)


def test_long_sequences_have_their_logits_taken_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"batch_size": 2, "steps": 2, "loss": "both", "length": 64}
    whole = trained(tmp_path / "whole", teacher=model_of(), **changes)[1]
    monkeypatch.setattr("compress.train.student.LOGITS_BYTES", 4 * VOCABULARY * 30)
    taken: list[int] = []

    def noted(self: Text, student: Any, teacher: Any, inputs: Any) -> torch.Tensor:
        taken.append(student["logits"].shape[1])
        return loss(self, student, teacher, inputs)

    loss = Text.loss
    monkeypatch.setattr(Text, "loss", noted)
    parts = trained(tmp_path / "parts", teacher=model_of(), **changes)[1]
    assert taken == [22, 21, 21] * 4  # of two sequences in two steps
    assert parts.last_loss == pytest.approx(whole.last_loss, rel=1e-5)
