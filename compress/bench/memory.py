"""Measurements that do not fit into the memory of a device are left out, and a line reports each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from compress.bench.kernel import Shape
from compress.bench.measure import release
from compress.runtime.families import groups_of, head_size_of
from compress.runtime.widths import Width

GIB = 2**30
T = TypeVar("T")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a GPU; None on a CPU, which does not say."""
    if device.type != "cuda":
        return None
    release(device)
    return torch.cuda.mem_get_info(device)[0]


def attempt(what: str, need: int, device: torch.device, call: Callable[[], T], tell: Callable[[str], None]) -> T | None:
    """What a measurement finds, or None where it does not fit into memory, which a line reports.

    Args:
        what: names the measurement in that line.
        need: bytes that it allocates at once, as far as can be known; more than are free, and it is not begun.
    """
    free = free_bytes(device)
    if free is not None and need > free:
        tell(f"{what}: skipped, it needs about {need / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free on this device")
        return None
    try:
        return call()
    except torch.OutOfMemoryError as error:
        reason = ". ".join(str(error).partition("\n")[0].split(". ")[:2])  # what was asked for; then comes advice
    release(device)  # behind the handler, which holds the tensors of the frames that failed
    tell(f"{what}: skipped, it ran out of memory ({reason})")
    return None


def prefill_need(shape: Shape, batch: int, length: int, dtype: torch.dtype) -> int:
    """Bytes of a prefill: queries, keys, values, and the outputs of two calls."""
    return batch * length * (3 * shape.query_heads + 2 * shape.groups) * shape.head_dim * dtype.itemsize


def decode_need(shape: Shape, batch: int, length: int, dtype: torch.dtype) -> int:
    """Bytes of a decode step: dense keys and values beside the pages of a plan, which are no more."""
    return 2 * 2 * batch * length * shape.groups * shape.head_dim * dtype.itemsize


def model_need(model: Any, batch: int, length: int) -> int:
    """Bytes of a whole model beyond its weights: the dense cache of a batch, that of one prompt, and its prefill."""
    config = model.config
    itemsize = next(model.parameters()).itemsize
    cache = 2 * config.num_hidden_layers * groups_of(config) * head_size_of(config) * length * itemsize
    return (batch + 1) * cache + length * (4 * config.hidden_size + 3 * Width.of(config).neurons) * itemsize
