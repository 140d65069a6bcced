"""The KV-byte budget of a search: what the user asks for, in bytes at every length, and whether it can be met."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator, model_validator

from compress.errors import Problem, UserError
from compress.registry import Method
from compress.runtime.span import FULL, AnySpan, Span, own_span
from compress.targets.cost import kv_bytes, stock_kv_bytes
from compress.targets.window import SpanGrid

if TYPE_CHECKING:
    from compress.models.shape import ModelShape


class Budget(Method):
    """KV cache bytes that a plan may allocate for one sequence, at every length a constraint of its own."""

    kv: Annotated[
        float | dict[int, float],
        Field(
            description="share of the dense KV bytes, above 0 and up to 1, for all `lengths`; or a mapping from length "
            "to a share, or to whole bytes where the number is above 1"
        ),
    ] = 0.5
    lengths: Annotated[
        tuple[int, ...] | None,
        Field(description="input lengths in tokens at which the budget holds; null takes the profiled lengths"),
    ] = None

    @field_validator("kv")
    @classmethod
    def _check_kv(cls, kv: float | dict[int, float]) -> float | dict[int, float]:
        if isinstance(kv, dict):
            if not kv:
                raise ValueError("expected at least one length")
            for length, value in kv.items():
                if length < 1:
                    raise ValueError(f"expected lengths of at least 1 token, got {length}")
                if not (0 < value <= 1 or (value > 1 and value == int(value))):
                    raise ValueError(f"at length {length}: expected a share in (0, 1] or whole bytes, got {value}")
        elif not 0 < kv <= 1:
            raise ValueError(f"expected a share of the dense KV bytes in (0, 1], got {kv}; half of them is 0.5")
        return kv

    @field_validator("lengths")
    @classmethod
    def _check_lengths(cls, lengths: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if lengths is not None and (not lengths or min(lengths) < 1 or len(set(lengths)) < len(lengths)):
            raise ValueError("expected one or more lengths of at least 1 token, each once")
        return lengths

    @model_validator(mode="after")
    def _check_together(self) -> Budget:
        if isinstance(self.kv, dict) and self.lengths is not None and set(self.lengths) != set(self.kv):
            raise ValueError("lengths: leave it out, or name the lengths of `kv`, when `kv` is a mapping")
        return self

    def limits(self, shape: ModelShape, itemsize: int, profiled: Sequence[int]) -> dict[int, int]:
        """Bytes allowed at every length for one sequence, ascending lengths.

        A share is of what the dense model's cache holds. A share of 1 also covers the rounding of a length to
        whole cache pages, so that the dense model itself always meets it.

        Args:
            itemsize: bytes of one cached number.
            profiled: lengths to use when the budget names none.
        """
        shares = self.kv if isinstance(self.kv, dict) else dict.fromkeys(self.lengths or profiled, self.kv)
        limits = {}
        for length, share in sorted(shares.items()):
            dense = dense_bytes(shape, length, itemsize)
            if share > 1:
                limits[length] = int(share)
            elif share == 1:
                limits[length] = max(dense, rule_bytes(shape, FULL, length, itemsize))
            else:
                limits[length] = math.floor(share * dense)
        return limits


def effective_spans(shape: ModelShape, decision: Sequence[Sequence[AnySpan]]) -> list[list[AnySpan]]:
    """What the runtime runs: in a layer that slides by itself, the architecture's window replaces the decision."""
    return [
        list(row) if native is None else [own_span(native)] * len(row)
        for row, native in zip(decision, shape.native_windows, strict=True)
    ]


def dense_bytes(shape: ModelShape, length: int, itemsize: int) -> int:
    """KV bytes of the model as it is: `length` tokens a group, or the window in a layer that slides by itself."""
    return stock_kv_bytes(shape.native_windows, shape.kv_heads, length, shape.head_dim, itemsize)


def rule_bytes(shape: ModelShape, span: Span, length: int, itemsize: int) -> int:
    """KV bytes of one span in every head group that can have it, native sliding layers as they are."""
    spans = effective_spans(shape, [[span] * shape.kv_heads] * shape.layers)
    return kv_bytes(spans, length, shape.head_dim, itemsize)


def smallest_bytes(shape: ModelShape, grid: SpanGrid, length: int, itemsize: int) -> int:
    """The fewest KV bytes that any plan of the grid allocates at `length`.

    Pages grow with sink, beta and alpha, so one rule, the smallest in all three, is the cheapest at every length.
    """
    windows = [rule.span for rule in grid.rules(1) if not rule.span.is_full]
    return rule_bytes(shape, windows[0] if windows else FULL, length, itemsize)


def smallest_share(shape: ModelShape, grid: SpanGrid, length: int, itemsize: int) -> float:
    """`smallest_bytes` over the dense model's, rounded up to four digits, so that a budget of this share is met."""
    share = smallest_bytes(shape, grid, length, itemsize) / dense_bytes(shape, length, itemsize)
    return math.ceil(share * 10_000) / 10_000


def ceiling(shape: ModelShape, grid: SpanGrid, lengths: Iterable[int], itemsize: int) -> str | None:
    """In words, how much a model that is part local has to give; None where no layer slides by itself."""
    sliding = sum(native is not None for native in shape.native_windows)
    if not sliding:
        return None
    shares = [f"{smallest_share(shape, grid, length, itemsize):g} at {length:,} tokens" for length in sorted(lengths)]
    return (
        f"{sliding} of {shape.layers} layers slide by themselves and stay as they are; only the full ones "
        f"({shape.layers - sliding}) have anything to give. The smallest share of the dense KV bytes that any plan "
        f"reaches is {', '.join(shares)}"
    )


def check_feasible(limits: Mapping[int, int], shape: ModelShape, grid: SpanGrid, itemsize: int) -> None:
    """Raise one UserError with a problem for every length whose limit no plan of the grid can meet."""
    problems = []
    for length, limit in limits.items():
        smallest = smallest_bytes(shape, grid, length, itemsize)
        if smallest <= limit:
            continue
        dense = dense_bytes(shape, length, itemsize)
        share = smallest_share(shape, grid, length, itemsize)
        problems.append(
            Problem(
                f"no plan meets the budget at length {length}",
                "search.budget",
                expected=f"at least {share:g} of the dense KV bytes ({smallest:,} of {dense:,} bytes), which the "
                "smallest rule of the profile's span grid takes in every head group"
                + (", beside the layers that slide by themselves" if any(shape.native_windows) else ""),
                found=f"{limit:,} bytes, {limit / dense:.4g} of the dense KV bytes",
                fix=f"raise the budget to {share:g} or more, budget at longer inputs, or profile a grid with a smaller "
                "sink or alpha_min",
            )
        )
    if problems:
        raise UserError(problems)
