"""The budget `kv_bound`: bytes of KV cache that one sequence holds at most, whatever the text."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, field_validator

from compress.registry import budget_kinds
from compress.search.budget.kind import ShareByLength, Shares


@budget_kinds.register("kv_bound")
class KvBound(ShareByLength):
    """The bound in place of the mean: heads that keep tokens by their scores are counted by their caps.

    What holds the same of every text, such as a window, counts as in `kv`.
    """

    reads: ClassVar[tuple[str, ...]] = ("most_bytes",)
    unit: ClassVar[str] = "bytes"
    of: ClassVar[str] = "the dense KV bytes, whatever the text"
    whole_numbers: ClassVar[bool] = True
    newer: ClassVar[bool] = True

    kv_bound: Annotated[
        float | dict[int, float] | None,
        Field(
            description="share of the dense KV bytes that no text may exceed, above 0 and up to 1, for all `lengths`; "
            "or a mapping from length to a share, or to whole bytes where the number is above 1; for heads that keep "
            "tokens by their scores, whose `cap` bounds them, where `kv` counts what they hold on average"
        ),
    ] = None

    @field_validator("kv_bound")
    @classmethod
    def _check_kv_bound(cls, value: Shares) -> Shares:
        return KvBound.check(value)
