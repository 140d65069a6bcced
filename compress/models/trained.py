"""Trained weights of a model on disk, under the model's own names, and their way back into an equal model."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated, Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from compress.errors import Problem, UserError
from compress.files import refusal, system_error, write_json
from compress.json_file import read_model

PATTERN = "model{suffix}.safetensors"
INDEX = "model.safetensors.index.json"
AGAIN = "compress recover RECIPE"


class _Index(BaseModel):
    """What is read of an index: the file of every tensor, which lies in the same folder."""

    model_config = ConfigDict(extra="ignore")

    weight_map: dict[str, Annotated[str, Field(pattern=r"^model[0-9a-z-]*\.safetensors$")]] = Field(min_length=1)


def own_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers by name; weights that are tied count once."""
    saved = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return {name: weight.detach() for name, weight in {**dict(model.named_parameters()), **buffers}.items()}


def write_trained(model: torch.nn.Module, folder: Path, *, max_shard_size: str = "5GB") -> str:
    """Write the weights as `model.safetensors`, or in several files with an index.

    Returns:
        sha256 of names and values, hexadecimal.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    folder.mkdir(exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in sorted(own_tensors(model).items())}
    for old in (*folder.glob("model*.safetensors"), folder / INDEX):
        old.unlink(missing_ok=True)
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=PATTERN, max_shard_size=max_shard_size)
    for name, members in split.filename_to_tensors.items():
        beside = folder / f".{name}.part"
        beside.unlink(missing_ok=True)  # never written through a link
        try:
            save_file({member: tensors[member] for member in members}, beside, {"format": "pt"})
            os.replace(beside, folder / name)
        except Exception as error:  # the library quotes the system in an error of its own
            beside.unlink(missing_ok=True)
            if (refused := system_error(error)) is None:
                raise
            raise refusal("the trained weights could not be written", folder / name, refused) from error
    if split.is_sharded:
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def load_trained(model: Any, folder: Path) -> Any:
    """Put what `write_trained` wrote into an equal model, in place; the tensors it had before are left untouched.

    Returns:
        the model.

    Raises:
        UserError: no weights are there, or a tensor is missing, unknown, or of another shape or dtype: all at once.
    """
    tensors = read_trained(folder)
    expected = own_tensors(model)
    problems = _problems(expected, tensors, str(folder))
    if problems:
        raise UserError(problems)
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        placed = tensor.to(expected[name].device)
        if name in parameters:
            parameters[name].data = placed
        else:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, placed)
    return model


def read_trained(folder: Path) -> dict[str, torch.Tensor]:
    """What `write_trained` wrote, by name, on the CPU.

    Raises:
        UserError: no weights are there, or they are damaged.
    """
    index = folder / INDEX
    if index.is_file():
        names = read_model(_Index, index, "the index of the trained weights", fix=AGAIN).weight_map.values()
        files = sorted(set(names))
    else:
        files = ["model.safetensors"]
    tensors: dict[str, torch.Tensor] = {}
    for name in files:
        if not (folder / name).is_file():
            raise UserError("there are no trained weights", where=str(folder / name), fix=AGAIN)
        try:
            tensors |= load_file(folder / name)
        except SafetensorError as error:
            raise UserError(
                "the trained weights are damaged", where=str(folder / name), found=str(error), fix=AGAIN
            ) from None
    return tensors


def _problems(expected: dict[str, torch.Tensor], read: dict[str, torch.Tensor], where: str) -> list[Problem]:
    problems = [
        Problem(f"the trained weights lack `{name}`", where, _form(tensor), "nothing")
        for name, tensor in expected.items()
        if name not in read
    ]
    problems += [
        Problem(f"the trained weights have `{name}`, which the model does not have", where, "nothing", _form(tensor))
        for name, tensor in read.items()
        if name not in expected
    ]
    problems += [
        Problem(f"`{name}` does not fit", where, _form(tensor), _form(read[name]))
        for name, tensor in expected.items()
        if name in read and _form(read[name]) != _form(tensor)
    ]
    return problems


def _form(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
