"""The budget `bytes_read`: bytes of KV cache that a decode step reads for one sequence."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, field_validator

from compress.registry import budget_kinds
from compress.search.budget.kind import ShareByLength, Shares


@budget_kinds.register("bytes_read")
class BytesRead(ShareByLength):
    """KV bytes that the last query reads. Windows read all that they hold; other targets may hold more."""

    reads: ClassVar[tuple[str, ...]] = ("read_bytes",)
    unit: ClassVar[str] = "bytes"
    of: ClassVar[str] = "the KV bytes that the dense model's decode step reads"
    whole_numbers: ClassVar[bool] = True

    bytes_read: Annotated[
        float | dict[int, float] | None,
        Field(
            description="share of the KV bytes that a decode step of the dense model reads, above 0 and up to 1, for "
            "all `lengths`; or a mapping from length to a share, or to whole bytes where the number is above 1"
        ),
    ] = None

    @field_validator("bytes_read")
    @classmethod
    def _check_bytes_read(cls, value: Shares) -> Shares:
        return BytesRead.check(value)
