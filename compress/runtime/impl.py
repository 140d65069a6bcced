"""The implementations of attention over spans and pages, and which of them runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers.utils import logging

from .flash import refusal as flash_refusal
from .reference import decode, prefill, routed_prefill, store, store_one
from .retain_reference import decode as retain_decode
from .retain_reference import keep as retain_keep
from .retain_reference import prefill as retain_prefill
from .retain_training import prefill as retain_trained

logger = logging.get_logger(__name__)


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


@dataclass(frozen=True)
class Router:
    """How an implementation chooses units without gradients; `triton_router.py` documents the arguments.

    `routers.py` is the specification, and the implementation where this does not take the router.
    """

    takes: Callable[..., bool]
    route: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class Retain:
    """Attention over a window and a list of kept tokens; `retain_reference.py` documents the arguments.

    Attributes:
        scores: what a scorer says of tokens, as `triton_scorers.py` documents it, or None where it has no kernel.
        keep: which tokens are kept by their scores.
        take: how one token a sequence is judged and stored at once, as `triton_retain_step.py` documents it.
        compact, append: how the tokens of a pass get into the lists, as `triton_retain.py` documents them; what
            `compact` gives is an argument of `prefill`, too.
        trained: `prefill` with gradients of what is kept; `retain_training.py` documents the arguments.

    What is None is done by the scorers themselves and by `RetainState`.
    """

    prefill: Callable[..., torch.Tensor] = retain_prefill
    decode: Callable[..., torch.Tensor] = retain_decode
    keep: Callable[..., tuple[torch.Tensor, torch.Tensor]] = retain_keep
    scores: Callable[..., torch.Tensor | None] | None = None
    take: Callable[..., None] | None = None
    compact: Callable[..., Any] | None = None
    append: Callable[..., None] | None = None
    trained: Callable[..., torch.Tensor] = retain_trained


@dataclass(frozen=True)
class Impl:
    """One implementation of what a layer does; `reference.py` documents the arguments and is the specification.

    Attributes:
        linear: what it does for linear heads; None where they run in plain PyTorch.
        router: how it chooses the units of routed heads; None where plain PyTorch does.
        retain: what heads do that keep tokens beside a window.
    """

    prefill: Callable[..., torch.Tensor]
    decode: Callable[..., torch.Tensor]
    store: Callable[..., None]
    store_one: Callable[..., None]
    routed_prefill: Callable[..., torch.Tensor]
    linear: Linear | None = None
    router: Router | None = None
    retain: Retain = Retain()


IMPLS = {"reference": Impl(prefill, decode, store, store_one, routed_prefill)}


try:
    from .linear_fla import FLA
    from .linear_fla import refusal as fla_refusal
    from .triton_attention import FLASH, TRITON, refusal
    from .triton_linear_heads import LINEAR
    from .triton_retain import RETAIN
    from .triton_retain_step import take
    from .triton_retain_training import prefill as trained
    from .triton_routed import routed_prefill as skipping
    from .triton_router import ROUTER
    from .triton_scorers import keep as keep_by_scan
    from .triton_scorers import scores
except ImportError as error:  # no Triton here
    _NO_TRITON = f"Triton cannot be imported ({error})"

    def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why the kernels do not run for this device, dtype and head size; None when they do."""
        return _NO_TRITON

    def fla_refusal(device: torch.device) -> str | None:
        """Why flash-linear-attention does not run on this device; None when it does."""
        return _NO_TRITON

else:
    _RETAIN = Retain(*RETAIN[:2], keep_by_scan, scores, take, *RETAIN[2:], trained)
    IMPLS["triton"] = Impl(*TRITON, skipping, Linear(*LINEAR), Router(*ROUTER), _RETAIN)
    IMPLS["fla"] = Impl(*TRITON, skipping, Linear(*FLA), Router(*ROUTER), _RETAIN)
    IMPLS["flash"] = Impl(*FLASH, skipping, Linear(*LINEAR), Router(*ROUTER), _RETAIN)


def is_elsewhere(device: torch.device) -> bool:
    """Whether a device is a GPU other than the current one."""
    return device.type == "cuda" and device.index != torch.cuda.current_device()


def current(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which a device is the current one. Kernels run there, and the layers of a model may lie on
    several."""
    return torch.cuda.device(device) if is_elsewhere(device) else nullcontext()


def choose_impl(name: str, query: torch.Tensor) -> Impl:
    """The implementation of that name; `auto` is the fastest that runs for tensors like `query`, and says so once.

    Raises:
        ValueError: no such implementation, or one that cannot run here.
    """
    return IMPLS[explain_impl(name, query.device, query.dtype, query.shape[-1])[0]]


@lru_cache(maxsize=256)
def explain_impl(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """What `choose_impl` takes, and why in one line.

    Raises:
        ValueError: as `choose_impl`.
    """
    if name != "auto" and name not in WORDS:
        raise ValueError(f"compress_impl: expected auto, {', '.join(WORDS)}, got {name!r}")
    kernels = refusal(device, dtype, head_dim)
    four = kernels or flash_refusal(device, dtype, head_dim)
    if name == "auto":
        if device.type == "cpu":  # Triton's interpreter is for tests
            taken, why = "reference", "the model is on a CPU"
        elif kernels is not None:
            taken, why = "reference", kernels
        else:
            taken, why = ("triton", four) if four is not None else ("flash", "flash-attn-4 is installed")
    else:
        reason = {"reference": None, "triton": kernels, "fla": kernels or fla_refusal(device), "flash": four}[name]
        if reason is not None:
            raise ValueError(f"compress_impl: {name} was asked for, but {reason}; use auto or reference")
        taken, why = name, "as asked for"
    logger.info(f"attention runs in {WORDS[taken]}: {why}")
    return taken, why


WORDS = {
    "reference": "plain PyTorch",
    "triton": "Triton kernels",
    "fla": "Triton kernels, and flash-linear-attention for linear heads without a window and a normaliser",
    "flash": "Triton kernels, and FlashAttention-4 for long prompts",
}
