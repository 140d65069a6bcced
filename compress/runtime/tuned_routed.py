"""Launch parameters of the kernels of heads that tokens choose; see `tuned.py`."""

from __future__ import annotations

import torch

from .tuned import hopper


def rows_block(device: torch.device) -> int:
    """Rows that one program looks through for those that are on."""
    return 64 if device.type == "cpu" else 1024  # the interpreter: small blocks, so that small inputs have several


def router_config(column_bytes: int, few: bool, device: torch.device) -> dict[str, int]:
    """Numbers of a token's input that meet the router's weights at once, and how many such blocks are on their way.

    Args:
        column_bytes: bytes of the weights of one such number.
        few: whether every token has a program of its own, which then waits for nothing but the weights.
    """
    if device.type == "cpu":  # the interpreter: small blocks, so that small inputs have several
        return {"block": 16, "stages": 1}
    if not few:
        return {"block": 64, "stages": 2}
    block = max(64, min(1024, 2 ** (15 - (column_bytes - 1).bit_length())))  # 32 KiB
    return {"block": block, "stages": 3 if hopper(device) else 1}
