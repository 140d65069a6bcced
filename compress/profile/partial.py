"""`profile.partial`: what an interrupted run has, all passes in one file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.partial import read_partial, write_partial
from compress.profile.key import Key
from compress.profile.statistic import Result, Results

NAME = "profile.partial"
FORM = 2  # of the notes; files of another form are not continued
EARLIER = ("importance.partial", "gates.partial")  # files beside it that earlier versions left

State = tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]


class Partial:
    """Results of the steps that are done, and the state of those under way.

    A step is a pass over the samples, or the training of one statistic.

    Args:
        folder: of the profile.
        key: of the run; a file of another run, or a damaged one, is not read.
        writes: whether this process writes the file; all processes read it.

    Attributes:
        seconds: time spent so far.
        peak: most bytes held so far (`memory.peak_bytes`).
        losses: (length in tokens, loss) of the samples that went through a backward pass of attention.
    """

    def __init__(self, folder: Path, key: str, *, writes: bool) -> None:
        self.folder, self.key, self.writes = folder, key, writes
        self.seconds = 0.0
        self.peak = 0
        self.losses: list[tuple[int, float]] = []
        self.done: dict[str, dict[str, Results]] = {}
        self._states: dict[str, State] = {}
        earlier = read_partial(folder / NAME, key)
        if earlier is not None and earlier[0].get("form") == FORM:
            self._restore(*earlier)

    def state(self, step: str) -> State | None:
        """Notes and tensors of an interrupted step, once; None where there are none."""
        return self._states.pop(step, None)

    def save(self, step: str, notes: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the state of a step.

        Args:
            notes: plain JSON values.
            tensors: on the CPU.

        Raises:
            UserError: the disk is full, or the folder cannot be written.
        """
        if self.writes:
            self._write({step: (notes, tensors)})

    def finish(self, step: str, results: dict[str, Results]) -> None:
        """Keep the results of a step, by statistic, in place of its state, and write them."""
        self.done[step] = results
        if self.writes:
            self._write({})

    def remove(self) -> None:
        """Delete the file, and those that earlier versions left beside it."""
        if self.writes:
            for name in (NAME, *EARLIER):
                (self.folder / name).unlink(missing_ok=True)

    def _write(self, states: Mapping[str, State]) -> None:
        notes: dict[str, Any] = {"form": FORM, "seconds": self.seconds, "peak": self.peak, "losses": self.losses}
        tensors: dict[str, torch.Tensor] = {}
        notes["done"] = {
            step: {
                name: {str(key): [result.axes, result.unit] for key, result in results.items()}
                for name, results in statistics.items()
            }
            for step, statistics in self.done.items()
        }
        for statistics in self.done.values():
            for results in statistics.values():
                tensors |= {f"done/{key}": result.values for key, result in results.items()}
        notes["states"] = {step: step_notes for step, (step_notes, _) in states.items()}
        for step, (_, held) in states.items():
            tensors |= {f"{step}/{name}": tensor.contiguous() for name, tensor in held.items()}
        write_partial(self.folder / NAME, self.key, notes, tensors)

    def _restore(self, notes: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        self.seconds, self.peak = notes["seconds"], notes["peak"]
        self.losses = [(length, loss) for length, loss in notes["losses"]]
        for step, statistics in notes["done"].items():
            self.done[step] = {
                name: {
                    Key.parse(key): Result(tensors[f"done/{key}"], tuple(axes), unit)
                    for key, (axes, unit) in declared.items()
                }
                for name, declared in statistics.items()
            }
        for step, step_notes in notes["states"].items():
            start = f"{step}/"
            held = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
            self._states[step] = (step_notes, held)


@dataclass(frozen=True)
class Step:
    """The state of one training in a `Partial`: a `train.state.Store`."""

    partial: Partial
    name: str

    def read(self) -> tuple[int, dict[str, torch.Tensor]] | None:
        """See `Store.read`."""
        state = self.partial.state(self.name)
        return None if state is None else (int(state[0]["step"]), dict(state[1]))

    def write(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """See `Store.write`."""
        self.partial.save(self.name, {"step": step}, tensors)
