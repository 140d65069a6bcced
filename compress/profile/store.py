"""A profile on disk: `statistics.safetensors` and `profile.json`, written atomically and read with every check."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from compress.errors import Problem, UserError, nearest
from compress.files import write_bytes
from compress.json_file import JsonError, parse_json, validated
from compress.plan import ModelShape
from compress.profile.key import Key
from compress.registry import layer_options, targets
from compress.targets.layer_option import LayerOption
from compress.targets.target import Target
from compress.targets.window import SpanGrid

HEADER = "profile.json"
TENSORS = "statistics.safetensors"
EFFECT = "effect"  # the statistic that prices targets and options of whole layers
SHOWN = 40  # keys that a message lists
AGAIN = "profile again (delete the folder, or choose another one)"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorEntry(_Strict):
    """Declaration of one stored tensor: sizes, one name per axis, and what one number counts."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    unit: str


class StatisticEntry(_Strict):
    """One statistic of the profile with its parameters."""

    parameters: dict[str, Any]
    unit: str
    tensors: dict[str, TensorEntry]


class ProfileHeader(_Strict):
    """`profile.json`.

    Attributes:
        key: hash of everything the numbers depend on (see `run.run_key`); an equal run is not repeated.
        model: shape of the profiled model; `fingerprint` repeats its fingerprint.
        documents: number of documents per length.
        second: the same of the second corpus, empty without one.
        grid: span grid of the influence tables, None without them.
        loss: mean loss per length in nats per answer token; empty without a backward pass.
        peak_memory_bytes: see `memory.peak_bytes`.
        seconds: time spent on documents, over all parts of a resumed run.
        sha256: of `statistics.safetensors`.
        checksum: of this file's other fields, so that a flipped byte is noticed.
    """

    schema_version: int
    key: str
    model: ModelShape
    fingerprint: str
    lengths: tuple[int, ...]
    documents: dict[int, int]
    second: dict[int, int] = {}
    statistics: dict[str, StatisticEntry]
    grid: SpanGrid | None
    loss: dict[int, float]
    peak_memory_bytes: int
    seconds: float
    seed: int
    versions: dict[str, str]
    sha256: str

    def to_json(self) -> str:
        """The file's text, with `schema` and `checksum`."""
        fields = self.model_dump(mode="json")
        fields = {"schema": fields.pop("schema_version"), **fields}
        return json.dumps({**fields, "checksum": _checksum(fields)}, indent=1) + "\n"


