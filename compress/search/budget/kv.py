"""The budget `kv`: bytes of KV cache that are held for one sequence."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, ValidationInfo, field_validator

from compress.registry import budget_kinds
from compress.search.budget.kind import ShareByLength, Shares


@budget_kinds.register("kv")
class Kv(ShareByLength):
    """KV bytes held, in whole pages; half of the dense model's where a budget gives no other kind.

    A mean over texts, where what is held depends on them; `kv_bound` counts what is held at most.
    """

    reads: ClassVar[tuple[str, ...]] = ("held_bytes",)
    unit: ClassVar[str] = "bytes"
    of: ClassVar[str] = "the dense KV bytes"
    whole_numbers: ClassVar[bool] = True
    in_expectation: ClassVar[bool] = True

    kv: Annotated[
        float | dict[int, float] | None,
        Field(
            description="share of the dense KV bytes, above 0 and up to 1, for all `lengths`; or a mapping from length "
            "to a share, or to whole bytes where the number is above 1; 0.5 when no other kind is given",
            validate_default=True,
        ),
    ] = None

    @field_validator("kv")
    @classmethod
    def _check_kv(cls, kv: Shares, info: ValidationInfo) -> Shares:
        """The other kinds are read before it, because its default depends on them (`Budget`)."""
        if kv is None and all(info.data.get(name) is None for name in budget_kinds):
            return 0.5
        return Kv.check(kv)
