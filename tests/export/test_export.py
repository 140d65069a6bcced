"""Export: whole or not at all, and never of a plan that does not belong to the model."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

import compress.export.export as export_module
from compress.errors import UserError
from compress.export.export import export_checkpoint, update_card
from compress.export.staging import staged
from compress.export.verify import verify_checkpoint
from compress.models.load import load_model
from compress.models.planned import planned_model
from compress.models.shape import shape_of
from compress.plan import uniform_plan
from compress.targets.window import WindowGroup
from tests.tiny import mixed_plan, tiny_loaded


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def old(tmp_path):
    """A folder that stands for an older checkpoint."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_an_output_that_holds_something_is_refused(old):
    loaded = tiny_loaded("llama-gqa")
    with pytest.raises(UserError, match="already holds something") as caught:
        export_checkpoint(loaded, mixed_plan(shape_of(loaded.model)), old)
    assert "config.json" in str(caught.value) and "--overwrite" in str(caught.value)
    assert contents(old) == {"config.json": b"{}"}


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("step", ["copy_runtime", "verify_checkpoint", "_write_card"])
def test_whatever_breaks_the_old_checkpoint_survives(old, monkeypatch, step, failure):
    loaded = tiny_loaded("llama-gqa")

    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(export_module, step, fail)
    with pytest.raises((KeyboardInterrupt, UserError)) as caught:
        export_checkpoint(loaded, mixed_plan(shape_of(loaded.model)), old, overwrite=True)
    if isinstance(failure, OSError):
        assert "the disk became full while writing; nothing was changed" in str(caught.value)
    assert contents(old) == {"config.json": b"{}"}
    assert [path.name for path in old.parent.iterdir()] == ["checkpoint"]


def test_a_disk_without_room_is_noticed_first(tmp_path):
    with pytest.raises(UserError, match="not enough room on the disk"), staged(tmp_path / "new", need_bytes=1 << 60):
        pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == []


def test_a_crash_between_the_two_renames_is_repaired(tmp_path, old):
    old.rename(tmp_path / ".checkpoint.old")
    with pytest.raises(UserError, match="already holds something"), staged(tmp_path / "checkpoint"):
        pytest.fail("the block must not run")
    assert contents(tmp_path / "checkpoint") == {"config.json": b"{}"}


def test_a_plan_of_another_model_is_refused(tmp_path):
    loaded, other = tiny_loaded("llama-gqa"), tiny_loaded("llama-mha")
    with pytest.raises(UserError, match="the plan is for another model"):
        export_checkpoint(loaded, mixed_plan(shape_of(other.model)), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_verification_notices_other_weights_and_other_plans(tmp_path):
    loaded = tiny_loaded("llama-gqa")
    shape = shape_of(loaded.model)
    plan = mixed_plan(shape)
    export_checkpoint(loaded, plan, tmp_path / "new")
    planned = planned_model(loaded.model, plan)
    with torch.no_grad():
        planned.model.layers[1].mlp.up_proj.weight.add_(0.05)
    with pytest.raises(UserError, match="different logits than the model in memory"):
        verify_checkpoint(tmp_path / "new", planned, loaded.tokenizer, plan)
    with torch.no_grad():
        planned.model.layers[1].mlp.up_proj.weight.sub_(0.05)
    smaller = uniform_plan(shape, WindowGroup(sink=0, alpha=64, beta=0))
    with pytest.raises(UserError, match="cache does not hold the bytes that the plan predicts"):
        verify_checkpoint(tmp_path / "new", planned_model(loaded.model, plan), loaded.tokenizer, smaller)


def test_rules_by_length_are_exported_and_say_what_they_refuse(tmp_path):
    loaded = tiny_loaded("llama-gqa")
    shape = shape_of(loaded.model)
    plan = uniform_plan(shape, WindowGroup(sink=4, alpha=-20, beta=0.5, rule="length"))
    checks = export_checkpoint(loaded, plan, tmp_path / "new").checks  # text and bytes are those of a fresh process
    fixed = uniform_plan(shape, WindowGroup(sink=4, alpha=checks.probe_tokens // 2 - 20, beta=0))
    assert checks.cache_bytes == checks.predicted_bytes == fixed.cost(checks.probe_tokens, 4).held_bytes
    card = (tmp_path / "new" / "README.md").read_text()
    assert "0 of 6 head groups have full attention, 6 " in card and "floor(alpha + beta * N)" in card
    assert "Refused, with an error that says so: chunked prefill, a further turn on the same cache" in card
    assert "batches of inputs\nof different lengths" in card and "cannot\nbe shared" in card
    export_checkpoint(loaded, mixed_plan(shape), tmp_path / "other")
    other = (tmp_path / "other" / "README.md").read_text()
    assert "by length" not in other and "beta * N" not in other
    assert "Batches with left or right padding, chunked prefill, several turns" in other


def test_a_checkpoint_that_does_not_load_is_an_error(tmp_path):
    loaded = tiny_loaded("llama-gqa")
    plan = mixed_plan(shape_of(loaded.model))
    export_checkpoint(loaded, plan, tmp_path / "new")
    (tmp_path / "new" / "reference.py").write_text("import compress\n")
    with pytest.raises(UserError, match="does not load in a fresh process") as caught:
        verify_checkpoint(tmp_path / "new", planned_model(loaded.model, plan), loaded.tokenizer, plan)
    assert "compress" in str(caught.value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_shards_card_and_permissions(tmp_path, dtype):
    loaded = tiny_loaded("qwen3")
    folder = tmp_path / "new"
    report = export_checkpoint(
        loaded,
        mixed_plan(shape_of(loaded.model)),
        folder,
        dtype=dtype,
        max_shard_size="20KB",
        recipe_text="a: 1\n",
    )
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert loaded.model.dtype == torch.float32  # the dense model keeps its own
    card = (folder / "README.md").read_text()
    assert f"{report.checks.cache_bytes:,}" in card and dtype in card and "Not measured yet" in card
    assert "trust_remote_code=True" in card and "a: 1" in card
    update_card(folder, loaded, "| model | perplexity |\n| --- | --- |\n| dense | 12.5 |")
    assert "| dense | 12.5 |" in (folder / "README.md").read_text()
    assert all(path.stat().st_mode & 0o444 == 0o444 or path.stat().st_mode & 0o400 for path in folder.iterdir())


@pytest.mark.fresh_process
def test_an_exported_checkpoint_is_a_model_name_again(tmp_path):
    loaded = tiny_loaded("mistral")
    export_checkpoint(loaded, mixed_plan(shape_of(loaded.model)), tmp_path / "new")
    with pytest.raises(UserError):
        load_model(str(tmp_path / "new"))
    again = load_model(str(tmp_path / "new"), trust_remote_code=True)
    assert shape_of(again.model).fingerprint == shape_of(loaded.model).fingerprint
