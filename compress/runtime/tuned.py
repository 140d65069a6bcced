"""Launch parameters of the attention kernels, measured on the GPUs named here; others take what surely fits.

Those of kernels for one kind of heads are in a file of that kind.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch


@lru_cache
def hopper(device: torch.device) -> bool:
    """Whether it is a GPU of Hopper's kind or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many it has; of a CPU a number for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 5


def float32_tiles(head_dim: int) -> dict[str, int]:
    """Tile sizes, warps and pipeline depth of attention in float32, whose products no tensor core computes.

    What a thread multiplies lies in its registers. Chosen by what the compiler spills, and not timed: at most 60 bytes
    a thread, in chunks behind a cache 440, and there 6 KiB at head size 256. With tiles of 64 rows and four warps it
    was 2 to 60 KiB in prefill, and with tiles of 64 x 64, or 32 x 32 at head size 256, 3 to 45 KiB in gradients
    (triton 3.6 for an H100).
    """
    return {"block_m": 32 if head_dim <= 64 else 16, "block_n": 32, "warps": 8, "stages": 1}


def prefill_config(head_dim: int, itemsize: int, device: torch.device) -> dict[str, Any]:
    """Tile sizes, warps and pipeline depth of the prefill kernel for a head size and the bytes of a number.

    H200, torch 2.11, triton 3.6, head size 128, bfloat16, 16k tokens, all heads full (TFLOP/s): 128 x 128 tiles with
    8 warps and 3 stages 597; 2 stages 492; 128 x 64 tiles with 3 stages 559; 64 x 64 with 4 warps 531; 256 x 64 442.
    """
    if device.type == "cpu":  # the interpreter: small tiles, so that small inputs have several
        return {"block_m": 32, "block_n": 32, "warps": 4, "stages": 1}
    if itemsize > 2:
        return float32_tiles(head_dim)
    if not hopper(device):
        return {"block_m": 64, "block_n": 32 if head_dim > 128 else 64, "warps": 4, "stages": 2}
    if head_dim > 128:
        return {"block_m": 128, "block_n": 64, "warps": 8, "stages": 2}
    return {"block_m": 128, "block_n": 128, "warps": 8, "stages": 3}


def decode_config(head_dim: int, device: torch.device, room: int = 0, rings: bool = False) -> dict[str, Any]:
    """Programs of the launch, fewest pages a program, warps, pipeline depth, numbers of a head joined at once, and
    lists of up to how many a program finds its own work in (`found`): of more, a launch ahead counts the pages.

    H100, 8 lists of 4,096 tokens, 8 of 16,384 and 64 of 4,096, in us: 12.8, 30.0 and 59.0 with three programs a
    multiprocessor, 13.3, 29.6 and 58.4 with two; 14.2, 31.8 and 60.7 where launches wait for each other. A program that
    finds its own work among 2,048 lists takes 203 registers there, so that two of three run at once, and 96 where pages
    are counted ahead.

    Args:
        room: pages of lists that a launch may have to read.
        rings: whether places need no table, and the pipeline no stage for it.
    """
    small = head_dim > 128 and not hopper(device)
    most = multiprocessors(device) * 3
    return {
        "programs": most // 3 * 2 if hopper(device) and room >= 4 * most else most,
        "fewest": 1,
        "warps": 4,
        "stages": 1 if device.type == "cpu" else (2 if small else 3) - rings,
        "columns": 32,
        "found": 4 if device.type == "cpu" else 512,
        "overlap": launches_overlap(device),
    }


def backward_config(head_dim: int, itemsize: int, device: torch.device, decided: bool = False) -> dict[str, Any]:
    """Tile sizes, warps and pipeline depth of the gradient kernels.

    Where keys are `decided` on besides, four warps have no registers for heads of 128 (264 bytes a thread are spilled).
    """
    if device.type == "cpu":
        return {"block_m": 32, "block_n": 32, "warps": 4, "stages": 1}
    if itemsize > 2:
        return float32_tiles(head_dim)
    large = head_dim > 128
    return {
        "block_m": 32 if large else 64,
        "block_n": 32 if large else 64,
        "warps": 8 if decided and head_dim > 64 else 4,
        "stages": 1 if large or not hopper(device) else 2,
    }


def launches_overlap(device: torch.device) -> bool:
    """Whether a launch may take its place before the one ahead of it has ended, and then waits for it."""
    return hopper(device)
