"""Where a model lies: the device that its inputs go to, that of every layer, and how it comes to lie on several GPUs.

A model on several GPUs is one pipeline of one process: layer after layer is computed where its weights are, and
accelerate's hooks carry what lies between (`accelerate.dispatch_model`). One GPU works at a time; memory adds up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory

from compress.errors import UserError
from compress.models.families import layers_of
from compress.models.memory import available_bytes, peak_bytes
from compress.models.stream import stream_of

SPREAD = "balanced"  # what accelerate calls a model that lies on all GPUs, as evenly as whole layers allow
SHARE = 0.7  # of a GPU's free memory, what weights may take before a model is spread: the rest is for activations

Map = dict[str, Any]  # name of a module -> device, as accelerate takes it


@dataclass(frozen=True)
class Placement:
    """Where a model lies.

    Attributes:
        inputs: where token ids go, and where logits come back: the device of the input embedding.
        layers: of each decoder layer.
    """

    inputs: torch.device
    layers: tuple[torch.device, ...]

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Every device once, that of the inputs first."""
        return tuple(dict.fromkeys((self.inputs, *self.layers)))


def placement_of(model: Any) -> Placement:
    """Where a dense or planned model lies. Weights that are loaded when their layer runs count where it runs."""
    stream, layers = stream_of(model), layers_of(model)
    if stream is not None:
        return Placement(stream.device, (stream.device,) * len(layers))
    return Placement(input_device(model), tuple(_device(layer) for layer in layers))


def input_device(model: Any) -> torch.device:
    """The device that a model's inputs go to."""
    embedding = model.get_input_embeddings()
    return _device(embedding)


def _device(module: Any) -> torch.device:
    """Where a module computes."""
    weight = next(module.parameters())
    if not weight.is_meta:
        return torch.device(weight.device)
    executes = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return torch.device(weight.device if executes is None else executes)


def spread_map(model: Any) -> Map | None:
    """Which module of a model lies on which device; None where all of it lies on one, or nobody spread it."""
    table = getattr(model, "hf_device_map", None)
    return None if table is None or len({torch.device(device) for device in table.values()}) < 2 else dict(table)


def spread(model: Any, table: Mapping[str, Any]) -> Any:
    """Put the modules of a model where a map says, in place, with the hooks that carry inputs from one to the next.

    What lies there already is not copied.
    """
    main = next(iter(table.values()))
    skip = getattr(model, "_skip_keys_device_placement", None)
    dispatch_model(model, dict(table), main_device=main, skip_keys=skip)
    return _plain(model)


def _plain(model: Any) -> Any:
    """Take back the methods that accelerate puts in a model's own dictionary: a copy would move the model itself."""
    for name in ("to", "cuda"):
        vars(model).pop(name, None)
    return model


def put_like(given: Any, made: Any) -> Any:
    """Let a model on the tensors of `given` lie where that does, in place: on its device, or spread as it is."""
    table = spread_map(given)
    return made.to(input_device(given)) if table is None else spread(made, table)


def place_for(device: str | torch.device, dtype: torch.dtype, empty: Callable[[], Any], where: str) -> Any:
    """Where a model that is to be loaded goes: a device, or a map of its modules where it takes several GPUs.

    `cuda` without a number means the GPUs of this machine: the first, or all of them where the weights do not leave it
    room. `balanced` means all in any case.

    Args:
        empty: makes the model without weights (on meta).
        where: the model's name, for messages.

    Raises:
        UserError: the weights need more memory than all GPUs have.
    """
    first = first_device(device)
    if first.type != "cuda":
        return first
    if first.index is None and torch.cuda.device_count() > 1:
        return place_in(free_by_gpu(), dtype, empty(), where, always=str(device) == SPREAD)
    needed, there = _bytes(empty(), dtype), torch.cuda.get_device_properties(first).total_memory
    if needed > there:
        raise UserError(
            "the model needs more memory than one GPU has",
            where=where,
            expected=f"at most {there:,} bytes on {first}",
            found=f"{needed:,} bytes of weights",
            fix="take several GPUs by `device: auto` in a single process, where a launch gives each process a GPU of "
            "its own; `compress profile` with `profile.stream: true` needs one layer at a time",
        )
    return first


