"""What the implementations do for heads that keep tokens beside a window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .impl import WITH_KERNELS
from .retain_reference import decode, keep, prefill
from .retain_training import prefill as trained


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

    prefill: Callable[..., torch.Tensor] = prefill
    decode: Callable[..., torch.Tensor] = decode
    keep: Callable[..., tuple[torch.Tensor, torch.Tensor]] = keep
    scores: Callable[..., torch.Tensor | None] | None = None
    take: Callable[..., None] | None = None
    compact: Callable[..., Any] | None = None
    append: Callable[..., None] | None = None
    trained: Callable[..., torch.Tensor] = trained


RETAIN_IMPLS = {"reference": Retain()}  # by the name of the implementation

if WITH_KERNELS:  # else these files, which import Triton, cannot be imported
    from .triton_retain import KERNELS
    from .triton_retain_step import take
    from .triton_retain_training import prefill as trained_by_kernels
    from .triton_scorers import keep as keep_by_scan
    from .triton_scorers import scores

    _BY_KERNELS = Retain(*KERNELS[:2], keep_by_scan, scores, take, *KERNELS[2:], trained_by_kernels)
    RETAIN_IMPLS |= dict.fromkeys(WITH_KERNELS, _BY_KERNELS)
