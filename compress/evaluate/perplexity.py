"""Perplexity on held-out text by sliding window, in all and by position in the window."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, computed_field, field_validator

from compress.bench.file import MOST_TOKENS
from compress.data.text import EmbeddedText, TextSource
from compress.errors import NotFiniteError, UserError
from compress.limits import LONGEST, STEPS
from compress.registry import Method

SLICE = 256  # rows of logits in memory at once
FIRST_EDGE = 256


class PerplexityRequest(Method):
    """What to measure perplexity on. The evaluation part of the text is used, which calibration never sees."""

    text: TextSource = Field(EmbeddedText(), description="where the text comes from")
    length: int = Field(ge=2, le=LONGEST, description="tokens in a window")
    windows: int = Field(4, ge=1, le=STEPS, description="number of windows")
    stride: int | None = Field(
        None,
        ge=1,
        le=LONGEST,
        description="tokens from one window to the next; by default the length, so that none overlap",
    )

    @field_validator("stride")
    @classmethod
    def _no_gaps(cls, stride: int | None, info: ValidationInfo) -> int | None:
        length = info.data.get("length")
        if stride is not None and length is not None and stride > length:
            raise ValueError(f"expected at most the length {length}, or text between two windows is left out")
        return stride

    @property
    def step(self) -> int:
        """Tokens from one window to the next."""
        return self.length if self.stride is None else self.stride

    @property
    def tokens(self) -> int:
        """Tokens of the text that the windows cover."""
        return self.length + (self.windows - 1) * self.step


def _exp(nats: float) -> float:
    """e to a power; infinity where that is too large for a number."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


class Bucket(BaseModel):
    """Tokens at positions [start, end) of their window; `nll` is the sum of -ln p over them, in nats."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    start: int = Field(ge=0)
    end: int = Field(ge=1)
    tokens: int = Field(ge=1)
    nll: float

    @computed_field  # type: ignore[prop-decorator]
    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood of a token."""
        return _exp(self.nll / self.tokens)


class PerplexityResult(BaseModel):
    """Perplexity of one model.

    Attributes:
        tokens: tokens that were scored; each weighs the same.
        nll: sum of -ln p over them, nats.
        window_nll: the same per window, for paired comparisons.
        buckets: by position in the window; positions at which no token was scored are left out.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    length: int = Field(ge=1, le=MOST_TOKENS)
    stride: int = Field(ge=1)
    windows: int = Field(ge=1)
    tokens: int = Field(ge=1)
    nll: float
    window_nll: list[float]
    buckets: list[Bucket]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood of a token."""
        return _exp(self.nll / self.tokens)


def bucket_edges(length: int) -> list[int]:
    """0, 256, 512, 1024, ... up to the length."""
    edges = [0, FIRST_EDGE]
    while edges[-1] < length:
        edges.append(edges[-1] * 2)
    return [*[edge for edge in edges if edge < length], length]


def check_request(request: PerplexityRequest, available: int, context: int | None) -> None:
    """Check a request against the text and the model.

    Raises:
        UserError: the text has too few tokens, or a window is longer than the model's context.
    """
    needed = request.tokens
    where = f"perplexity {request.length}"
    if context is not None and request.length > context:
        raise UserError(
            "the windows are longer than the model's context",
            where=where,
            expected=f"length of at most {context} tokens",
            found=f"{request.length} tokens",
        )
    if needed > available:
        raise UserError(
            "the text is too short",
            where=where,
            expected=f"at least {needed} tokens in the evaluation part of the text",
            found=f"{available} tokens",
            fix="ask for fewer or shorter windows, or give a longer text",
        )


@torch.inference_mode()
def perplexity(
    model: Any,
    text: Sequence[int],
    request: PerplexityRequest,
    *,
    edges: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """Perplexity over `request.windows` windows, each `request.step` tokens behind the one before.

    Every token is scored once: a window scores the tokens that no window before it has scored, except that its very
    first token has no context and is left out. Sums are float64; logits exist for 256 positions at a time.

    Args:
        text: token ids of the evaluation part.
        edges: bucket edges in tokens, ascending from 0; by default 0, 256, 512, 1024, ... and the length.
        progress: called with (windows done, windows in all).

    Raises:
        UserError: the request does not fit the text or the model's context.
        NotFiniteError: a log-likelihood is not finite.
    """
    check_request(request, len(text), getattr(model.config, "max_position_embeddings", None))
    edges = list(edges) if edges is not None else bucket_edges(request.length)
    device = next(model.parameters()).device
    per_position = torch.zeros(request.length, dtype=torch.float64)
    counts = torch.zeros(request.length, dtype=torch.long)
    window_nll = []
    for number in range(request.windows):
        start = number * request.step
        tokens = torch.tensor(list(text[start : start + request.length]), device=device)
        first = 1 if number == 0 else max(1, request.length - request.step)
        losses = _losses(model, tokens, first)
        if not bool(torch.isfinite(losses).all()):
            raise NotFiniteError("the log-likelihood of a token is not finite", f"window {number}")
        per_position[first:] += losses
        counts[first:] += 1
        window_nll.append(float(losses.sum()))
        if progress is not None:
            progress(number + 1, request.windows)
    buckets = [
        Bucket(start=low, end=high, tokens=int(counts[low:high].sum()), nll=float(per_position[low:high].sum()))
        for low, high in pairwise(edges)
        if int(counts[low:high].sum())
    ]
    return PerplexityResult(
        length=request.length,
        stride=request.step,
        windows=request.windows,
        tokens=int(counts.sum()),
        nll=float(per_position.sum()),
        window_nll=window_nll,
        buckets=buckets,
    )


def _losses(model: Any, tokens: torch.Tensor, first: int) -> torch.Tensor:
    """-ln p of tokens[first:] given all tokens before each, float64 `[N - first]` on the CPU."""
    hidden = model.get_decoder()(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
    head = model.get_output_embeddings()
    parts = []
    for start in range(first - 1, len(tokens) - 1, SLICE):
        end = min(start + SLICE, len(tokens) - 1)
        logits = head(hidden[start:end]).float()
        parts.append(torch.nn.functional.cross_entropy(logits, tokens[start + 1 : end + 1], reduction="none").cpu())
    return torch.cat(parts).double()
