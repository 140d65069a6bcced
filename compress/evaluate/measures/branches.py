"""Which branch of converted heads does the work: perplexity with all, with the window alone, the state alone, and none.

In published conversions the window alone is often as good as window and state together ("Untangling component
imbalance", arXiv 2510.05901): the state is dead weight, and a table of the whole model cannot show it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from compress.bench.file import MOST_TOKENS
from compress.evaluate.cell import Cell, Part
from compress.evaluate.measure import Inputs, Job, Result, Setting, Step, Subject
from compress.evaluate.measures.perplexity import Bucket, Perplexity, PerplexityResult, perplexity
from compress.evaluate.text_measure import WindowsMeasure
from compress.files import text_key
from compress.limits import LONGEST
from compress.models.branches import WORDS, Branched, branched, only
from compress.plan import ModelShape
from compress.registry import measures
from compress.runtime.mixer import Branches
from compress.words import counted

TITLE = "which branch of the converted heads does the work"
OFF: tuple[Branches, ...] = ("window", "linear", "none")


class Whole(BaseModel):
    """The model with some branches of all converted groups; sums of -ln p in nats, as of a perplexity."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    branches: Branches
    tokens: int = Field(ge=1)
    nll: float
    buckets: list[Bucket]


class Unit(BaseModel):
    """One converted group, or all of a layer: -ln p of all tokens with only some of its branches, in nats."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    layer: int = Field(ge=0)
    group: int | None = Field(ge=0)
    nll: dict[Branches, float]


class BranchesResult(Result):
    """What the branches of one model are worth; without numbers where no head has any.

    Attributes:
        dense: the dense model's sum of -ln p over the same tokens.
        whole: first with all branches.
        units: each by itself, while all other groups have all of theirs.
    """

    measure: Literal["branches"] = "branches"
    length: int = Field(ge=1, le=MOST_TOKENS)
    windows: int = Field(ge=1)
    dense: float | None = None
    whole: list[Whole] = Field(default_factory=list)
    units: list[Unit] = Field(default_factory=list)

    def cells(self) -> list[Cell]:
        """Perplexities of the model, also by position, and what each unit loses without a branch, in nats a token."""
        cells = []
        for state in self.whole:
            dense = None if self.dense is None else _perplexity(self.dense, state.tokens)
            cells.append(self._cell(state.branches, _perplexity(state.nll, state.tokens), dense))
            for bucket in state.buckets:
                part = Part("position", bucket.start, bucket.end)
                cells.append(self._cell(state.branches, bucket.perplexity, None, part))
        for unit in self.units:
            for branches, nll in unit.nll.items():
                cells.append(
                    Cell(
                        f"loss with {WORDS[branches]}",
                        "nats",
                        (nll - self.whole[0].nll) / self.whole[0].tokens,
                        "lower",
                        length=self.length,
                        place=(unit.layer, unit.group),
                    )
                )
        return cells

    def _cell(self, branches: Branches, value: float, dense: float | None, part: Part | None = None) -> Cell:
        label = f"perplexity, {WORDS[branches]}"
        return Cell(
            label,
            "perplexity",
            value,
            "lower",
            length=self.length,
            part=part,
            table=TITLE,
            dense=dense,
            note=self.words(),
        )

    def words(self) -> str:
        """What the branches are, and the windows of text."""
        return (
            f"full: all branches; window only: the softmax over the keys in sight; linear only: the state; none: the "
            f"heads give nothing; of single heads the nats a token that are lost; {counted(self.windows, 'window')} of "
            f"{self.length:,} tokens"
        )


def _perplexity(nll: float, tokens: int) -> float:
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf


@measures.register("branches")
class BranchesMeasure(WindowsMeasure):
    """Perplexity with all branches of converted heads, window alone, state alone, and none; also head by head."""

    result: ClassVar[type[Result]] = BranchesResult
    one_tokenizer: ClassVar[bool] = True

    length: int = Field(ge=2, le=LONGEST, description="tokens in a window of text")
    by: Literal["group", "layer", "model"] = Field(
        "group", description="what is switched besides all heads at once: each head group, each layer, or nothing"
    )

    def inputs(self, shape: ModelShape | None = None) -> list[Inputs]:
        """At most: as if every head group were converted, in every variant but those with the dense attention."""
        each = {"group": shape.layers * shape.kv_heads, "layer": shape.layers, "model": 0} if shape is not None else {}
        times = 1 + len(OFF) * (1 + each.get(self.by, 0))
        return [Inputs(self.length, self.windows * times, by_dense=False)]

    def passes(self) -> str:
        each = {"group": " and 3 for each converted group", "layer": " and 3 for each converted layer", "model": ""}
        return f"branches: {self.windows} forward, 4 times{each[self.by]}"

    def jobs(self, setting: Setting) -> list[Job]:
        ids = self.read(setting)
        facts = ["branches", self.model_dump(mode="json"), text_key(str(ids))]
        # The dense model reads the windows once for all variants, when the first one with branches asks for it.
        of_dense = cache(partial(self._perplexity, ids))
        return [Job("branches", facts, 1, partial(self._measured, ids, of_dense))]

    def _perplexity(self, ids: Sequence[int], model: Any) -> PerplexityResult:
        return perplexity(model, ids, Perplexity(length=self.length, windows=self.windows))

    def _units(self, places: Sequence[Branched]) -> list[tuple[list[Branched], int | None]]:
        """What is switched by itself: mixers of one layer, and the group that it is about, None for all of them."""
        if self.by == "group":
            return [([place], group) for place in places for group in sorted(place.groups)]
        layers = sorted({place.layer for place in places}) if self.by == "layer" else []
        return [([place for place in places if place.layer == layer], None) for layer in layers]

    def _measured(
        self, ids: Sequence[int], of_dense: Callable[[Any], PerplexityResult], subject: Subject, step: Step
    ) -> Result:
        model, places = subject.model, branched(subject.model)
        if not places:
            return BranchesResult(length=self.length, windows=self.windows)
        measured = partial(self._perplexity, ids)
        states: dict[Branches, PerplexityResult] = {"both": measured(model)}
        for branches in OFF:
            with only(places, branches):
                states[branches] = measured(model)
        units = []
        for together, group in self._units(places):
            nll: dict[Branches, float] = {}
            for branches in OFF:
                with only(together, branches, group):
                    nll[branches] = measured(model).nll
            units.append(Unit(layer=together[0].layer, group=group, nll=nll))
        return BranchesResult(
            length=self.length,
            windows=self.windows,
            dense=of_dense(subject.dense).nll,
            whole=[
                Whole(branches=branches, tokens=found.tokens, nll=found.nll, buckets=found.buckets)
                for branches, found in states.items()
            ],
            units=units,
        )
