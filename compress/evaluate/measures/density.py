"""How dense the attention of a plan is: pairs of query and key in a prefill, keys of a decode step.

One minus these are the prefill and decode sparsity of Sparse Frontier (arXiv 2504.17768), which counts whole blocks.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from compress.bench.file import Tokens
from compress.evaluate.cell import Cell
from compress.evaluate.measure import Job, Measure, Result, Setting, Subject
from compress.registry import measures


class LengthDensity(BaseModel):
    """Shares of the dense model's pairs and keys at one length, every query head counted; removed heads have none."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    prefill: float = Field(ge=0)
    decode: float = Field(ge=0)


class DensityResult(Result):
    """Densities by length in tokens; empty where no plan is known."""

    measure: Literal["density"] = "density"
    densities: dict[Tokens, LengthDensity] = Field(default_factory=dict)

    def cells(self) -> list[Cell]:
        """Prefill and decode, for charts and files."""
        rows = (
            ("prefill pairs", "prefill", "share of the dense prefill's pairs of query and key"),
            ("decode keys", "decode", ""),
        )
        return [
            Cell(label, "share", getattr(density, name), "lower", length=length, dense=1.0, axis=axis)
            for length, density in sorted(self.densities.items())
            for label, name, axis in rows
        ]


@measures.register("density")
class Density(Measure):
    """Density of prefill and decode at every length that something is measured at."""

    result: ClassVar[type[Result]] = DensityResult
    always: ClassVar[bool] = True

    def jobs(self, setting: Setting) -> list[Job]:
        """One job, which needs no model."""

        def densities(subject: Subject, step: object) -> Result:
            cost, dense = subject.variant.cost, subject.beside.cost
            if cost is None or dense is None:
                return DensityResult()
            return DensityResult(
                densities={
                    length: LengthDensity(
                        prefill=cost(length).flops / dense(length).flops, decode=cost(length).keys / dense(length).keys
                    )
                    for length in setting.lengths
                }
            )

        return [Job("density", ["density"], 0, densities, kept=False)]
