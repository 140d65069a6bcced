"""Time of a prefill and of a decode step of a model, beside the dense one in the same process."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from compress.bench.measure import release
from compress.bench.model import Side, side
from compress.errors import UserError
from compress.limits import BATCH, LONGEST
from compress.registry import Method


class LatencyRequest(Method):
    """What to time. Both models run in the recipe's dtype on its device, the dense one by the fastest attention."""

    length: int = Field(ge=2, le=LONGEST, description="tokens of each prompt")
    batch: int = Field(
        1, ge=1, le=BATCH, description="sequences of a decode step; prompts are read one after the other"
    )
    steps: int = Field(
        32, ge=16, le=LONGEST, description="decode steps behind the prompt that the cache is reserved for"
    )


class Timing(BaseModel):
    """One model: medians in milliseconds; bytes as allocated, weights among the peak's (on a GPU only)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prefill_ms: float = Field(gt=0)
    decode_ms: float = Field(gt=0)
    cache_bytes: int = Field(ge=0)
    peak_bytes: int | None


class LatencyResult(BaseModel):
    """A model beside the dense one, which was timed right after it.

    Attributes:
        backend: PyTorch's dense attention by what it ran for; graph: decode steps were replayed from a CUDA graph.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    length: int = Field(ge=1)
    batch: int = Field(ge=1)
    own: Timing
    dense: Timing
    backend: dict[str, str]
    graph: bool

    @property
    def prefill_share(self) -> float:
        """Of the dense model's time."""
        return self.own.prefill_ms / self.dense.prefill_ms

    @property
    def decode_share(self) -> float:
        """Of the dense model's time."""
        return self.own.decode_ms / self.dense.decode_ms


def check_latency(request: LatencyRequest, context: int | None) -> None:
    """Refuse prompts that do not fit the model.

    Raises:
        UserError: prompt and steps are longer than the context.
    """
    needed = request.length + request.steps
    if context is not None and needed > context:
        raise UserError(
            "prompt and decode steps are longer than the model's context",
            where="evaluate.latency",
            expected=f"at most {context} tokens",
            found=f"{request.length} + {request.steps}",
        )


def latency(model: Any, dense: Any, request: LatencyRequest) -> LatencyResult:
    """Time a model, and then the dense one; where they are the same, once. Tokens do not matter, and are drawn.

    Raises:
        UserError: the dense model's layers slide over less than the prompt (see `side`).
    """
    device = next(dense.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(dense.config.vocab_size, (request.batch, request.length), generator=generator).to(device)
    own = side(model, ids, request.steps, beside=dense)
    other = own if model is dense else side(dense, ids, request.steps, beside=model)
    release(device)
    return LatencyResult(
        length=request.length,
        batch=request.batch,
        own=_timing(own),
        dense=_timing(other),
        backend=other.backend,
        graph=device.type == "cuda",
    )


def _timing(found: Side) -> Timing:
    return Timing(
        prefill_ms=found.prefill,
        decode_ms=found.decode.median,
        cache_bytes=found.cache_bytes,
        peak_bytes=found.peak_bytes,
    )
