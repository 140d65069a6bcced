"""The aaren target: one query for all tokens of a head, so that a state of constant size stands for all keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from compress.registry import targets
from compress.targets.cost import Cost
from compress.targets.target import Target
from compress.targets.unit import Unit

if TYPE_CHECKING:
    import torch

    from compress.runtime.families import Family


@targets.register("aaren")
class AarenGroup(Target):
    """Attention of a fixed query for every query head, as a prefix scan (Aaren, arXiv 2405.13956).

    A pretrained head is not converted by it: its query depends on the token. It is for heads whose query hardly does,
    which the statistic `query_constancy` finds, and for training from scratch. Keys are scored as the model gives them,
    turned by RoPE where it has any. Until it is trained, and without `query`, a head averages all values.
    """

    runtime: ClassVar[str | None] = "compress.runtime.mixer_aaren"
    noun: ClassVar[str] = "a fixed query"
    objective: ClassVar[str | None] = "transfer"
    untrained: ClassVar[bool] = True

    target: Literal["aaren"] = "aaren"
    query: tuple[tuple[float, ...], ...] | None = Field(
        None,
        description="what the queries start from, a row for each query head of the group, for instance the means of "
        "`query_constancy`; null is zero, the mean of all values",
    )

    @field_validator("query")
    @classmethod
    def _rows(cls, query: tuple[tuple[float, ...], ...] | None) -> tuple[tuple[float, ...], ...] | None:
        if query is not None and len({len(row) for row in query}) != 1:
            raise ValueError("expected one or more rows of as many numbers each")
        return query

    @classmethod
    def of(cls, query: torch.Tensor) -> AarenGroup:
        """The group that starts with these queries `[query heads, head size]`."""
        return cls(query=tuple(map(tuple, query.tolist())))

    @classmethod
    def refusal(cls, family: Family) -> str | None:
        """What a family's layers do with their scores already."""
        return family.scores

    @classmethod
    def options(cls, unit: Unit, lengths: Sequence[int], grid: Any = None) -> list[Target]:
        """The one that there is; none in a layer that slides by itself."""
        return [cls()] if unit.native is None else []

    def cost(self, unit: Unit, length: int) -> Cost:
        """The state in float32: a maximum, a total and a sum of values for every query head.

        Raises:
            ValueError: tokens are asked for; no stock architecture has this target.
        """
        if not unit.paged:
            raise self.no_stock_form()
        held = 4 * (unit.head_dim + 2) * unit.query_heads
        own = unit.query_heads * unit.head_dim if unit.parameters else 0
        flops = 4 * unit.head_dim * unit.query_heads * length
        return Cost(held, held, 1, flops, unit.parameters + own, heads=unit.query_heads)

    def words(self, native: int | None = None) -> str:
        return "a fixed query over all keys"

    def short(self, native: int | None = None) -> str:
        return "aaren"

    def rule_text(self) -> str:
        return "every query head weighs all tokens so far by its one query, whatever the token at t is."
