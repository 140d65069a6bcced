"""Top-1 agreement with the dense model: how often both would write the same next token, on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from compress.bench.file import MOST_TOKENS
from compress.errors import NotFiniteError
from compress.evaluate.cell import STANDARD_ERRORS, Cell
from compress.evaluate.logits import logits_in_slices
from compress.evaluate.measure import Inputs, Job, Result, Setting, Step, Subject
from compress.evaluate.text_measure import WindowsMeasure
from compress.files import text_key
from compress.limits import LONGEST
from compress.models.placement import input_device
from compress.plan import ModelShape
from compress.registry import measures
from compress.words import counted


class AgreementResult(Result):
    """Shares of positions with the same most likely token, one for each window."""

    measure: Literal["agreement"] = "agreement"
    length: int = Field(ge=1, le=MOST_TOKENS)
    shares: list[float] = Field(min_length=1)

    def cells(self) -> list[Cell]:
        """The mean over the windows, with its standard error."""
        count = len(self.shares)
        mean = sum(self.shares) / count
        error = float(torch.tensor(self.shares, dtype=torch.float64).std()) / count**0.5 if count > 1 else None
        return [
            Cell(
                "agreement",
                "agreement",
                mean,
                "higher",
                length=self.length,
                interval=None if error is None else (mean - 1.96 * error, min(1.0, mean + 1.96 * error)),
                interval_kind="" if error is None else STANDARD_ERRORS,
                error=error,
                count=count,
                items=tuple(self.shares),
                table="summary",
                note=counted(count, "window"),
            )
        ]

    def words(self) -> str:
        """What agrees, and over how much text."""
        return f"agreement: same most likely token as the dense model, {counted(len(self.shares), 'window')}"


@measures.register("agreement")
class Agreement(WindowsMeasure):
    """Share of positions at which a variant's most likely next token is the dense model's."""

    result: ClassVar[type[Result]] = AgreementResult
    one_tokenizer: ClassVar[bool] = True

    length: int = Field(ge=2, le=LONGEST, description="tokens in a window")

    def inputs(self, shape: ModelShape | None = None) -> list[Inputs]:
        """One pass a window; the dense model's are those of its own row."""
        return [Inputs(self.length, self.windows)]

    def passes(self) -> str:
        """One forward pass a window."""
        return f"{self.windows} forward"

    def jobs(self, setting: Setting) -> list[Job]:
        """One job, on the same windows for all variants."""
        ids = self.read(setting)
        facts = ["agreement", self.model_dump(mode="json"), text_key(str(ids))]
        # What the dense model would write is found once for all variants; it takes less memory than the text.
        of_dense = cache(partial(self._choices, ids))
        return [Job("agreement", facts, self.windows, partial(self._measured, ids, of_dense))]

    @torch.inference_mode()
    def _measured(
        self, ids: Sequence[int], of_dense: Callable[[Any, int], torch.Tensor], subject: Subject, step: Step
    ) -> Result:
        shares = []
        for number in range(self.windows):
            expected = of_dense(subject.dense, number)
            found = expected if subject.model is subject.dense else self._choices(ids, subject.model, number)
            shares.append(float((found == expected).double().mean()))
            step(number + 1, self.windows)
        return AgreementResult(length=self.length, shares=shares)

    def _choices(self, ids: Sequence[int], model: Any, number: int) -> torch.Tensor:
        """A model's most likely next token at every position of a window, int32 `[N]` on the CPU."""
        window = torch.tensor(ids[number * self.length : (number + 1) * self.length])
        return _choices(model, window.to(input_device(model)))


def _choices(model: Any, window: torch.Tensor) -> torch.Tensor:
    """The most likely next token at every position of a window `[N]`, as int32 `[N]` on the CPU."""
    parts = []
    for _, logits in logits_in_slices(model, window, range(len(window))):
        if not bool(torch.isfinite(logits).all()):
            raise NotFiniteError("the model's logits are not finite")
        parts.append(logits.argmax(dim=-1).int().cpu())
    return torch.cat(parts)
