"""What every example of a target has to end with: a checkpoint that a process without the package loads."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests import processes
from tests.tiny import random_ids

CHILD = Path(__file__).parents[1] / "reload_child.py"


def reloads(checkpoint: Path, planned: Any, scratch: Path) -> None:
    """Load a checkpoint where `compress` cannot be imported, save and load it again; both compute what `planned` does.

    Args:
        scratch: an empty folder.
    """
    done = processes.run_fresh(CHILD, [str(scratch), str(checkpoint)], dict(os.environ), scratch)
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.inference_mode():
        expected = planned(random_ids(1, 301)).logits
    found = load_file(scratch / f"{checkpoint.name}.safetensors")
    torch.testing.assert_close(found["logits"], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found["logits"], found["saved_again"])
    assert not json.loads((scratch / f"{checkpoint.name}.json").read_text())["compress_importable"]
