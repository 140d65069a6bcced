"""The implementations of attention over spans and pages, and which of them runs.

What they do for one kind of heads alone is in the files of that kind, by the same names (`impl_linear.py`, ...).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers.utils import logging

from .flash import refusal as flash_refusal
from .reference import decode, prefill, store, store_one

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Impl:
    """One implementation of what all layers do; `reference.py` documents the arguments and is the specification.

    Attributes:
        name: what the tables of kinds of heads know it by, too.
    """

    name: str
    prefill: Callable[..., torch.Tensor]
    decode: Callable[..., torch.Tensor]
    store: Callable[..., None]
    store_one: Callable[..., None]


IMPLS = {"reference": Impl("reference", prefill, decode, store, store_one)}
Refusal = Callable[[torch.device], str | None]  # why something does not run on a device; None when it does


try:
    from .triton_attention import FLASH, TRITON, refusal
except ImportError as error:  # no Triton here
    _NO_TRITON = f"Triton cannot be imported ({error})"

    def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why the kernels do not run for this device, dtype and head size; None when they do."""
        return _NO_TRITON

else:
    IMPLS |= {"triton": Impl("triton", *TRITON), "fla": Impl("fla", *TRITON), "flash": Impl("flash", *FLASH)}

WITH_KERNELS = tuple(name for name in IMPLS if name != "reference")  # none where Triton is not there
_NEEDS: dict[str, list[Refusal]] = {}  # by the name of an implementation


def needs(name: str, wrong: Refusal) -> None:
    """Let an implementation be refused where `wrong` says why: a kind of heads takes more there than Triton kernels.

    The file of the kind says so, and so no checkpoint that has no such heads.
    """
    _NEEDS.setdefault(name, []).append(wrong)
    explain_impl.cache_clear()


def _lacking(name: str, device: torch.device) -> str | None:
    """What a kind of heads lacks for an implementation; None where nothing."""
    return next(filter(None, (wrong(device) for wrong in _NEEDS.get(name, ()))), None)


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
        reason = {"reference": None, "triton": kernels, "fla": kernels, "flash": four}[name] or _lacking(name, device)
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
