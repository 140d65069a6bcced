"""Reads plan files, those of older schemas, too."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

from compress.errors import Problem, UserError
from compress.json_file import CHECKSUM, checksum_of, read_object, validated
from compress.plan.build import count_problems
from compress.plan.facts import ModelShape
from compress.plan.schema import SCHEMA, Plan


def _model_problems(plan: Plan, shape: ModelShape, where: str, any_weights: bool) -> list[Problem]:
    """Every field in which the plan's model is not the model at hand."""
    recorded = plan.model.model_dump()
    problems = [
        Problem("the plan is for another model", f"{where}: model.{key}", str(getattr(shape, key)), str(recorded[key]))
        for key in shape.differing(recorded)
        if key != "fingerprint" or not any_weights
    ]
    if problems:
        problems[-1].fix = "search again with this model, or name the model that the plan was made for"
    return problems


def _in_present_form(raw: dict[str, Any]) -> dict[str, Any]:
    """A plan file's content as the present schema has it. Schema 1 knew neither the form of the checkpoint nor the
    size of the numbers that its bytes are of; all else is as it was."""
    return {**raw, "schema": SCHEMA} if raw.get("schema") == 1 else raw


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
    plan = validated(Plan, _in_present_form(raw), "the plan", str(path))
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
