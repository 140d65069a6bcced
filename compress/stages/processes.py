"""The processes of `torchrun` or `accelerate launch`: one main, which does everything, and helpers, which measure and
train beside it.

A launch is known by its environment variables. They are hidden while the main process works alone, so that no library
waits there for the helpers, and are back in place while all work together.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
SHARDING = "ACCELERATE_USE_FSDP"  # the recipe decides this; transformers would leave weights out in helpers
_MEETINGS = itertools.count()  # how often the processes of the launch have met
PATIENCE = timedelta(days=7)  # helpers wait through the stages before


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together."""

    rank: int
    local_rank: int
    count: int
    variables: dict[str, str]


@functools.cache
def launch() -> Launch | None:
    """The launch that this process is part of, and hides its variables; None for a process of its own."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return None
    os.environ.pop(SHARDING, None)
    variables = {name: os.environ.pop(name) for name in NAMES if name in os.environ}
    rank = int(variables.get("RANK", "0"))
    return Launch(rank, int(variables.get("LOCAL_RANK", rank)), count, variables)


def is_helper() -> bool:
    """Whether this process only works beside the main one: it prints nothing, and writes nothing."""
    started = launch()
    return started is not None and started.rank > 0


def check_launch(recipe: Any, folder: Path, *sections: str) -> None:
    """Check, before any work, that there are as many processes as share a sequence where a recipe says so.

    Args:
        folder: of the run; what is done there needs no processes.
        sections: of the recipe, `profile` or `recover`, that the command runs.

    Raises:
        UserError: there are others.
    """
    from compress.models.context.processes import check_processes

    started = launch()
    for name in sections:
        section = getattr(recipe, name)
        if section is not None and section.context > 1 and not (folder / name / f"{name}.json").exists():
            check_processes(section.context, 1 if started is None else started.count, f"{name}.context")


@functools.cache
def _store() -> Any:
    """Where the processes of the launch find one another; it is there until the main process ends."""
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=PATIENCE))
    return store


@contextmanager
def together(device: str) -> Iterator[None]:
    """All processes of the launch meet here, and are one group inside. Without a launch nothing happens.

    Args:
        device: where this process computes; `cpu` connects by gloo, a GPU by nccl.
    """
    started = launch()
    if started is None:
        yield
        return
    import torch
    from accelerate.state import AcceleratorState, PartialState
    from torch.distributed.distributed_c10d import PrefixStore

    AcceleratorState._reset_state(True)
    os.environ.update(started.variables)
    try:
        # A place of its own for each meeting: addresses that an earlier one has left would be those of nobody.
        place = PrefixStore(f"meeting-{next(_MEETINGS)}", _store())
        known = {"store": place, "rank": started.rank, "world_size": started.count, "timeout": PATIENCE}
        PartialState(cpu=device == "cpu", **known)
        yield
    finally:
        for name in started.variables:
            os.environ.pop(name, None)
    torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(True)
