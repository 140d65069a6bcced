"""What the implementations do for linear heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .impl import WITH_KERNELS, needs


@dataclass(frozen=True)
class Linear:
    """What an implementation does for linear heads; `triton_linear_heads.py` documents the arguments.

    `linear_states.py` and the maps are the specification, and the implementation where this does not take the heads.
    """

    takes: Callable[..., bool]
    query_features: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
    pass_features: Callable[..., tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]
    read_new: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    absorb: Callable[..., bool]
    read_one: Callable[..., torch.Tensor]


LINEAR_IMPLS: dict[str, Linear] = {}  # by the name of the implementation; where it has none, plain PyTorch does all

if WITH_KERNELS:  # else these files, which import Triton, cannot be imported
    from .linear_fla import FLA, refusal
    from .triton_linear_heads import KERNELS

    LINEAR_IMPLS |= {**dict.fromkeys(WITH_KERNELS, Linear(*KERNELS)), "fla": Linear(*FLA)}
    needs("fla", refusal)
