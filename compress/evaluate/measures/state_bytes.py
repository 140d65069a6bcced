"""Bytes of the states that a plan keeps, and the length from which it holds fewer bytes than full attention."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from compress.bench.file import MOST_TOKENS
from compress.evaluate.cell import Cell
from compress.evaluate.measure import Job, Measure, Result, Setting, Subject
from compress.plan.states import pays_from
from compress.registry import measures
from compress.runtime.span import PAGE


class StateBytesResult(Result):
    """Without numbers where no plan is known, or it has no states.

    Attributes:
        state: bytes of one sequence at every length; they are a part of its `KV bytes`.
        pays_from: tokens; None where the plan never holds fewer bytes than full attention.
    """

    measure: Literal["state_bytes"] = "state_bytes"
    state: int = Field(default=0, ge=0)
    pays_from: int | None = Field(default=None, ge=1, le=MOST_TOKENS)

    def cells(self) -> list[Cell]:
        """Both, as costs."""
        if not self.state:
            return []
        cells = [Cell("bytes of states", "bytes", self.state, "lower", table="cost")]
        if self.pays_from is not None:
            cells.append(Cell("fewer bytes than dense from", "tokens", self.pays_from, "lower", table="cost"))
        return cells


@measures.register("state_bytes")
class StateBytes(Measure):
    """Bytes of states of constant size, and the length from which they pay."""

    result: ClassVar[type[Result]] = StateBytesResult
    always: ClassVar[bool] = True

    def jobs(self, setting: Setting) -> list[Job]:

        def found(subject: Subject, step: object) -> Result:
            cost, dense = subject.variant.cost, subject.beside.cost
            if cost is None or dense is None or not cost(PAGE).state_bytes:
                return StateBytesResult()
            return StateBytesResult(
                state=cost(PAGE).state_bytes,
                pays_from=pays_from(lambda length: cost(length).held_bytes, lambda length: dense(length).held_bytes),
            )

        return [Job("state bytes", ["state_bytes"], 0, found, kept=False)]
