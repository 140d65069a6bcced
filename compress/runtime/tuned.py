"""Launch parameters of the Triton kernels, measured on the GPUs named here; others take what surely fits."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch


@lru_cache
def _hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 5


def _float32_tiles(head_dim: int) -> dict[str, int]:
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
        return _float32_tiles(head_dim)
    if not _hopper(device):
        return {"block_m": 64, "block_n": 32 if head_dim > 128 else 64, "warps": 4, "stages": 2}
    if head_dim > 128:
        return {"block_m": 128, "block_n": 64, "warps": 8, "stages": 2}
    return {"block_m": 128, "block_n": 128, "warps": 8, "stages": 3}


def rows_block(device: torch.device) -> int:
    """Rows that one program looks through for those that are on."""
    return 64 if device.type == "cpu" else 1024  # the interpreter: small blocks, so that small inputs have several


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
    return {"block": block, "stages": 3 if _hopper(device) else 1}


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
    small = head_dim > 128 and not _hopper(device)
    most = _multiprocessors(device) * 3
    return {
        "programs": most // 3 * 2 if _hopper(device) and room >= 4 * most else most,
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
        return _float32_tiles(head_dim)
    large = head_dim > 128
    return {
        "block_m": 32 if large else 64,
        "block_n": 32 if large else 64,
        "warps": 8 if decided and head_dim > 64 else 4,
        "stages": 1 if large or not _hopper(device) else 2,
    }


def retain_training_config(head_dim: int, itemsize: int, device: torch.device) -> dict[str, int]:
    """Tile sizes, warps and pipeline depth of the forward pass that trains what `retain` heads keep; not tuned."""
    if device.type != "cpu" and itemsize > 2:
        return _float32_tiles(head_dim)
    if head_dim > 128 or not _hopper(device):
        return {"block_m": 32, "block_n": 32, "warps": 4, "stages": 1}
    return {"block_m": 128, "block_n": 64, "warps": 8, "stages": 2}


_LINEAR = ("scan", "scan_few", "sums", "query_sums", "read", "read_sum", "queries", "keys")
_DELTA = ("writes", "delta", "delta_back", "inside")


def linear_config(itemsize: int, device: torch.device) -> dict[str, dict[str, int]]:
    """Of the kernels of linear heads, by name: features, values and heads at once, warps, pipeline depth.

    Some also limit their `registers`, so that more of them run side by side.
    """
    if device.type == "cpu":  # the interpreter: small blocks, so that small inputs have several
        small = {"features": 32, "values": 32, "heads": 2, "warps": 4, "stages": 1}
        return dict.fromkeys((*_LINEAR, *_DELTA), small)
    if itemsize > 2 or not _hopper(device):
        small = {"features": 64, "values": 64, "heads": 1, "warps": 4, "stages": 1}
        return dict.fromkeys(_LINEAR, small) | {name: {**small, "features": 32, "values": 16} for name in _DELTA}
    return {
        "scan": {"features": 64, "values": 64, "heads": 1, "warps": 4, "stages": 3},
        "scan_few": {"features": 64, "values": 64, "heads": 1, "warps": 4, "stages": 4},
        "sums": {"features": 64, "values": 128, "heads": 1, "warps": 4, "stages": 1},
        "query_sums": {"features": 128, "values": 128, "heads": 1, "warps": 8, "stages": 2},
        "read": {"features": 64, "values": 128, "heads": 1, "warps": 16, "stages": 3, "registers": 128},
        "read_sum": {"features": 64, "values": 128, "heads": 1, "warps": 16, "stages": 2, "registers": 128},
        "queries": {"features": 128, "values": 64, "heads": 1, "warps": 16, "stages": 1, "registers": 128},
        "keys": {"features": 128, "values": 64, "heads": 1, "warps": 16, "stages": 1, "registers": 128},
        "writes": {"features": 64, "values": 64, "heads": 1, "warps": 4, "stages": 1, "registers": 168},
        "delta": {"features": 256, "values": 32, "heads": 1, "warps": 4, "stages": 3},
        "delta_back": {"features": 256, "values": 32, "heads": 1, "warps": 4, "stages": 2},
        "inside": {"features": 64, "values": 256, "heads": 1, "warps": 8, "stages": 1},
    }


def linear_inside(numbers: int, decays: bool, device: torch.device) -> bool:
    """Whether one launch computes the delta rule's gradients inside chunks; else plain PyTorch does.

    H100, 8,192 tokens, 32 heads of 128 with decays, forward and backward: 3.8 ms, and 15.8 in plain PyTorch with older
    kernels around it. The launch agreed with float64 there for keys and values of 64 and 128 numbers with decays; for
    256 without decays the gradients ended at an illegal memory access. Neither its cause nor whether it was this launch
    is known, so nothing but the former is launched.

    Args:
        numbers: of a key or a value, whichever has more.
        decays: whether the rule has decays.
    """
    return device.type == "cpu" or (numbers <= 128 and decays)


def linear_features_config(width: int, device: torch.device, both: bool = False) -> dict[str, int]:
    """Tokens and warps of a program that computes features of so many projected numbers.

    Of queries or keys as it comes (`both`), it would take more registers than either at up to 64 numbers.
    """
    if both and _hopper(device) and width <= 64:
        return {"tokens": 64, "warps": 4, "registers": 96}
    if _hopper(device) and 64 < width <= 128:
        return {"tokens": 64, "warps": 4, "registers": 168}
    return {"tokens": 64, "warps": 8 if width > 128 else 4}


def linear_scans(blocks: int, device: torch.device) -> bool:
    """Whether so many blocks of states that walk along the keys fill a GPU; else segments are summed by themselves.

    H100, bfloat16, 32,768 tokens, 64 blocks: .22 ms, and by sums .34; the former takes as long with fewer blocks.
    """
    return blocks * 5 >= _multiprocessors(device) * 2


def linear_few(programs: int, device: torch.device) -> bool:
    """Whether each of so many programs has a processor of a GPU for itself, which then takes a longer pipeline."""
    return programs <= _multiprocessors(device)


def linear_decode_config(share: int, features: int, device: torch.device) -> dict[str, Any]:
    """How one token reads a state of so many features, for query heads of a group.

    Whether heads are columns of a product (`dot`), in blocks of `features`, or follow each other, in blocks of all
    features; numbers of a block, features that follow each other in a thread's neighbours (`piece`), warps, blocks on
    their way, and bytes that are fetched while the launch ahead still runs, for as many programs as have room at once.

    H100, 64 MiB, part of a copy's bandwidth, by products and one after the other: one head of 128 features .86 and
    .92, two of 512 .80 and .88; three .89 and .84, four of 128 .88 and .81, of 256 .87 and .79; by products alone eight
    .84 and sixteen .77. At 256 MiB .83 to .99.
    """
    if device.type == "cpu":  # the interpreter: small blocks, so that small inputs have several
        return {"dot": share > 2, "features": 16, "numbers": 256, "piece": 32, "warps": 4, "stages": 1, "ahead": 0}
    ahead = (192 << 10) * _multiprocessors(device) if launches_overlap(device) else 0
    if share <= 2:
        options = {"dot": False, "features": 0, "numbers": 2048, "piece": 32, "warps": 1, "stages": 1}
    else:
        # Four warps take products of more than eight heads as one, with so many registers that few programs fit.
        numbers, warps = (4096, 4) if share <= 8 else (2048, 2)
        options = {"dot": True, "features": 64, "numbers": numbers, "piece": 0, "warps": warps, "stages": 5}
    return options | {"ahead": ahead}


def linear_absorb_config(width: int, split: bool, device: torch.device) -> dict[str, int]:
    """Warps and registers of a program that takes a page into a state, for so many projected numbers of a key.

    In bfloat16 (`split`) 128 numbers would take 134 registers a thread, and with 128 there is room for two programs.
    """
    if not split or device.type == "cpu" or width <= 64:
        return {"warps": 8 if width > 64 else 4}
    return {"warps": 8, "registers": 128} if width <= 128 else {"warps": 16}


def launches_overlap(device: torch.device) -> bool:
    """Whether a launch may take its place before the one ahead of it has ended, and then waits for it."""
    return _hopper(device)
