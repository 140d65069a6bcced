"""The curve of a training on disk: what of it counts, and when a state goes on from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.train.curve import Curve
from compress.train.state import POINTER, Partial


def lines_of(count: int) -> list[str]:
    return [json.dumps({"step": number + 1, "loss": 2.0, "seconds": 0.5}) for number in range(count)]


@pytest.mark.parametrize(
    "damage", ["", "{", '{"step": 2}', '{"step": 3, "loss": 2.0, "seconds": 0.5}', "[2]", "NaN", "[" * 9000]
)
def test_steps_count_up_to_a_damaged_line(tmp_path: Path, damage: str) -> None:
    lines = lines_of(4)
    path = tmp_path / "loss.jsonl"
    for line, kept in ((lines[1], 4), (damage, 1), (lines[1].replace("0.5", "Infinity"), 1)):
        path.write_text("\n".join([lines[0], line, *lines[2:]]) + "\n")
        assert [entry["step"] for entry in Curve(path).steps()] == list(range(1, kept + 1))


@pytest.mark.parametrize("damage", [{"step": 2}, {"files": ["partial-1-0", 7]}, {"files": "x"}, {"key": None}])
def test_a_changed_pointer_leads_nowhere(tmp_path: Path, damage: dict[str, Any]) -> None:
    partial = Partial(tmp_path, "k")
    partial.write(1, {"weight/a": torch.ones(3)})
    assert partial.read() is not None
    pointer = json.loads((tmp_path / POINTER).read_text())
    (tmp_path / POINTER).write_text(json.dumps(pointer | damage))
    assert partial.read() is None
