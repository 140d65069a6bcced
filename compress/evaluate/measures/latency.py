"""Time of a prefill and of a decode step of a model, beside the dense one in the same process."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from compress.bench.measure import release
from compress.bench.model import Side, side
from compress.errors import UserError
from compress.evaluate.cell import Cell
from compress.evaluate.device import device_name
from compress.evaluate.measure import Inputs, Job, Measure, Result, Setting, Step, Subject
from compress.limits import BATCH, LONGEST
from compress.models.placement import input_device, placement_of, takes_graphs
from compress.plan import ModelShape
from compress.registry import measures


class Timing(BaseModel):
    """One model: medians in milliseconds; bytes as allocated, weights among the peak's (on a GPU only)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prefill_ms: float = Field(gt=0)
    decode_ms: float = Field(gt=0)
    cache_bytes: int = Field(ge=0)
    peak_bytes: int | None


class LatencyResult(Result):
    """A model beside the dense one, which was timed right after it.

    Attributes:
        backend: PyTorch's dense attention by what it ran for; graph: decode steps were replayed from a CUDA graph.
    """

    measure: Literal["latency"] = "latency"
    length: int = Field(ge=1)
    batch: int = Field(ge=1)
    own: Timing
    dense: Timing
    backend: dict[str, str]
    graph: bool

    def cells(self) -> list[Cell]:
        """Times of a prefill and of a decode step with the dense model's; bytes of the cache and of the peak."""
        rows: list[tuple[str, str, str, str | None]] = [
            ("prefill", "ms", "prefill_ms", "cost"),
            (f"decode step, batch {self.batch}", "ms", "decode_ms", "cost"),
            (f"KV cache as allocated, batch {self.batch}", "bytes", "cache_bytes", None),
            ("peak memory", "bytes", "peak_bytes", None),
        ]
        cells = []
        for label, unit, name, table in rows:
            mine, theirs = getattr(self.own, name), getattr(self.dense, name)
            if mine is not None and theirs is not None:
                cells.append(Cell(label, unit, mine, "lower", length=self.length, dense=theirs, table=table))
        return cells

    def words(self) -> str:
        """How it was timed, and the attention of the dense side."""
        names = ", ".join(f"{what} {name}" for what, name in sorted(self.backend.items()))
        return (
            "times are medians, their shares are of the dense model's time, which was measured right after; "
            f"dense attention: {names}" + ("; decode steps in a CUDA graph" if self.graph else "")
        )


@measures.register("latency")
class Latency(Measure):
    """Time of a prefill and a decode step, in the recipe's dtype on its device, beside the dense model's.

    The dense model runs on the fastest attention that PyTorch has there.
    """

    result: ClassVar[type[Result]] = LatencyResult

    length: int = Field(ge=2, le=LONGEST, description="tokens of each prompt")
    batch: int = Field(
        1, ge=1, le=BATCH, description="sequences of a decode step; prompts are read one after the other"
    )
    steps: int = Field(
        32, ge=16, le=LONGEST, description="decode steps behind the prompt that the cache is reserved for"
    )

    def words(self) -> str:
        return f"time at {self.length:,} tokens, batch {self.batch}"

    def inputs(self, shape: ModelShape | None = None) -> list[Inputs]:
        """Prompts and decode steps of the variant and of the dense model beside it."""
        prompts = 2 * (1 + max(3, self.batch))
        return [Inputs(self.length, prompts, self.steps * self.batch // prompts)]

    def passes(self) -> str:
        return "prefills and decode steps"

    def check(self, context: int | None) -> None:
        needed = self.length + self.steps
        if context is not None and needed > context:
            raise UserError(
                "prompt and decode steps are longer than the model's context",
                where="evaluate.latency",
                expected=f"at most {context} tokens",
                found=f"{self.length} + {self.steps}",
            )

    def jobs(self, setting: Setting) -> list[Job]:
        self.check(setting.context)
        # Of another machine or torch the times are measured again.
        device = input_device(setting.reader.loaded.model)
        machine = [device_name(device), torch.get_num_threads(), torch.__version__]
        return [Job("latency", ["latency", self.model_dump(mode="json"), machine], 1, self._measured, timed=True)]

    def _measured(self, subject: Subject, step: Step) -> Result:
        return latency(subject.model, subject.dense, self)


def latency(model: Any, dense: Any, request: Latency) -> LatencyResult:
    """Time a model, and then the dense one; where they are the same, once. Tokens do not matter, and are drawn.

    Raises:
        UserError: the dense model's layers slide over less than the prompt (see `side`).
    """
    device = input_device(dense)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(dense.config.vocab_size, (request.batch, request.length), generator=generator).to(device)
    measured = side(model, ids, request.steps, beside=dense)
    other = measured if model is dense else side(dense, ids, request.steps, beside=model)
    release(*placement_of(dense).devices)
    return LatencyResult(
        length=request.length,
        batch=request.batch,
        own=_timing(measured),
        dense=_timing(other),
        backend=other.backend,
        graph=takes_graphs(dense),
    )


def _timing(timed: Side) -> Timing:
    return Timing(
        prefill_ms=timed.prefill,
        decode_ms=timed.decode.median,
        cache_bytes=timed.cache_bytes,
        peak_bytes=timed.peak_bytes,
    )
