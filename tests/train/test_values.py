"""Every value of every key of `recover:`, on models that carry a plan: it trains, and as it does in float32."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from compress.models.planned import planned_model
from compress.train.settings import RecoverSettings
from tests.tiny import mixed_plan, random_ids, shape_of
from tests.train.common import model_of, settings, trained

# What has tests of its own: the text and the controls are the stage's, spread weights need several processes,
# test_objectives.py has the losses by name, test_joint.py what targets with parameters of their own ask for, and
# test_routing.py what routers do, test_keeping.py what heads that keep tokens do, and test_compiled.py what compiled
# layers do, and test_context.py what processes do that share sequences.
ELSEWHERE = {"text", "control", "window_control", "shard", "objectives", "mixer_rate", "window_dropout"}
ELSEWHERE |= {
    "compile",
    "context",
    "balance",
    "router_z",
    "fade",
    "kept",
    "keep_temperature",
    "keep_noise",
    "keep_hard",
    "keep_documents",
}
CHANGES: list[dict[str, Any]] = [
    {"rank": 2, "alpha": 1.0},
    {"dropout": 0.3},
    {"loss": "distill", "temperature": 2.0},
    {"loss": "both", "distill_weight": 0.9},
    {"length": 40, "batch_size": 3, "micro_batch": 2},
    {"steps": None, "tokens": 100},
    {"warmup": 0.5, "weight_decay": 0.1, "clip": 0.01, "rate": 0.02},
    {"save_every": 1},
]


def planned() -> Any:
    """Windows that hide something of the 16 tokens of a training sequence."""
    dense = model_of()
    plan = mixed_plan(shape_of(dense))
    model = planned_model(dense, plan)
    other = copy.deepcopy(model.config.compress_plan)
    for row in other["layers"]:
        for group in row["groups"]:
            if group["target"] == "window":
                group.update(sink=1, alpha=5, beta=0.0)
    model.set_plan(other)
    return model


def check(model: Any, record: Any) -> None:
    """The losses are finite, and the model generates with its cache what it generates without."""
    assert math.isfinite(record.last_loss) and record.last_loss != record.first_loss
    assert not model.training and {weight.dtype for weight in model.parameters()} == {torch.float32}
    made = [
        model.generate(random_ids(1, 30), max_new_tokens=3, do_sample=False, use_cache=use) for use in (True, False)
    ]
    assert torch.equal(*made)


@pytest.mark.parametrize(
    ("train", "loss", "checkpointing"),
    [
        ("lora", "text", None),
        ("lora", "distill", True),
        ("lora", "both", False),
        ("full", "text", True),
        ("full", "distill", False),
        ("full", "both", None),
    ],
)
def test_training_in_each_precision(tmp_path: Path, train: str, loss: str, checkpointing: bool | None) -> None:
    found = {}
    for precision in ("float32", "bfloat16"):
        model, found[precision] = trained(
            tmp_path / precision,
            planned(),
            train=train,
            loss=loss,
            precision=precision,
            checkpointing=checkpointing,
            teacher=None if loss == "text" else model_of(),
            rate=1e-3,
            steps=3,
        )
        check(model, found[precision])
    exact, low = found["float32"], found["bfloat16"]
    assert exact.last_loss < exact.first_loss and low.first_loss != exact.first_loss
    assert (low.first_loss, low.last_loss) == pytest.approx((exact.first_loss, exact.last_loss), rel=0.1)


@pytest.mark.parametrize(("train", "loss"), [("full", "distill"), ("lora", "text")])
def test_a_model_that_is_kept_in_bfloat16_trains_as_it_runs(
    tmp_path: Path, train: str, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[torch.dtype] = set()
    norm = type(model_of().model.norm)
    plain = norm.forward

    def noted(self: Any, states: torch.Tensor) -> Any:
        seen.add(states.dtype)
        return plain(self, states)

    monkeypatch.setattr(norm, "forward", noted)
    asked: dict[str, Any] = {"train": train, "loss": loss, "rate": 1e-3, "steps": 3}
    given = model_of().bfloat16() if loss == "distill" else None
    exact = trained(tmp_path / "exact", planned(), precision="float32", teacher=model_of(), **asked)[1]
    seen.clear()
    found = []
    for again in (
        False,
        True,
    ):  # with layers computed again, in the backward pass, the weights are still the rounded ones
        model, record = trained(
            tmp_path / str(again),
            planned().bfloat16(),
            precision="bfloat16",
            checkpointing=again,
            teacher=given,
            **asked,
        )
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        found.append((record.first_loss, record.last_loss, record.sha256))
    assert seen == {torch.bfloat16} and found[0] == found[1]
    assert found[0][:2] == pytest.approx((exact.first_loss, exact.last_loss), rel=0.1)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_precision_of_a_cpu_is_float32(tmp_path: Path, train: str) -> None:
    records = [
        trained(tmp_path / word, planned(), train=train, precision=word, steps=1)[1] for word in ("auto", "float32")
    ]
    assert records[0].sha256 == records[1].sha256


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_training_with_each_other_key(tmp_path: Path, change: dict[str, Any]) -> None:
    teacher = model_of() if "loss" in change else None
    model, record = trained(tmp_path, planned(), teacher=teacher, **change)
    check(model, record)
    assert record.steps == settings(**change).step_count


def test_no_key_is_left_out() -> None:
    tried = {"train", "loss", "precision", "checkpointing", *(key for change in CHANGES for key in change)}
    assert tried | ELSEWHERE == set(RecoverSettings.model_fields)


def test_a_precision_without_a_place_is_refused() -> None:
    with pytest.raises(ValidationError, match="'auto', 'float32' or 'bfloat16'"):
        settings(precision="float16")
