"""Tensors that were trained for targets before the search, beside the dense model that they belong to.

A folder of options holds them: `prepare.json` names the options that are finished, and every option, one target in
all head groups that may change, has a folder with `tensors.safetensors` and `option.json`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load, save

from compress.errors import UserError
from compress.files import write_bytes, write_text
from compress.json_file import read_model, sealed
from compress.models.retention import Retention
from compress.registry import targets
from compress.runtime.mixer import Mixer
from compress.targets.target import Target

RECORD, OPTION, TENSORS = "prepare.json", "option.json", "tensors.safetensors"
RETENTION = "retention.safetensors"
AGAIN = "compress prepare RECIPE"


class Option(BaseModel):
    """`option.json`: one target, trained for every head group that may change.

    Attributes:
        key: of all that the tensors depend on.
        target: its entry in a plan.
        objective: what was minimised, with its parameters.
        tokens: trained on.
        first_loss, last_loss: of the first and the last step, in the objective's unit.
        errors: `[layers][groups]`, the squared error of the outputs of a group's heads over the dense outputs' squares,
            on the first batches of the training; of scorers that of scores over the variance of what they stand for, on
            other texts; null in layers that slide by themselves.
        seconds: of all steps.
        sha256: of `tensors.safetensors`.
        retention: sha256 of `retention.safetensors`, which an option of scorers has; null for any other.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    target: dict[str, Any]
    objective: dict[str, Any]
    steps: int
    tokens: int
    first_loss: float
    last_loss: float
    errors: list[list[float] | None]
    seconds: float
    sha256: str
    retention: str | None = None
    versions: dict[str, str]


class _Record(BaseModel):
    """`prepare.json`: folders of the options that are finished, with the sha256 of their tensors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    options: dict[str, str]


@dataclass(frozen=True)
class PreparedOption:
    """One option with its tensors.

    Attributes:
        tensors: `<layer>.<name of the mixer's parameter>`, of all head groups of the dense layer, one behind another.
        retention: what its scorers keep at each threshold; None where it has none.
    """

    target: Target
    record: Option
    tensors: Mapping[str, torch.Tensor]
    retention: Retention | None = None

    @property
    def errors(self) -> torch.Tensor:
        """`[layers, groups]`, see `Option.errors`; NaN in layers that slide by themselves."""
        groups = next(len(row) for row in self.record.errors if row is not None)
        return torch.tensor([[math.nan] * groups if row is None else row for row in self.record.errors])

    def of(self, layer: int, group: int) -> dict[str, torch.Tensor]:
        """The part of a head group of the dense model in the mixer's parameters, by name; flat."""
        start = f"{layer}."
        groups = self.errors.shape[1]
        return {
            name.removeprefix(start): tensor.reshape(groups, -1)[group]
            for name, tensor in self.tensors.items()
            if name.startswith(start)
        }


Prepared = tuple[PreparedOption, ...]


_PLACE = "compress_prepared"


def attach(model: Any, prepared: Prepared) -> None:
    """Let a dense model carry what was prepared for it; plans that use it find it there (`planned_model`)."""
    setattr(model, _PLACE, prepared)


def prepared_for(model: Any) -> Prepared:
    """What a model carries; nothing where nothing was prepared."""
    prepared: Prepared = getattr(model, _PLACE, ())
    return prepared


def found_for(prepared: Prepared) -> Callable[[Target], PreparedOption | None]:
    """What was trained for a target, or for one whose tensors serve it (`Target.prepared_as`); None for neither."""
    own = {option.target: option for option in prepared}
    serving = {option.target.prepared_as: option for option in prepared}
    return lambda target: own.get(target) or serving.get(target.prepared_as)


def placed_for(prepared: Prepared) -> Callable[[Target, int, int], Target]:
    """What a target is in a layer's head group, with the threshold that a preparation says (`Target.placed`)."""
    option_of = found_for(prepared)

    def placed(target: Target, layer: int, group: int) -> Target:
        option = option_of(target) if target.open else None
        return target if option is None else target.placed(option.retention, layer, group)

    return placed


@torch.no_grad()
def fill(mixer: Mixer, groups: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Give a mixer's parameters what they have for each of its groups, by name; the others keep what they have."""
    for number, tensors in enumerate(groups):
        for name, tensor in tensors.items():
            mixer.get_parameter(name).view(len(groups), -1)[number] = tensor.flatten()


def write_option(
    folder: Path, record: Option, tensors: Mapping[str, torch.Tensor], retention: Retention | None = None
) -> Option:
    """Write an option's tensors, then its record, which vouches for them; the record with its sha256."""
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())})
    write_bytes(folder / TENSORS, data)
    record = record.model_copy(update={"sha256": hashlib.sha256(data).hexdigest()})
    if retention is not None:
        data = save(retention.tensors())
        write_bytes(folder / RETENTION, data)
        record = record.model_copy(update={"retention": hashlib.sha256(data).hexdigest()})
    unused = {"retention"} if retention is None else set()
    write_text(folder / OPTION, sealed(record.model_dump(mode="json", exclude=unused)))
    return record


def write_record(folder: Path, options: Mapping[str, Option]) -> None:
    """Name the options that are finished, by their folders."""
    write_text(folder / RECORD, sealed({"options": {name: option.sha256 for name, option in options.items()}}))


def read_option(folder: Path) -> Option:
    """An option's record.

    Raises:
        UserError: there is none, or it is damaged.
    """
    return read_model(Option, folder / OPTION, "the record of a prepared target", fix=AGAIN, finite=False)


def read_options(folder: Path) -> dict[str, Option]:
    """The records of all finished options, without their tensors, by the names of their folders.

    Raises:
        UserError: a file is missing or damaged.
    """
    record = read_model(_Record, folder / RECORD, "the list of prepared targets", fix=AGAIN)
    return {name: read_option(folder / name) for name in record.options}


def read_prepared(folder: Path) -> Prepared:
    """All options of a folder.

    Raises:
        UserError: a file is missing, damaged or changed.
    """
    record = read_model(_Record, folder / RECORD, "the list of prepared targets", fix=AGAIN)
    options = []
    for name, sha256 in record.options.items():
        option = read_option(folder / name)
        data = _vouched(folder / name / TENSORS, option.sha256, sha256)
        retention = None
        if option.retention is not None:
            kept = load(_vouched(folder / name / RETENTION, option.retention, option.retention))
            retention = Retention.of(kept)
        options.append(PreparedOption(targets.parse(option.target), option, load(data), retention))
    return tuple(options)


def _vouched(path: Path, *known: str) -> bytes:
    """The contents of a file whose sha256 the records say alike."""
    data = path.read_bytes() if path.is_file() else b""
    if {*known, hashlib.sha256(data).hexdigest()} != {known[-1]}:
        raise UserError(
            "the tensors of a prepared target are missing or were changed",
            where=str(path),
            expected=f"sha256 {known[-1]}",
            found=f"sha256 {hashlib.sha256(data).hexdigest()}" if data else "no such file",
            fix=AGAIN,
        )
    return data
