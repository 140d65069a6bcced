"""Launch parameters of the kernels of linear heads, measured on the GPUs named here; see `tuned.py`."""

from __future__ import annotations

from typing import Any

import torch

from .tuned import hopper, launches_overlap, multiprocessors

_LINEAR = ("scan", "scan_few", "sums", "query_sums", "read", "read_sum", "queries", "keys")
_DELTA = ("writes", "delta", "delta_back", "inside")


def linear_config(itemsize: int, device: torch.device) -> dict[str, dict[str, int]]:
    """Of the kernels of linear heads, by name: features, values and heads at once, warps, pipeline depth.

    Some also limit their `registers`, so that more of them run side by side.
    """
    if device.type == "cpu":  # the interpreter: small blocks, so that small inputs have several
        small = {"features": 32, "values": 32, "heads": 2, "warps": 4, "stages": 1}
        return dict.fromkeys((*_LINEAR, *_DELTA), small)
    if itemsize > 2 or not hopper(device):
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
    if both and hopper(device) and width <= 64:
        return {"tokens": 64, "warps": 4, "registers": 96}
    if hopper(device) and 64 < width <= 128:
        return {"tokens": 64, "warps": 4, "registers": 168}
    return {"tokens": 64, "warps": 8 if width > 128 else 4}


def linear_scans(blocks: int, device: torch.device) -> bool:
    """Whether so many blocks of states that walk along the keys fill a GPU; else segments are summed by themselves.

    H100, bfloat16, 32,768 tokens, 64 blocks: .22 ms, and by sums .34; the former takes as long with fewer blocks.
    """
    return blocks * 5 >= multiprocessors(device) * 2


def linear_few(programs: int, device: torch.device) -> bool:
    """Whether each of so many programs has a processor of a GPU for itself, which then takes a longer pipeline."""
    return programs <= multiprocessors(device)


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
    ahead = (192 << 10) * multiprocessors(device) if launches_overlap(device) else 0
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
