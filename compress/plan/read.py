"""Reads plan files, those of older schemas, too."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

from pydantic import Field

from compress.errors import Problem, UserError
from compress.json_file import CHECKSUM, checksum_of, read_object, validated
from compress.plan.build import count_problems
from compress.plan.facts import ModelShape, Tokens
from compress.plan.schema import SCHEMA, Bytes, Form, Plan, Strict

CHECKPOINT_PLAN = "compress_plan.json"  # the plan of a checkpoint, beside its weights


def _model_problems(plan: Plan, shape: ModelShape, where: str, any_weights: bool) -> list[Problem]:
    """Every field in which the plan's model is not the model at hand."""
    recorded = plan.source.model_dump()
    different = shape.differing(recorded)
    if "layers" in different:  # what there is one of for each layer differs then as well
        different = [key for key in different if key != "native_windows"]
    problems = [
        Problem("the plan is for another model", f"{where}: model.{key}", str(getattr(shape, key)), str(recorded[key]))
        for key in different
        if key != "fingerprint" or not any_weights
    ]
    if problems:
        problems[-1].fix = "search again with this model, or name the model that the plan was made for"
    return problems


class _PredictedBefore(Strict):
    """What was predicted before it was listed by kind of budget."""

    form: Form | None = None
    itemsize: int | None = Field(default=None, ge=1)
    kv_bytes: dict[Tokens, Bytes] = Field(default_factory=dict)
    dense_kv_bytes: dict[Tokens, Bytes] = Field(default_factory=dict)
    loss: float | None = None
    parameters: int | None = Field(default=None, ge=0)
    dense_parameters: int | None = Field(default=None, ge=1)

    def amounts(self) -> list[dict[str, Any]]:
        """The predicted amounts by kind of budget."""
        held = {"kind": "kv", "unit": "bytes", "of": "the dense KV bytes"}
        rows: list[dict[str, Any]] = [
            {**held, "length": length, "plan": size, "dense": self.dense_kv_bytes[length]}
            for length, size in self.kv_bytes.items()
            if length in self.dense_kv_bytes
        ]
        if self.parameters is not None and self.dense_parameters is not None:
            words = {"kind": "parameters", "unit": "parameters", "of": "the decoder layers' parameters"}
            rows.append({**words, "length": None, "plan": self.parameters, "dense": self.dense_parameters})
        return rows


def _in_present_form(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """A plan file's content as the present schema has it.

    Schema 1 knew neither the form of the checkpoint nor the size of the numbers that its bytes are of, and files had
    KV bytes and parameters by name where they now list costs by kind of budget.

    Raises:
        UserError: what was predicted is damaged.
    """
    raw = {**raw, "schema": SCHEMA} if raw.get("schema") == 1 else raw
    predicted = raw.get("predicted")
    if not isinstance(predicted, dict) or not predicted.keys() & {"kv_bytes", "parameters"}:
        return raw
    before = validated(_PredictedBefore, predicted, "the plan", f"{where}: predicted")
    kept = {"form": before.form, "itemsize": before.itemsize, "loss": before.loss}
    return {**raw, "predicted": {**kept, "amounts": before.amounts()}}


def read_plan(path: Path | str, shape: ModelShape | None = None, *, any_weights: bool = False) -> Plan:
    """Read and check a plan file; every problem of the file is reported at once.

    A file without the key `checksum` is taken as written by hand; any checksum but its own, null too, is damage.

    Args:
        shape: the model it is going to be used with; None checks the file alone.
        any_weights: whether a model of the same sizes with other weights will do.

    Raises:
        UserError: missing or damaged file, unknown keys, wrong counts, impossible parameters, another model.
    """
    path = Path(path)
    raw = read_object(path, "the plan", fix="run `compress search`")
    checked = CHECKSUM in raw
    checksum = raw.pop(CHECKSUM, None)
    plan = validated(Plan, _in_present_form(raw, str(path)), "the plan", str(path))
    problems = count_problems(plan, str(path))
    if checked and checksum != checksum_of(raw):
        problems.append(
            Problem(
                "the plan is damaged: its content does not match its checksum",
                str(path),
                expected=reprlib.repr(checksum),
                found=checksum_of(raw),
                fix="search again; if you edited the plan by hand, remove its `checksum` line",
            )
        )
    if shape is not None:
        problems += _model_problems(plan, shape, str(path), any_weights)
    if problems:
        raise UserError(problems)
    return plan
