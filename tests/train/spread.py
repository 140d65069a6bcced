"""One process of a training whose weights are spread (FSDP2), on a CPU by gloo: accelerate itself spreads on GPUs only.

Usage: python -m tests.train.spread FOLDER SETTINGS [STEP]; with STEP the main process is asked to stop after it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

import compress.train.loop as loop
import compress.train.recovery as stage
from compress.train.settings import RecoverSettings
from tests.train.common import model_of, pruned_model, text


def spread_accelerator(settings: RecoverSettings, device: torch.device) -> Accelerator:
    """As on GPUs, told that this is one of their launches."""
    accelerator = Accelerator(cpu=True, mixed_precision="no", device_placement=False)
    plugin = stage.sharding_plugin()
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    return accelerator


def stopping(after: int) -> Callable[[], Any]:
    """In place of the signals: a wish to stop that comes in the main process, after some steps."""

    @contextlib.contextmanager
    def noted() -> Iterator[Callable[[], bool]]:
        asked: list[int] = []

        def come() -> bool:
            asked.append(1)
            return len(asked) >= after and torch.distributed.get_rank() == 0

        yield come

    return noted


if __name__ == "__main__":
    torch.set_num_threads(1)
    stage._accelerator = spread_accelerator
    if len(sys.argv) > 3:
        vars(loop)["noted_signals"] = stopping(int(sys.argv[3]))
    options = RecoverSettings.model_validate_json(sys.argv[2])
    try:
        stage.recover(pruned_model(), options, text(), Path(sys.argv[1]), teacher=model_of(), seed=3)
    except KeyboardInterrupt as stop:
        sys.exit(str(stop))