@dataclass(frozen=True)
class Profile:
    """A profile that passed all checks.

    Attributes:
        tensors: float32, `[layers, groups, ...]` or `[layers, neurons]`.
    """

    folder: Path
    header: ProfileHeader
    tensors: dict[Key, torch.Tensor]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Profiled lengths in tokens, ascending."""
        return self.header.lengths

    @property
    def grid(self) -> SpanGrid | None:
        """Span grid of the influence tables."""
        return self.header.grid

    def find(self, key: Key) -> torch.Tensor | None:
        """One tensor; None where the profile has none of this key."""
        return self.tensors.get(key)

    def tensor(self, key: Key) -> torch.Tensor:
        """One tensor.

        Raises:
            UserError: the profile has no such tensor; says which it has.
        """
        tensor = self.find(key)
        if tensor is None:
            raise missing(key, self.tensors, str(self.folder))
        return tensor

    @property
    def priced(self) -> tuple[Target, ...]:
        """The targets that the statistic `effect` priced; none without it."""
        entry = self.header.statistics.get(EFFECT)
        return () if entry is None else tuple(map(targets.parse, entry.parameters["targets"]))

    @property
    def priced_layers(self) -> tuple[LayerOption, ...]:
        """The options of whole layers that the statistic `effect` priced; none without it."""
        entry = self.header.statistics.get(EFFECT)
        return () if entry is None else tuple(map(layer_options.parse, entry.parameters.get("layers", ())))

    def effect(self, target: Target, length: int, part: str = "absolute") -> torch.Tensor:
        """What a target costs every head group at a length in tokens, `[layers, groups]` in nats (statistic `effect`).

        Args:
            part: `absolute` or `signed`.

        Raises:
            UserError: the target was not priced at that length; says which were.
        """
        if target.as_built and not target.removes:
            model = self.header.model
            return torch.zeros(model.layers, model.kv_heads)
        return self.tensor(effect_key(target, length, part))

    def entry(self, key: Key) -> TensorEntry:
        """The declaration of a tensor that the profile has."""
        return self.header.statistics[key.statistic].tensors[str(key)]


def effect_key(option: Target | LayerOption, length: int, part: str = "absolute") -> Key:
    """Where a profile has what a target, or an option of whole layers, costs at a length in tokens."""
    return Key(EFFECT, part, length).to(option)


def missing(key: Key, known: Iterable[Key], where: str) -> UserError:
    """The error for a tensor that a profile does not have.

    Args:
        known: what it has.
    """
    names = sorted(str(other) for other in known if key.target is None or other.statistic == key.statistic)
    shown = names if len(names) <= SHOWN else [*names[:SHOWN], f"{len(names) - SHOWN} more"]
    return UserError(
        f"the profile has no `{key}`",
        where=where,
        expected=f"one of {', '.join(shown)}" if names else "a profile that has it",
        fix=nearest(str(key), names) or "add the statistic to the recipe and profile again",
    )


def write_profile(folder: Path, header: ProfileHeader, tensors: Mapping[Key, torch.Tensor]) -> None:
    """Write both files; `header.sha256` is filled in here. The header comes last, so it vouches for the tensors."""
    data = save_tensors({str(key): tensor.contiguous() for key, tensor in tensors.items()})
    header = header.model_copy(update={"sha256": hashlib.sha256(data).hexdigest()})
    write_bytes(folder / TENSORS, data)
    write_bytes(folder / HEADER, header.to_json().encode())


def read_profile(folder: str | Path, shape: ModelShape | None = None) -> Profile:
    """Read a finished profile.

    Args:
        folder: where `profile.json` and `statistics.safetensors` lie.
        shape: shape of the model it has to belong to; None accepts any.

    Raises:
        UserError: a missing, truncated or changed file, another schema, or another model's profile.
    """
    folder = Path(folder)
    header = _read_header(folder / HEADER)
    if shape is not None and shape.differing(header.model.model_dump()):
        raise UserError(_other_model(folder / HEADER, header.model, shape))
    return Profile(folder, header, _read_tensors(folder / TENSORS, header))


def _checksum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(
            "no such file" if path.parent.is_dir() else "no such folder",
            where=str(path),
            expected=f"a profile: {HEADER} and {TENSORS}",
            fix="run `compress profile` first, or check the path",
        ) from error
    except OSError as error:
        raise UserError("the file could not be read", where=str(path), found=str(error)) from error


def _read_header(path: Path) -> ProfileHeader:
    try:
        fields = parse_json(_read_bytes(path))
    except JsonError as error:
        raise UserError(
            "damaged profile: not valid JSON", where=str(path), expected="JSON", found=str(error), fix=AGAIN
        ) from error
    if not isinstance(fields, dict) or fields.get("schema") != 1:
        schema = fields.get("schema", "no `schema`") if isinstance(fields, dict) else f"a {type(fields).__name__}"
        raise UserError(
            "not a profile of this version", where=str(path), expected="schema 1", found=reprlib.repr(schema), fix=AGAIN
        )
    checksum = fields.pop("checksum", None)
    if checksum != _checksum(fields):
        raise UserError(
            "damaged profile: the file was changed after it was written",
            where=str(path),
            expected=f"checksum {_checksum(fields)}",
            found=reprlib.repr(checksum),
            fix=AGAIN,
        )
    fields["schema_version"] = fields.pop("schema")
    header = validated(ProfileHeader, fields, "the profile", str(path), fix=AGAIN)
    problems = []
    for name, statistic in header.statistics.items():
        for key, entry in statistic.tensors.items():
            if not _is_key(key, name):
                problems.append(
                    Problem(f"statistic `{name}`: unknown name of a tensor", str(path), f"{name}.<part>", key, AGAIN)
                )
            start = (header.model.layers, header.model.kv_heads)
            # Neurons are no part of the model's shape, so their number is not known here.
            fits = entry.shape[:1] == start[:1] if entry.axes == ("layer", "neuron") else entry.shape[:2] == start
            if not fits or len(entry.axes) != len(entry.shape):
                problems.append(
                    Problem(
                        f"statistic `{name}`: shape of `{key}` does not fit the model",
                        str(path),
                        f"axes (layer, group, ...) of sizes {start}, or (layer, neuron)",
                        f"axes {entry.axes} of sizes {entry.shape}",
                        AGAIN,
                    )
                )
    if problems:
        raise UserError(problems)
    return header


def _is_key(text: str, statistic: str) -> bool:
    """Whether a text is the key of a statistic's tensor."""
    try:
        return Key.parse(text).statistic == statistic
    except UserError:
        return False


def _other_model(path: Path, measured: ModelShape, expected: ModelShape) -> list[Problem]:
    """One problem per field that differs; of equal shapes with other weights only the fingerprint is named."""
    return [
        Problem(
            f"profile of another model: `{field}` differs",
            str(path),
            str(getattr(expected, field)),
            str(getattr(measured, field)),
            "profile this model, or choose the model that the profile was made with",
        )
        for field in expected.differing(measured.model_dump())
    ]


def _read_tensors(path: Path, header: ProfileHeader) -> dict[Key, torch.Tensor]:
    data = _read_bytes(path)
    digest = hashlib.sha256(data).hexdigest()
    if digest != header.sha256:
        raise UserError(
            "damaged profile: truncated, or changed after it was written",
            where=str(path),
            expected=f"sha256 {header.sha256}",
            found=f"sha256 {digest} ({len(data):,} bytes)",
            fix=AGAIN,
        )
    try:
        tensors = load_tensors(data)
    except (SafetensorError, ValueError) as error:
        raise UserError("damaged profile: not safetensors", where=str(path), found=str(error), fix=AGAIN) from error
    declared = {key: entry for statistic in header.statistics.values() for key, entry in statistic.tensors.items()}
    problems = [
        Problem(f"tensor `{key}` is only in one of the two files", str(path), fix=AGAIN)
        for key in sorted(declared.keys() ^ tensors.keys())
    ]
    for key in sorted(declared.keys() & tensors.keys()):
        shape, tensor = declared[key].shape, tensors[key]
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            stored = f"{tensor.dtype} {tuple(tensor.shape)}"
            problems.append(Problem(f"wrong shape of `{key}`", str(path), f"torch.float32 {shape}", stored, AGAIN))
        elif not bool(torch.isfinite(tensor).all()):
            problems.append(Problem(f"`{key}` holds NaN or infinity", str(path), "finite numbers", fix=AGAIN))
    if problems:
        raise UserError(problems)
    return {Key.parse(key): tensor for key, tensor in tensors.items()}
