"""Profiles, plans, checkpoints and evaluations are what they were: `scripts/golden.py` rewrites them, with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.golden.compare import differences
from tests.golden.make import PARTS, machine, make_part

GOLDEN = Path(__file__).parent


@pytest.mark.parametrize("name", PARTS)
def test_the_golden_artifacts_are_what_they_were(name: str, tmp_path: Path) -> None:
    golden = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    found = json.loads(json.dumps(make_part(name, tmp_path)))
    exact = golden["machine"] == machine()
    lines = list(differences(golden["values"], found, exact=exact))
    assert not lines, "\n".join([f"{len(lines)} differences, the first:", *lines[:20]])


EXPECTED: dict[str, Any] = {"plan": [1, 2], "logits": {"sum": 1.0, "bits": "ab"}}
CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a number": lambda values: values["plan"].__setitem__(0, 3),
    "a float": lambda values: values["logits"].__setitem__("sum", 1.01),
    "a key": lambda values: values.pop("plan"),
    "a length": lambda values: values["plan"].append(1),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("exact", [True, False])
def test_every_change_is_a_difference(change: str, exact: bool) -> None:
    found = json.loads(json.dumps(EXPECTED))
    CHANGES[change](found)
    assert len(list(differences(EXPECTED, found, exact=exact))) == 1


def test_only_the_same_machine_is_held_to_the_last_bit() -> None:
    expected = EXPECTED | {"logit_difference": 5.9e-5}
    found = {"plan": [1, 2], "logits": {"sum": 1.0 + 1e-9, "bits": "cd"}, "logit_difference": 5.2e-5}
    assert not list(differences(expected, found, exact=False))
    assert len(list(differences(expected, found, exact=True))) == 3
