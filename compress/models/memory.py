"""How much memory a backward pass will need, how much there is, and how much was used at most."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.models.families import layers_of
from compress.runtime.widths import Width

if TYPE_CHECKING:
    from compress.models.shape import ModelShape

CHECKPOINT_SHARE = 0.25  # share of the free memory that activations may take before layers are recomputed instead


def activation_bytes(model: Any, shape: ModelShape, length: int, itemsize: int) -> int:
    """Estimated bytes that autograd keeps for one document when weights need no gradient.

    Per token and layer: what the norms read (with float32 copies below float32), Q, K, V and O with K and V repeated
    once per query head, and gate, activated gate and up projection.
    """
    config = model.config
    attention = (4 * shape.query_heads + 2 * shape.kv_heads) * shape.head_dim
    read = {"q_norm": shape.query_heads * shape.head_dim, "k_norm": shape.kv_heads * shape.head_dim}
    norms = [name.rpartition(".")[2] for name, _ in layers_of(model)[0].named_modules() if name.endswith("norm")]
    states = sum(read.get(name, config.hidden_size) for name in norms) * (itemsize + (0 if itemsize == 4 else 8))
    return shape.layers * length * (states + itemsize * (attention + 3 * Width.of(config).neurons))


def available_bytes(device: torch.device) -> int | None:
    """Free bytes of a device: of the GPU, or of the machine within the limit of its control group; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = None
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        left = max(0, int(limit.read_text()) - int(used.read_text()))
        free = left if free is None else min(free, left)
    return free


def needs_checkpointing(model: Any, shape: ModelShape, length: int, itemsize: int, device: torch.device) -> bool:
    """True when keeping all activations of a document would take more than a quarter of the free memory."""
    free = available_bytes(device)
    return free is not None and activation_bytes(model, shape, length, itemsize) > CHECKPOINT_SHARE * free


def peak_bytes(device: torch.device) -> int:
    """Most bytes held so far: of the CUDA allocator on a GPU, of the process (resident set) on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
