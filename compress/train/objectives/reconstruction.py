"""Reconstruction: a scorer's number as the logarithm of a token's KVzip+ score, or of KVzip's."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from compress.errors import UserError
from compress.limits import DOCUMENTS, ENTRIES, FACTOR, LONGEST
from compress.models.reconstruction import CHUNK, Score
from compress.registry import objectives
from compress.train.objectives.objective import Inputs, Objective


@objectives.register("reconstruction")
class Reconstruction(Objective):
    """Squared error of scores on the logarithms of KVzip+ scores, which the dense model gives where it repeats a text
    (KVzap, arXiv 2601.07891), or on those of KVzip's."""

    lengths: tuple[Annotated[int, Field(ge=16, le=LONGEST)], ...] = Field(
        (),
        max_length=ENTRIES,
        description="tokens of the texts that are repeated, which take turns; none takes `length`, its half and its "
        "quarter",
    )
    score: Score = Field(
        "KVzip+",
        description="which score a scorer stands for: KVzip+, weights of attention times what values add to the hidden "
        "state, or KVzip, weights alone",
    )
    chunk: int = Field(CHUNK, ge=1, le=LONGEST, description="tokens of a text that are repeated at once")
    penalty: float = Field(
        1e-3, gt=0, le=FACTOR, description="of squared weights in a closed form, in standard deviations of features"
    )
    documents: int = Field(
        8,
        ge=2,  # one text has no spread
        le=DOCUMENTS,
        description="texts of each length that thresholds and their spread are measured on",
    )
    thresholds: tuple[Annotated[int, Field(ge=16, le=LONGEST)], ...] = Field(
        (),
        max_length=ENTRIES,
        description="tokens of the texts that thresholds are measured on, best as long as those of use: one pass over "
        "each, without a repetition; none takes `lengths`",
    )

    margin: int = Field(
        0,
        ge=0,
        le=LONGEST,
        description="tokens at the end of a text, at most half of it, that nothing is fitted to: the repetition stands "
        "right behind them and looks at them more, which a scorer takes for a matter of position",
    )

    @model_serializer(mode="wrap")
    def _as_written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without lengths for thresholds where there are none, without the score where it is KVzip+'s and without a
        margin of none, so that earlier preparations keep their keys."""
        written: dict[str, Any] = write(self)
        if not self.thresholds:
            written.pop("thresholds")
        if self.score == "KVzip+":
            written.pop("score")
        if not self.margin:
            written.pop("margin")
        return written

    needs_teacher: ClassVar[bool] = True
    of_layer: ClassVar[bool] = True
    repeats: ClassVar[bool] = True
    unit: ClassVar[str] = "squared error of a logarithm, a token and head group, summed over layers"

    def check(self, context: int | None) -> None:
        longest = max(self.thresholds, default=0)
        if context is not None and longest > context:
            raise UserError(
                "texts that thresholds are measured on are longer than the model's context",
                where="prepare.objectives",
                expected=f"`thresholds` of at most {context:,} tokens",
                found=f"{longest:,}",
            )

    def lengths_within(self, longest: int) -> tuple[int, ...]:
        """The lengths of texts, none longer than `longest` tokens, each once and in ascending order."""
        asked = self.lengths or (longest // 4, longest // 2, longest)
        return tuple(sorted({length for length in asked if 16 <= length <= longest} or {longest}))

    def loss(self, student: Any, teacher: Any, inputs: Inputs) -> torch.Tensor:
        """Of one layer and text.

        Args:
            student, teacher: `scores` of both are `[G, n]`.
        """
        difference = student["scores"].float() - teacher["scores"].float()
        return difference.square().mean(0).sum()
