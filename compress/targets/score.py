"""The score target: a span of keys whose weights are another function of the scores than the softmax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from compress.limits import LONGEST
from compress.registry import Method, targets
from compress.runtime.span import NO_END, Span
from compress.targets.cost import Cost
from compress.targets.span import SpanTarget, representable
from compress.targets.target import StockForm, Target
from compress.targets.unit import Unit

if TYPE_CHECKING:
    from compress.runtime.families import Family

Name = Literal["sigmoid", "ssmax", "lssa", "lssar"]
WORDS = {"sigmoid": "sigmoid scores", "ssmax": "SSMax scores", "lssa": "LSSA scores", "lssar": "LSSAR scores"}
RULES = {
    "sigmoid": "its scores s become the weights 1 / (1 + exp(log n - b - s)), which need not add up to 1 (arXiv "
    "2409.04431); n is the number of keys that the row sees, or one length for all rows",
    "ssmax": "its scores are multiplied by log n / log N before the softmax, with n the number of keys that the row "
    "sees and N the reference length (arXiv 2501.19399)",
    "lssa": "its scores are log D x log n x the cosine of query and key, and its weights their softplus over the sum "
    "of the row (arXiv 2501.13428)",
    "lssar": "its weights are those of LSSA, a: relu(n a - 1)^p over the sum of the row (arXiv 2501.13428)",
}


class ScoreGrid(Method):
    """The scores to choose from, all over every earlier key."""

    scores: tuple[Name, ...] = Field(("ssmax",), min_length=1, description="names of score functions")
    reference: int | None = Field(
        None, ge=2, le=LONGEST, description="length at which SSMax changes nothing; null is the shortest priced one"
    )


@targets.register("score")
class ScoreGroup(SpanTarget):
    """Weights keys of a span by a sigmoid, SSMax, LSSA or LSSAR in place of the softmax (arXiv 2409.04431, 2501.19399,
    2501.13428).

    SSMax is the head as it was at its reference length. A sigmoid starts far off and recovers when all weights train;
    LSSA and LSSAR drop the norms of queries and keys, which a pretrained head uses, so they need training from scratch
    or nearly so.
    """

    runtime: ClassVar[str | None] = "compress.runtime.mixer_score"
    noun: ClassVar[str] = "another score function"
    grid: ClassVar[type[Method] | None] = ScoreGrid
    objective: ClassVar[str | None] = "transfer"
    untrained: ClassVar[bool] = True

    target: Literal["score"] = "score"
    score: Name = Field(description="how scores become weights")
    bias: Literal["position", "constant"] = Field(
        "position",
        description="what a sigmoid starts from: -log of the keys that a row sees, or -log of `reference` in every row",
    )
    power: int = Field(15, ge=1, le=64, description="p of LSSAR: 3 was best up to 1K tokens, 15 from 8K on")
    reference: int | None = Field(
        None,
        ge=2,
        le=LONGEST,
        description="length in tokens at which SSMax is the head as it was, or of a constant bias; no other needs it",
    )
    sink: int = Field(0, ge=0, lt=NO_END, description="tokens at the start that stay visible")
    alpha: int = Field(0, gt=-NO_END, lt=NO_END, description="fixed part of the window, tokens")
    beta: float = Field(
        1.0, ge=0, le=1, description="share of the position added to the window, a multiple of 1/1024; 1 is all keys"
    )

    _representable = field_validator("beta")(representable)

    @model_validator(mode="after")
    def _check_reference(self) -> Self:
        needed = self.score == "ssmax" or (self.score == "sigmoid" and self.bias == "constant")
        if needed and self.reference is None:
            raise ValueError(f"reference: {WORDS[self.score]} of this kind need a length in tokens")
        return self

    @classmethod
    def refusal(cls, family: Family) -> str | None:
        """What a family's layers do with their scores already."""
        return family.scores

    @classmethod
    def options(cls, unit: Unit, lengths: Sequence[int], grid: ScoreGrid | None = None) -> list[Target]:
        """Every score of the grid over all earlier keys; none in a layer that slides by itself."""
        if unit.native is not None:
            return []
        choice = grid or ScoreGrid()
        return [cls(score=name, reference=choice.reference or min(lengths)) for name in choice.scores]

    def span(self, native: int | None = None) -> Span:
        """The span beside the score."""
        return Span(self.sink, self.alpha, self.beta)

    def cost(self, unit: Unit, length: int) -> Cost:
        """As of a window, with the temperatures and biases of its query heads among the parameters."""
        cost = super().cost(unit, length)
        own = unit.query_heads * (2 if self.score == "sigmoid" else 1)
        return replace(cost, parameters=cost.parameters + own) if unit.parameters else cost

    def words(self, native: int | None = None) -> str:
        return f"{WORDS[self.score]}, {super().words(native)}"

    def short(self, native: int | None = None) -> str:
        return f"{self.score} {super().short(native)}"

    def rule_text(self) -> str:
        return f"{super().rule_text()} {RULES[self.score][0].upper()}{RULES[self.score][1:]}."

    def stock(self, native: int | None) -> StockForm | None:
        """None: no stock architecture here has such scores."""
        return None
