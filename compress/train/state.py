"""The state of an interrupted training: trained tensors, optimiser moments, step; in files of bounded size.

Random numbers need no state: every pass draws from a seed of its own (see `loop`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from compress.files import write_text
from compress.json_file import read_sealed, sealed
from compress.partial import read_partial, write_partial

FILE_BYTES = 1 << 30
POINTER = "partial.json"
# Whole tensors on the CPU, of the main process only where weights are spread.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def capture(module: nn.Module, names: Collection[str], optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Trained tensors and the optimiser's state, whole and on the CPU; all processes have to take part.

    Args:
        names: of the trained parameters.
    """
    weights: Any
    moments: Any
    weights, moments = get_state_dict(module, optimiser, options=WHOLE)
    tensors = {f"weight/{name}": tensor for name, tensor in weights.items() if name in names}
    for name, parts in moments.get("state", {}).items():
        tensors |= {f"{part}/{name}": tensor for part, tensor in parts.items()}
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def restore(tensors: Mapping[str, torch.Tensor], module: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Put back what `capture` gave."""
    named = {id(weight): name for name, weight in module.named_parameters()}
    groups = [
        {**group, "params": [named[id(weight)] for weight in group["params"]]} for group in optimiser.param_groups
    ]
    parts: dict[str, Any] = {name: {} for group in groups for name in group["params"]}
    weights: dict[str, Any] = {}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        if part == "weight":
            weights[name] = tensor
        else:
            parts[name][part] = tensor
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(module, weights, options=options)
    state: Any = {"state": parts, "param_groups": groups}
    set_optimizer_state_dict(module, optimiser, state, options=options)


def whole_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Trained weights that are spread over processes, whole in each of them; all processes have to take part."""
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    weights: Any = get_model_state_dict(module, options=options)
    return dict(weights)


class Store(Protocol):
    """Where the state of a training is kept; all processes read it, the main one writes."""

    def read(self) -> tuple[int, dict[str, torch.Tensor]] | None:
        """Steps that were done, and tensors; None without a state of this training."""

    def write(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the state after `step` steps in place of the one before."""


class Partial:
    """Saved states in a folder, of which the newest whole one counts.

    Args:
        key: of the training; a state of another one is as good as none.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key

    @property
    def foreign(self) -> bool:
        """Whether there is a state, and it is of another training."""
        pointer = read_sealed(self.folder / POINTER)
        return pointer is not None and pointer["key"] != self.key

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
            content = read_partial(self.folder / name, self.key)
            if content is None or content[0]["step"] != step:
                return None
            tensors |= content[1]
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
