"""Bytes of KV cache as allocated on texts, where a plan's heads keep what a text gives them reason to.

What such a plan holds is a mean over texts (`Cost.spread_bytes`, `Cost.over_bytes`). The text of the evaluation says
what it holds there, beside what the plan expects.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from compress.bench.file import MOST_BYTES, Bytes, Tokens
from compress.evaluate.asked import read_text
from compress.evaluate.cell import Cell
from compress.evaluate.measure import Job, Measure, Result, Setting, Step, Subject
from compress.files import text_key
from compress.limits import SEQUENCES
from compress.models.cache_bytes import cache_bytes
from compress.registry import measures

TITLE = "KV bytes that texts hold, where heads keep tokens by their scores"
MEASURED = "measured mean"


class Held(BaseModel):
    """Texts of one length.

    Attributes:
        length: in tokens.
        held: bytes that the cache allocated behind each.
        expected, spread, most: the plan's mean over texts, the most that their standard deviation is, and the most that
            any text takes.
        dense: bytes of the dense model.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    length: Tokens
    held: list[Bytes] = Field(min_length=1)
    expected: Bytes
    spread: int = Field(ge=0, le=MOST_BYTES)  # 0 where the texts of the preparation were alike
    most: Bytes
    dense: Bytes

    @property
    def mean(self) -> float:
        """Of the texts."""
        return statistics.fmean(self.held)

    @property
    def deviation(self) -> float:
        """Standard deviation over the texts; 0 of a single one."""
        return statistics.pstdev(self.held)


class KvHeldResult(Result):
    """What was held on texts of each length; empty where all texts hold the same."""

    measure: Literal["kv_held"] = "kv_held"
    lengths: list[Held] = Field(default_factory=list)

    def cells(self) -> list[Cell]:
        """Mean and spread, as measured and as expected, and the bound; in a table for the longest texts alone."""
        cells = []
        for texts in self.lengths:
            count = len(texts.held)
            error = texts.deviation / math.sqrt(count - 1) if count > 1 else None
            rows: list[tuple[str, float, dict[str, Any]]] = [
                (MEASURED, texts.mean, {"error": error, "count": count}),
                ("expected mean", texts.expected, {}),
                ("measured spread", texts.deviation, {}),
                ("expected spread, at most", texts.spread, {}),
                ("any text, at most", texts.most, {}),
            ]
            about: dict[str, Any] = {"length": texts.length, "dense": float(texts.dense)}
            about["table"] = TITLE if texts is self.lengths[-1] else None
            cells += [Cell(label, "bytes", float(value), "lower", **about, **more) for label, value, more in rows]
        return cells

    def words(self) -> str:
        """How many texts, and what a spread is."""
        if not self.lengths:
            return ""
        count = len(self.lengths[-1].held)
        texts = "1 text" if count == 1 else f"{count} texts"
        return (
            f"{texts} of {self.lengths[-1].length:,} tokens from the evaluation; spread: standard deviation over texts"
        )


@measures.register("kv_held")
class KvHeld(Measure):
    """Bytes of KV cache as allocated on the evaluation's text, of plans whose heads keep tokens by their scores."""

    result: ClassVar[type[Result]] = KvHeldResult
    always: ClassVar[bool] = True

    texts: int = Field(4, ge=1, le=SEQUENCES, description="texts of each length that are read, at most")

    def jobs(self, setting: Setting) -> list[Job]:
        """One job; texts are read only where a variant holds what depends on them."""
        if not setting.varies:
            return [Job("KV bytes on texts", ["kv_held"], 0, lambda subject, step: KvHeldResult(), kept=False)]
        ids = setting.tokens(setting.text, max(setting.lengths) * self.texts)
        facts = ["kv_held", self.texts, list(setting.lengths), text_key(str(list(ids)))]
        return [Job("KV bytes on texts", facts, 0, partial(self._held, setting.lengths, ids))]

    def _held(self, lengths: Sequence[int], ids: Sequence[int], subject: Subject, step: Step) -> Result:
        cost, dense = subject.variant.cost, subject.beside.cost
        if cost is None or dense is None:
            return KvHeldResult()
        found = []
        for length in lengths:
            expected, count = cost(length), min(self.texts, len(ids) // length)
            if not count or not expected.varies:
                continue
            pieces = [ids[number * length : (number + 1) * length] for number in range(count)]
            sizes = [cache_bytes(read_text(subject.model, piece)) or 0 for piece in pieces]
            found.append(
                Held(
                    length=length,
                    held=sizes,
                    expected=expected.held_bytes,
                    spread=expected.spread_bytes,
                    most=expected.most_bytes,
                    dense=dense(length).held_bytes,
                )
            )
        return KvHeldResult(lengths=found)
