"""Perplexity on held-out text by sliding window, in all and by position in the window."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, computed_field, field_validator

from compress.bench.file import MOST_TOKENS
from compress.data.text import EmbeddedText, Source, TextSource
from compress.errors import NotFiniteError
from compress.evaluate.cell import Cell, Part
from compress.evaluate.logits import logits_in_slices
from compress.evaluate.measure import Inputs, Job, Result, Setting, Step, Subject
from compress.evaluate.text_measure import TextMeasure
from compress.files import text_key
from compress.limits import LONGEST, STEPS
from compress.models.families import context_of
from compress.models.placement import input_device
from compress.plan import ModelShape
from compress.registry import measures
from compress.words import counted

FIRST_EDGE = 256


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


class PerplexityResult(Result):
    """Perplexity of one model.

    Attributes:
        tokens: tokens that were scored; each weighs the same.
        nll: sum of -ln p over them, nats.
        window_nll: the same per window, for paired comparisons.
        buckets: by position in the window; positions at which no token was scored are left out.
    """

    measure: Literal["perplexity"] = "perplexity"
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

    def cells(self) -> list[Cell]:
        """The whole, and the ranges of positions."""
        return [
            self._cell(self.perplexity, self.windows),
            *(
                self._cell(bucket.perplexity, bucket.tokens, Part("position", bucket.start, bucket.end))
                for bucket in self.buckets
            ),
        ]

    def _cell(self, value: float, count: int, part: Part | None = None) -> Cell:
        return Cell(
            "perplexity",
            "perplexity",
            value,
            "lower",
            length=self.length,
            count=count,
            part=part,
            table="summary",
            note=self.words(),
        )

    def words(self) -> str:
        """Windows and tokens."""
        return f"perplexity: {counted(self.windows, 'window')} of {self.length:,} tokens"


def bucket_edges(length: int) -> list[int]:
    """0, 256, 512, 1024, ... up to the length."""
    edges = [0, FIRST_EDGE]
    while edges[-1] < length:
        edges.append(edges[-1] * 2)
    return [*[edge for edge in edges if edge < length], length]


@measures.register("perplexity")
class Perplexity(TextMeasure):
    """Perplexity of held-out text. The evaluation part of the text is used, which calibration never sees."""

    result: ClassVar[type[Result]] = PerplexityResult
    one_tokenizer: ClassVar[bool] = True

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

    @property
    def haystacks(self) -> Source | None:
        return self.text

    def words(self) -> str:
        return f"{counted(self.windows, 'window')} of {self.length:,} tokens"

    def inputs(self, shape: ModelShape | None = None) -> list[Inputs]:
        return [Inputs(self.length, self.windows)]

    def passes(self) -> str:
        return f"{self.windows} forward"

    def jobs(self, setting: Setting) -> list[Job]:
        ids = self.read(setting)
        facts = ["perplexity", self.model_dump(mode="json"), text_key(str(ids))]
        return [Job("perplexity", facts, self.windows, partial(self._measured, ids))]

    def _measured(self, ids: Sequence[int], subject: Subject, step: Step) -> Result:
        return perplexity(subject.model, ids, self, progress=step)


@torch.inference_mode()
def perplexity(
    model: Any,
    text: Sequence[int],
    request: Perplexity,
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
    request.check_fits(len(text), context_of(model.config))
    edges = list(edges) if edges is not None else bucket_edges(request.length)
    device = input_device(model)
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
    parts = []
    for part, logits in logits_in_slices(model, tokens, range(first - 1, len(tokens) - 1)):
        targets = tokens[part.start + 1 : part.stop + 1]
        parts.append(torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none").cpu())
    return torch.cat(parts).double()
