"""`bench.json` as others read it: the report shows it, the search takes its whole-model rows as a cost table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from compress.json_file import read_model

MOST_TOKENS, MOST_BYTES = 10_000_000, 1 << 60
Count = Annotated[int, Field(ge=1, le=1 << 40)]
Tokens = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
Bytes = Annotated[int, Field(ge=1, le=MOST_BYTES)]
Milliseconds = Annotated[float, Field(ge=1e-6, le=1e9)]  # to eleven days: beyond, times no longer add up
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Part(BaseModel):
    """Fields beyond those that are read are left alone: a bench writes many more."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Clock(_Part):
    """Median milliseconds."""

    median: Milliseconds


class SideFigures(_Part):
    """One model of a row: bytes of its cache, and the time of a decode step."""

    cache_bytes: Bytes
    decode: Clock


class WholeModel(_Part):
    """One row of whole models.

    Attributes:
        parameters, dense_parameters, prefill_speedup, most_any_plan_gains: None in a row that does not say.
        prefill_speedup_of_choosing, decode_speedup_of_choosing: the time with all heads on over that with those that
            tokens choose; None where they choose none.
    """

    shape: str
    mix: str = ""
    batch: Count
    length: Tokens
    dense: SideFigures
    plan: SideFigures
    without_attention: Clock
    parameters: Count | None = None
    dense_parameters: Count | None = None
    prefill_speedup: Positive | None = None
    most_any_plan_gains: Positive | None = None
    prefill_speedup_of_choosing: Positive | None = None
    decode_speedup_of_choosing: Positive | None = None


class Kernel(_Part):
    """One row of attention alone.

    Attributes:
        plan, all_on: the time of the plan, and with all heads on where tokens choose them; None in a row without.
        fraction: of the work of dense attention; see `bench.kernel.Row`.
        kept_bytes: None of a prefill.
    """

    what: str
    mix: str
    batch: Count
    length: Tokens
    speedup: Positive
    plan: Clock | None = None
    all_on: Clock | None = None
    fraction: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    kept_bytes: int | None = None


class Gpu(_Part):
    """A GPU that was there."""

    name: str


class Machine(BaseModel):
    """The environment, of which the GPUs matter; all else is shown as it is."""

    model_config = ConfigDict(extra="allow", frozen=True)

    gpus: list[Gpu]


class BenchFile(_Part):
    """The parts of `bench.json` that are read.

    Attributes:
        break_even: tokens by what was measured; None where it was not reached.
        copy_bytes_per_s, kernel, break_even: of a file made by hand for its whole models only, nothing.
    """

    dtype: Literal["bfloat16", "float16", "float32"]
    environment: Machine
    random_weights: bool = False
    copy_bytes_per_s: Positive | None = None
    kernel: list[Kernel] = []
    model_rows: list[WholeModel]
    break_even: dict[str, Tokens | None] = {}

    @property
    def machine(self) -> str:
        """The device in words."""
        return self.environment.gpus[0].name if self.environment.gpus else "a CPU"

    def shown_environment(self) -> dict[str, Any]:
        """The environment as it was written."""
        return self.environment.model_dump(mode="json")


def read_bench(path: Path, what: str = "the bench", *, fix: str | None = None) -> BenchFile:
    """Read what `compress bench --out` wrote.

    Raises:
        UserError: the file is missing or damaged; all problems at once.
    """
    return read_model(BenchFile, path, what, fix=fix)
