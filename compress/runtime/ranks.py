"""Which of a layer's head groups this process computes where the model is split by heads (tensor parallel)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

if distributed.is_available():
    from torch.distributed.tensor import DTensor
else:  # some builds of torch for one process
    DTensor = None  # type: ignore[assignment, misc]

AXIS = "tp"  # transformers' name for the axis of a device mesh that heads are split over


@dataclass(frozen=True)
class Part:
    """The head groups of process `rank` among `ranks`: as many each, in their order."""

    rank: int = 0
    ranks: int = 1

    @property
    def whole(self) -> bool:
        """Whether there is one process, which has all of them."""
        return self.ranks == 1

    def of(self, count: int) -> range:
        """Numbers of this process's groups of `count`, which `ranks` divides."""
        size = count // self.ranks
        return range(self.rank * size, (self.rank + 1) * size)


def part_of(weight: torch.Tensor, by_rows: bool, asked: int = 1) -> Part:
    """The part of a layer's groups that a process computes, by the weight of the projection that makes keys.

    A weight that is split over processes along its outputs gives each process the keys of some groups. Weights that
    FSDP spreads lie on other axes of the mesh, and are whole when they are used.

    Args:
        weight: `[keys of all groups, hidden size]`, a DTensor where it is split.
        by_rows: whether its rows are those of group after group; a fused projection's are not, and its outputs are
            gathered.
        asked: processes that the model was loaded for. A mesh of so many without names is then theirs: up to
            transformers 5.23 it has none, and neither has one that FSDP makes for itself.
    """
    if DTensor is None or not isinstance(weight, DTensor) or not by_rows:
        return Part()
    mesh: Any = weight.device_mesh
    names = mesh.mesh_dim_names or ((AXIS,) if mesh.ndim == 1 and 1 < mesh.size() == asked else ())
    if AXIS not in names:
        return Part()
    axis = names.index(AXIS)
    if not weight.placements[axis].is_shard(dim=0):
        return Part()
    return Part(mesh.get_local_rank(axis), mesh.size(axis))
