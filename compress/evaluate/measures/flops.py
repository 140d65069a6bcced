"""Floating-point operations of a prefill: two for every parameter of the decoder layers and token, and the attention's.

Embeddings, the output head, norms and softmax are left out, as in most published counts; of a mixture of experts every
expert is counted.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compress.bench.file import Tokens
from compress.evaluate.cell import Cell
from compress.evaluate.measure import Job, Measure, Result, Setting, Step, Subject
from compress.limits import ENTRIES, LONGEST
from compress.models.pruning import block_parameters
from compress.registry import measures


class FlopsResult(Result):
    """Operations by length in tokens; empty where no plan is known."""

    measure: Literal["flops"] = "flops"
    prefill: dict[Tokens, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)

    def cells(self) -> list[Cell]:
        """One a length."""
        return [
            Cell(
                "prefill FLOPs",
                "FLOPs",
                flops,
                "lower",
                length=length,
                table="cost",
                axis="share of the dense prefill's FLOPs",
            )
            for length, flops in sorted(self.prefill.items())
        ]

    def words(self) -> str:
        """What is counted."""
        return "FLOPs: 2 for every parameter of the layers and token, and the attention's"


@measures.register("flops")
class Flops(Measure):
    """FLOPs of a prefill."""

    result: ClassVar[type[Result]] = FlopsResult

    lengths: tuple[Annotated[int, Field(ge=1, le=LONGEST)], ...] = Field(
        (), max_length=ENTRIES, strict=False, description="tokens of the prefills; by default those of other measures"
    )

    @property
    def input_lengths(self) -> tuple[int, ...]:
        """Tokens of the prefills."""
        return self.lengths

    def words(self) -> str:
        """The lengths, where they are given."""
        return f"FLOPs at {', '.join(f'{length:,}' for length in self.lengths)} tokens" if self.lengths else "FLOPs"

    def jobs(self, setting: Setting) -> list[Job]:
        """One job, which only counts."""

        def count(subject: Subject, step: Step) -> Result:
            cost = subject.variant.cost
            if cost is None:
                return FlopsResult()
            weights = 2 * block_parameters(subject.model)
            lengths = self.lengths or setting.lengths
            return FlopsResult(prefill={length: length * weights + cost(length).flops for length in lengths})

        return [Job("FLOPs", ["flops", self.lengths or setting.lengths], 0, count, kept=False)]
