"""What the implementations do for heads of which every token chooses its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .impl import WITH_KERNELS
from .routed_reference import prefill


@dataclass(frozen=True)
class Router:
    """How an implementation chooses units without gradients; `triton_router.py` documents the arguments.

    `routers.py` is the specification, and the implementation where this does not take the router.
    """

    takes: Callable[..., bool]
    route: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class Routed:
    """What an implementation does for such heads.

    Attributes:
        prefill: of the heads that are on; `routed_reference.py` documents the arguments and is the specification.
        router: how it chooses; None where plain PyTorch does.
    """

    prefill: Callable[..., torch.Tensor] = prefill
    router: Router | None = None


ROUTED_IMPLS = {"reference": Routed()}  # by the name of the implementation

if WITH_KERNELS:  # else these files, which import Triton, cannot be imported
    from .triton_routed import prefill as skipping
    from .triton_router import KERNELS

    ROUTED_IMPLS |= dict.fromkeys(WITH_KERNELS, Routed(skipping, Router(*KERNELS)))
