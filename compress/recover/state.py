"""The state of an interrupted training: trained tensors, optimiser moments, step; in files of bounded size.

Random numbers need no state: every pass draws from a seed of its own (see `train`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from compress.files import write_text
from compress.json_file import read_sealed, sealed
from compress.partial import read_partial, write_partial

FILE_BYTES = 1 << 30
POINTER = "partial.json"


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU; one that is spread over processes is gathered, which all of them have to take part in."""
    full: torch.Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu().contiguous()


def like(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A whole tensor, placed and spread as another one is."""
    value = value.to(other.device)
    return distribute_tensor(value, other.device_mesh, other.placements) if isinstance(other, DTensor) else value


def capture(trained: Mapping[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Trained tensors and optimiser state as whole CPU tensors; all processes have to take part."""
    found = {f"weight/{name}": whole(weight.detach()) for name, weight in trained.items()}
    for name, weight in trained.items():
        for part, value in optimiser.state[weight].items():
            found[f"{part}/{name}"] = whole(value)
    return found


@torch.no_grad()
def restore(
    found: Mapping[str, torch.Tensor], trained: Mapping[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer
) -> None:
    """Put what `capture` gave back."""
    for name, weight in trained.items():
        weight.copy_(like(found[f"weight/{name}"], weight))
        state: dict[str, Any] = {}
        for part in ("step", "exp_avg", "exp_avg_sq"):
            value = found[f"{part}/{name}"]
            state[part] = value if part == "step" else like(value, weight)
        optimiser.state[weight] = state


class Partial:
    """Saved states in a folder, of which the newest whole one counts.

    Args:
        key: of the training; a state of another one is as good as none.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key

    def write(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a state after `step` steps, and only then drop the one before."""
        names = []
        for number, group in enumerate(_groups(tensors)):
            name = f"partial-{step}-{number}"
            write_partial(self.folder / name, self.key, {"step": step}, group)
            names.append(name)
        write_text(self.folder / POINTER, sealed({"key": self.key, "step": step, "files": names}))
        self._drop(names)

    def read(self) -> tuple[int, dict[str, torch.Tensor]] | None:
        """Step and tensors; None without a state, or with a damaged or foreign one."""
        pointer = read_sealed(self.folder / POINTER)
        if pointer is None or pointer["key"] != self.key:
            return None
        step: int = pointer["step"]
        tensors: dict[str, torch.Tensor] = {}
        for name in pointer["files"]:
            found = read_partial(self.folder / name, self.key)
            if found is None or found[0]["step"] != step:
                return None
            tensors |= found[1]
        return (step, tensors) if tensors else None

    def remove(self) -> None:
        """Delete all states."""
        (self.folder / POINTER).unlink(missing_ok=True)
        self._drop([])

    def _drop(self, kept: list[str]) -> None:
        for path in self.folder.glob("partial-*"):
            if path.name not in kept:
                path.unlink()


def _groups(tensors: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors in groups of about a gigabyte."""
    group: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if group and size + tensor.nbytes > FILE_BYTES:
            yield group
            group, size = {}, 0
        group[name] = tensor
        size += tensor.nbytes
    yield group
