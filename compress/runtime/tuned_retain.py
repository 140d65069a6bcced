"""Launch parameters of the kernels of heads that keep tokens, measured on the GPUs named here; see `tuned.py`."""

from __future__ import annotations

import torch

from .tuned import float32_tiles, hopper


def flag_pages(device: torch.device) -> int:
    """Pages of 64 tokens whose flags one program counts at once."""
    return 2 if device.type == "cpu" else 128  # the interpreter: small blocks, so that small inputs have several


def scorer_config(width: int, itemsize: int, device: torch.device) -> dict[str, int]:
    """Tokens at once, groups at once where the scorer has hidden units, numbers of the input at once, warps, depth.

    Groups are a power of two. H100, `ridge`, inputs of 4,096 numbers, 8,192 and 65,536 tokens, in us: 50.3 and 282.6;
    64 tokens and 128 numbers with 4 warps 54.7 and 302.5, 32 tokens 51.2 and 286.5.
    """
    if device.type == "cpu":  # the interpreter: small blocks, so that small inputs have several
        return {"tokens": 64, "groups": 1, "block": 16, "warps": 4, "stages": 1}
    if itemsize > 2:
        return {"tokens": 32, "groups": 1, "block": 32, "warps": 4, "stages": 2}
    if width:
        groups = max(1, min(4, 2 ** (256 // width).bit_length() // 2))  # up to 256 hidden units
        return {"tokens": 128, "groups": groups, "block": 64, "warps": 8, "stages": 3}
    return {"tokens": 128, "groups": 1, "block": 64, "warps": 8, "stages": 4}


def keep_block(device: torch.device) -> int:
    """Tokens of one program that counts those that are kept.

    H100, 8,192 and 65,536 tokens, in us: 5.5 and 8.2; 1,024 tokens 6.0 and 9.1, 2,048 tokens 8.1 and 11.3.
    """
    return 32 if device.type == "cpu" else 512  # the interpreter: small blocks, so that small inputs have several


def judge_config(size: int, device: torch.device) -> dict[str, int]:
    """Numbers of a layer's input of `size` that one program takes at once where it judges one token, and warps.

    Of hidden units a program takes so many, and so many numbers of their weights at once (`columns`).
    """
    if device.type == "cpu":
        return {"block": 16, "units": 16, "columns": 16, "warps": 4}
    whole = 2 ** (max(size, 1) - 1).bit_length()
    return {"block": max(128, min(2048, whole)), "units": 4, "columns": max(128, min(4096, whole)), "warps": 8}


def retain_training_config(head_dim: int, itemsize: int, device: torch.device) -> dict[str, int]:
    """Tile sizes, warps and pipeline depth of the forward pass that trains what `retain` heads keep; not tuned."""
    if device.type != "cpu" and itemsize > 2:
        return float32_tiles(head_dim)
    if head_dim > 128 or not hopper(device):
        return {"block_m": 32, "block_n": 32, "warps": 4, "stages": 1}
    return {"block_m": 128, "block_n": 64, "warps": 8, "stages": 2}
