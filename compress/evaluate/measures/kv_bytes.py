"""Bytes of KV cache of one sequence, pages and states, as the plan predicts them and the runtime allocates them."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from compress.bench.file import Bytes, Tokens
from compress.evaluate.cell import Cell
from compress.evaluate.measure import Job, Measure, Result, Setting, Subject
from compress.registry import measures


class KvBytesResult(Result):
    """Bytes by length in tokens; empty where no plan is known."""

    measure: Literal["kv_bytes"] = "kv_bytes"
    held: dict[Tokens, Bytes] = Field(default_factory=dict)

    def cells(self) -> list[Cell]:
        """One a length."""
        return [
            Cell(
                "KV bytes",
                "bytes",
                held,
                "lower",
                length=length,
                table="summary",
                axis="share of the dense KV bytes",
            )
            for length, held in sorted(self.held.items())
        ]


@measures.register("kv_bytes")
class KvBytes(Measure):
    """Bytes of KV cache at every length that something is measured at."""

    result: ClassVar[type[Result]] = KvBytesResult
    always: ClassVar[bool] = True

    def jobs(self, setting: Setting) -> list[Job]:

        def held(subject: Subject, step: object) -> Result:
            cost = subject.variant.cost
            return KvBytesResult(
                held={} if cost is None else {length: cost(length).held_bytes for length in setting.lengths}
            )

        return [Job("KV bytes", ["kv_bytes"], 0, held, kept=False)]
