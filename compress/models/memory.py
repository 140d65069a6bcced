"""How much memory there is, and how much was used at most."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch


def available_bytes(device: torch.device) -> int | None:
    """Free bytes of a device: of the GPU, or of the machine within the limit of its control group; None if unknown, and
    on the device meta, where tensors have no memory."""
    if device.type == "meta":
        return None
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


def peak_bytes(device: torch.device) -> int:
    """Most bytes held so far: of the CUDA allocator on a GPU, of the process (resident set) on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