def free_by_gpu() -> dict[int, int]:
    """Bytes that can be had of each GPU of this machine, by its number."""
    return {
        number: int(torch.cuda.mem_get_info(number)[0])
        + torch.cuda.memory_reserved(number)
        - torch.cuda.memory_allocated(number)
        for number in range(torch.cuda.device_count())
    }


def room_on(device: str | torch.device) -> int | None:
    """Free bytes for a model on a device, or on all GPUs where the name means them; None if unknown."""
    first = first_device(device)
    if first.type == "cuda" and first.index is None and torch.cuda.device_count() > 1:
        return sum(free_by_gpu().values())
    return available_bytes(first)


def _bytes(model: Any, dtype: torch.dtype) -> int:
    return sum(weight.numel() for weight in model.parameters()) * dtype.itemsize


def place_in(memory: Mapping[int, int], dtype: torch.dtype, model: Any, where: str, *, always: bool) -> Any:
    """As `place_for` on GPUs with so many free bytes each, by their numbers.

    Args:
        model: without weights.
        always: spread it also where the first GPU has room.

    Raises:
        UserError: see there.
    """
    needed = _bytes(model, dtype)
    if not always and needed <= SHARE * memory[0]:
        return torch.device("cuda")
    classes = list(model._no_split_modules or ())
    room = get_balanced_memory(model, max_memory=dict(memory), no_split_module_classes=classes, dtype=dtype)
    table: Map = infer_auto_device_map(model, max_memory=room, no_split_module_classes=classes, dtype=dtype)
    if not set(table.values()) <= set(memory):
        raise UserError(
            "the model needs more memory than the GPUs of this machine have together",
            where=where,
            expected=f"at most {sum(memory.values()):,} bytes on {len(memory)} GPUs",
            found=f"{needed:,} bytes of weights",
            fix="take more GPUs or `device: cpu`; `compress profile` with `profile.stream: true` needs one layer at a "
            "time",
        )
    return table


def first_device(device: str | torch.device) -> torch.device:
    """The device that inputs go to, of a name that may mean several."""
    return torch.device("cuda" if device == SPREAD else device)


def loading(place: Any) -> dict[str, Any]:
    """What `from_pretrained` takes so that weights are read to where they go; nothing where one device is the place,
    since tensors are then moved there once they are whole."""
    return {"device_map": place} if isinstance(place, dict) else {}


def put(model: Any, place: Any) -> Any:
    """Bring a model to its place (`place_for`), unless it was loaded there (`loading`)."""
    if not isinstance(place, dict):
        return model.to(place)
    return spread(model, place) if spread_map(model) is None else _plain(model)


def filled(model: Any, table: Mapping[str, Any]) -> Any:
    """A model without weights (on meta), spread over devices with random weights, as its architecture starts."""
    for name, module in model.named_modules():
        names = [name[: len(key)] for key in table if key == "" or name == key or name.startswith(f"{key}.")]
        if names:
            module.to_empty(device=torch.device(_named(table[max(names, key=len)])), recurse=False)
    model.tie_weights()
    model.initialize_weights()
    return spread(model, table)


def _named(device: Any) -> Any:
    return f"cuda:{device}" if isinstance(device, int) else device


def takes_graphs(model: Any) -> bool:
    """Whether CUDA graphs can hold passes of a model: on one GPU."""
    devices = placement_of(model).devices
    return len(devices) == 1 and devices[0].type == "cuda"


def free_bytes(model: Any) -> int | None:
    """Bytes that a model's activations may take: those free on its fullest device, times its devices; None if
    unknown."""
    devices = placement_of(model).devices
    free = [available_bytes(device) for device in devices]
    known = [each for each in free if each is not None]
    return min(known) * len(devices) if len(known) == len(free) else None


def most_bytes(model: Any) -> int:
    """Most bytes held so far on all devices of a model (`memory.peak_bytes`)."""
    return sum(peak_bytes(device) for device in placement_of(model).devices)
