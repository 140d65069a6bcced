"""The expert target: a head group of one of several models in a layer, whose outputs a router mixes by soft gates."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.registry import targets
from compress.runtime.span import AnySpan, own_span
from compress.targets.span import SpanTarget
from compress.targets.target import StockForm

if TYPE_CHECKING:
    from compress.runtime.families import Family

MOST_EXPERTS = 64


@targets.register("expert")
class ExpertGroup(SpanTarget):
    """Sees every earlier key, and is multiplied by its expert's gate, one for each token (BAM, arXiv 2408.08274).

    The gates of a layer are a softmax over its experts. `compress upcycle` makes such groups of several models.
    """

    runtime: ClassVar[str | None] = "compress.runtime.mixer_expert"
    noun: ClassVar[str] = "an expert's attention"
    as_built: ClassVar[bool] = True
    by_layer: ClassVar[bool] = True

    target: Literal["expert"] = "expert"
    experts: int = Field(ge=2, le=MOST_EXPERTS, description="experts of the layer")
    expert: int | None = Field(
        None,
        ge=0,
        description="the expert that the group is of; null where all share its key and value: then each has an equal "
        "part of the group's query heads",
    )

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.expert is not None and self.expert >= self.experts:
            raise ValueError(f"expert: expected a number below {self.experts}, got {self.expert}")
        return self

    @classmethod
    def refusal(cls, family: Family) -> str | None:
        """What keeps a family's heads and MLPs from lying side by side."""
        return "its layers have experts already" if family.has_experts else family.why_whole

    def span(self, native: int | None = None) -> AnySpan:
        """All keys, or those of the layer's own window."""
        return own_span(native)

    def words(self, native: int | None = None) -> str:
        of = "keys and values of all" if self.expert is None else f"expert {self.expert} of"
        return f"{of} {self.experts}{' experts' if self.expert is None else ''}, {super().words(native)}"

    def short(self, native: int | None = None) -> str:
        return f"of {self.experts}" if self.expert is None else f"{self.expert} of {self.experts}"

    def rule_text(self) -> str:
        return (
            "every token's output of an expert's query heads is multiplied by that expert's gate, a softmax over the "
            "experts of the layer that a linear router computes from the attention's input; all experts always run."
        )

    def stock(self, native: int | None) -> StockForm | None:
        """None: no stock architecture has gates on its heads."""
        return None
