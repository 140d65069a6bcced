"""Values that are not finite: the export says that it is an overflow, or whose fault it is, and where it begins."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

import compress.export.verify as verify_module
from compress.errors import UserError
from compress.export.export import export_checkpoint
from compress.export.finite import first_not_finite
from compress.export.verify import verify_checkpoint
from compress.models.load import LoadedModel
from compress.models.planned import planned_model
from compress.models.shape import shape_of
from compress.plan import Plan
from tests.tiny import mixed_plan, random_ids, tiny_loaded


@pytest.fixture
def loaded() -> LoadedModel:
    return tiny_loaded("llama-gqa")


def plan_for(loaded: LoadedModel) -> Plan:
    return mixed_plan(shape_of(loaded.model))


def layer(loaded: LoadedModel, number: int) -> Any:
    return loaded.model.model.layers[number]


def refusal(loaded: LoadedModel, folder: Path, **kwargs: Any) -> Any:
    """The one problem of an export that fails; nothing is left of it."""
    with pytest.raises(UserError) as caught:
        export_checkpoint(loaded, plan_for(loaded), folder / "new", **kwargs)
    assert list(folder.iterdir()) == []
    return caught.value.problems[0]


def test_a_weight_that_float16_cannot_hold(loaded: LoadedModel, tmp_path: Path) -> None:
    with torch.no_grad():
        layer(loaded, 1).mlp.up_proj.weight[3, 4] = -1e5
    problem = refusal(loaded, tmp_path, dtype="float16")
    assert problem.what == "a weight is too large for float16 and overflows"
    assert problem.where == "model.layers.1.mlp.up_proj.weight"
    assert problem.expected == "at most 65,504 in size" and problem.found == "100,000" and "bfloat16" in problem.fix


def test_values_that_float16_cannot_hold(loaded: LoadedModel, tmp_path: Path) -> None:
    with torch.no_grad():
        layer(loaded, 1).mlp.down_proj.weight.mul_(3e4)
    problem = refusal(loaded, tmp_path, dtype="float16")
    assert problem.what == "the model's values overflow in float16, so its logits are not finite"
    assert problem.where == "model.layers.1.mlp.down_proj (its output)" and problem.found == "infinite values"
    assert "bfloat16" in problem.fix
    assert layer(loaded, 1).mlp.down_proj.weight.dtype == torch.float32


def test_the_same_values_in_bfloat16_are_no_overflow(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        layer(loaded, 1).mlp.down_proj.weight.mul_(3e4)

    def reached(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify_module, "_run_child", reached)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(loaded, plan_for(loaded), tmp_path / "new", dtype="bfloat16")


def test_a_product_between_two_modules_that_overflows(loaded: LoadedModel) -> None:
    with torch.no_grad():
        layer(loaded, 2).mlp.up_proj.weight.mul_(3e3)
        layer(loaded, 2).mlp.gate_proj.weight.mul_(3e3)
    model = planned_model(loaded.model, plan_for(loaded)).to(torch.float16)
    ids = random_ids(1, 40)
    assert first_not_finite(model, ids, torch.ones_like(ids)) == (
        "model.layers.2.mlp.down_proj (its input)",
        "infinite values",
    )
    assert first_not_finite(model.float(), ids, torch.ones_like(ids)) is None


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_weight_that_is_not_finite(loaded: LoadedModel, tmp_path: Path, value: float) -> None:
    with torch.no_grad():
        loaded.model.model.embed_tokens.weight[90, :3] = value  # a token that no probe need have
    problem = refusal(loaded, tmp_path)
    assert problem.what == "a weight of the model is infinite or not a number"
    assert problem.where == "model.embed_tokens.weight" and problem.found == "3 of 4,656 values"


def test_a_dense_model_whose_logits_are_not_finite_already(loaded: LoadedModel, tmp_path: Path) -> None:
    loaded.model.to(torch.float16)
    with torch.no_grad():
        layer(loaded, 0).mlp.down_proj.weight.mul_(3e4)
    problem = refusal(loaded, tmp_path)
    assert problem.what == "the dense model's own logits are not finite, before any plan"
    assert problem.where == "model.layers.0.mlp.down_proj (its output)" and "float16" in problem.expected
    assert "another dtype" in problem.fix


def test_a_file_that_was_damaged_on_its_way(loaded: LoadedModel, tmp_path: Path, monkeypatch: Any) -> None:
    plan = plan_for(loaded)
    planned = planned_model(loaded.model, plan)
    ids = torch.zeros(1, 4, 97)
    wrong = {"logits": ids, "padded_logits": ids, "step_logits": ids * float("nan"), "hidden": ids}
    monkeypatch.setattr(verify_module, "_run_child", lambda *_: (wrong, defaultdict(str)))
    with pytest.raises(UserError, match="the reloaded checkpoint's values are not finite"):
        verify_checkpoint(tmp_path, planned, loaded.tokenizer, plan)
