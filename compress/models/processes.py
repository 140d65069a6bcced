"""The processes of one run, as `torchrun` or `accelerate launch` starts them: who is main, and tensors between them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed


@dataclass(frozen=True)
class Processes:
    """This process among `world` of them; `rank` 0 is the main one, which writes the files."""

    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            distributed.barrier()

    def spread(self, tensors: Iterable[torch.Tensor], source: int) -> None:
        """Overwrite the tensors in every process with those of process `source`."""
        if self.world > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, source)

    def broadcast(self, value: Any, source: int) -> Any:
        """What process `source` has as `value`, in every process; it has to be picklable."""
        if self.world == 1:
            return value
        held = [value]
        distributed.broadcast_object_list(held, source)
        return held[0]

    def gather(self, value: Any) -> list[Any]:
        """What every process has as `value`, in their order, in each of them; it has to be picklable."""
        if self.world == 1:
            return [value]
        held: list[Any] = [None] * self.world
        distributed.all_gather_object(held, value)
        return held


def joined_processes() -> Processes:
    """The processes that are joined to this one already; a single one where none are."""
    if distributed.is_available() and distributed.is_initialized():
        return Processes(distributed.get_rank(), distributed.get_world_size())
    return Processes()


def find_processes(device: torch.device) -> Processes:
    """The processes of this run, joined to one another if they are not yet; a single one outside of a launcher."""
    joined = distributed.is_available() and distributed.is_initialized()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not joined:
        return Processes()
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu")
    return Processes(state.process_index, state.num_processes)
